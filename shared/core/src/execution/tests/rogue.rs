//! Random events in any order thrown at the fold, as if somebody wrote them past every decision.

use proptest::prelude::*;

use super::*;
use crate::event::LateResult;

/// The kinds that are thrown most often are those that could end, revive or move an execution.
fn event() -> impl Strategy<Value = ExecutionEvent> {
    let attempt = prop_oneof![12 => 0u32..6, 1 => Just(u32::MAX)];
    let next = prop_oneof![2 => Just(None), 6 => (0u32..6).prop_map(Some), 1 => Just(Some(u32::MAX))];
    (0..ExecutionEvent::NAMES.len(), attempt, next, 0u8..3, any::<[bool; 4]>()).prop_map(
        |(kind, attempt, next, who, [late, returned, completed, plain])| {
            let mut event = samples::execution_events().swap_remove(kind);
            match &mut event {
                ExecutionEvent::Submitted(e) => e.attempt = attempt,
                ExecutionEvent::Queued(e) => {
                    e.attempt = attempt;
                    e.reason = plain.then(|| "draining".to_owned());
                }
                ExecutionEvent::Dispatched(e) => {
                    e.attempt = attempt;
                    e.agent_id = agent(who);
                }
                ExecutionEvent::Started(e) => e.attempt = attempt,
                ExecutionEvent::CancelRequested(e) => e.attempt = attempt,
                ExecutionEvent::Completed(e) => {
                    e.attempt = attempt;
                    e.late = late;
                }
                ExecutionEvent::Failed(e) => e.attempt = attempt,
                ExecutionEvent::Cancelled(e) => e.attempt = attempt,
                ExecutionEvent::Expired(e) => e.attempt = attempt,
                ExecutionEvent::Recovered(e) => {
                    e.attempt = attempt;
                    e.next_attempt = next;
                    e.returned = returned;
                    e.action = match who {
                        0 => RecoveryAction::Failed,
                        1 => RecoveryAction::Quarantined,
                        _ => RecoveryAction::Requeued,
                    };
                }
                ExecutionEvent::Retried(e) => e.attempt = attempt,
                ExecutionEvent::LateResult(e) => {
                    e.attempt = attempt;
                    e.outcome = if completed { Outcome::Completed } else { Outcome::Failed };
                }
            }
            event
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(800))]

    #[test]
    fn no_event_by_anybody_breaks_finality_or_the_attempt_fence(
        first_attempt in prop_oneof![Just(1u32), Just(0), Just(u32::MAX)],
        external: bool,
        entries in proptest::collection::vec((event(), 0u64..3), 0..120),
    ) {
        let delivery = if external { Delivery::External } else { Delivery::Push };
        let mut first = request(OnLoss::Requeue, 2, delivery);
        first.attempt = first_attempt;
        let mut log = vec![(1u64, ExecutionEvent::from(first.clone()), START)];
        let mut execution = Execution::submitted(first, 1, START);
        let mut begun = Begun::default();
        let mut seq = 1;
        for (event, step) in entries {
            // A step of 0 is a repetition.
            seq += step;
            let before = execution.clone();
            let accepted = execution.evolve(seq, &event, START.plus_ms(seq));
            prop_assert_eq!(execution.seq, seq, "the sequence counts, fitting or not");
            if step == 0 {
                prop_assert_eq!(accepted, Ok(()));
                prop_assert_eq!(&before, &execution);
                continue;
            }
            check_step(&before, &event, &execution, begun.last()).map_err(TestCaseError::fail)?;
            if accepted.is_ok() {
                let of_any_attempt = match &event {
                    ExecutionEvent::Retried(_) | ExecutionEvent::LateResult(_) => true,
                    ExecutionEvent::Completed(done) => done.late,
                    _ => false,
                };
                prop_assert!(of_any_attempt || event.attempt() == before.attempt, "{:?}", event);
                begun.note(&event, before.state);
            } else {
                let mut expected = before;
                expected.seq = seq;
                prop_assert_eq!(&expected, &execution, "a misfit changes nothing but the sequence");
            }
            log.push((seq, event, START.plus_ms(seq)));
        }
        let replayed = Execution::fold(log.iter().map(|(seq, event, time)| (*seq, event, *time)));
        prop_assert_eq!(replayed, Some(execution));
    }

    /// Whatever else is written, a report that counts is still heard: nothing mutes the holder's result.
    #[test]
    fn no_late_result_by_anybody_mutes_a_report_that_counts(
        before in proptest::collection::vec(event(), 0..30),
    ) {
        let mut execution = Execution::submitted(request(OnLoss::Requeue, 2, Delivery::Push), 1, START);
        for event in before {
            // A misfit is part of the story.
            let _ = execution.evolve(execution.seq + 1, &event, START);
            let Some(last) = execution.attempts.last().cloned() else { continue };
            for outcome in [Outcome::Completed, Outcome::Failed, Outcome::Returned] {
                let standing = execution.standing(&last.agent_id, last.number, outcome);
                if matches!(standing, Standing::Current | Standing::LateCompletion) {
                    let mut noise = late_result();
                    noise.attempt = last.number;
                    noise.outcome = outcome;
                    prop_assert!(execution.evolve(execution.seq + 1, &noise.into(), START).is_err());
                    prop_assert_eq!(execution.standing(&last.agent_id, last.number, outcome), standing);
                }
            }
        }
    }
}

fn late_result() -> LateResult {
    match samples::execution_events().pop() {
        Some(ExecutionEvent::LateResult(late)) => late,
        other => unreachable!("the last sample is a late result, not {other:?}"),
    }
}

#[test]
fn a_history_that_does_not_begin_with_its_submission_is_none() {
    let events = samples::execution_events();
    let log = |skip: usize| {
        let entries = events.iter().enumerate().skip(skip);
        Execution::fold(entries.map(|(n, event)| (n as u64 + 1, event, START)))
    };
    assert!(log(1).is_none());
    assert_eq!(log(0).unwrap().seq, events.len() as u64);
}
