//! Random sequences of commands through the decide functions, each accepted event appended and folded.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::event::TerminateOutcome;

#[derive(Debug, Clone)]
enum Command {
    Queue { reason: bool },
    Dispatch { back: u32, agent: u8 },
    Start { back: u32 },
    Cancel,
    ConfirmCancel { back: u32 },
    Expire { waited_ms: u64 },
    Retry,
    Lose { back: u32, reason: RecoveryReason },
    Report { back: u32, agent: u8, outcome: Outcome },
}

const OUTCOMES: [Outcome; 5] =
    [Outcome::Completed, Outcome::Failed, Outcome::Cancelled, Outcome::Terminated, Outcome::Returned];

/// How far behind the present attempt a command is; mostly not at all.
fn back() -> impl Strategy<Value = u32> {
    prop_oneof![6 => Just(0u32), 2 => Just(1), 1 => 2u32..4]
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        2 => any::<bool>().prop_map(|reason| Command::Queue { reason }),
        6 => (back(), 0u8..3).prop_map(|(back, agent)| Command::Dispatch { back, agent }),
        3 => back().prop_map(|back| Command::Start { back }),
        1 => Just(Command::Cancel),
        1 => back().prop_map(|back| Command::ConfirmCancel { back }),
        1 => (0..TTL_MS * 2).prop_map(|waited_ms| Command::Expire { waited_ms }),
        2 => Just(Command::Retry),
        4 => (back(), proptest::sample::select(RecoveryReason::ALL.to_vec()))
            .prop_map(|(back, reason)| Command::Lose { back, reason }),
        4 => (back(), 0u8..3, proptest::sample::select(OUTCOMES.to_vec()))
            .prop_map(|(back, agent, outcome)| Command::Report { back, agent, outcome }),
    ]
}

fn facts(execution: &Execution, back: u32, by: u8, outcome: Outcome) -> ReportFacts {
    let attempt = execution.attempt.saturating_sub(back).max(1);
    // Mostly from whoever holds it: a stranger is refused, and that alone would be a dull story.
    let holder = execution.attempt_numbered(attempt).map(|held| held.agent_id.clone());
    ReportFacts {
        agent_id: if by == 0 { agent(by) } else { holder.unwrap_or_else(|| agent(by)) },
        instance_id: instance(by),
        attempt,
        outcome,
        result: (outcome == Outcome::Completed).then(samples::payload),
        checkpoint: (outcome == Outcome::Returned).then(samples::payload),
        error: (outcome == Outcome::Failed).then(samples::error),
    }
}

fn loss(attempt: u32, reason: RecoveryReason) -> Loss {
    Loss {
        attempt,
        reason,
        terminate: TerminateOutcome::NotAttempted,
        detected_after_ms: 1,
        evidence: json!({}),
        message: "lost".to_owned(),
        returned: false,
        checkpoint: None,
    }
}

fn decide(execution: &Execution, command: &Command, now: Timestamp) -> Option<ExecutionEvent> {
    let named = |back: u32| execution.attempt.saturating_sub(back);
    match command {
        Command::Queue { reason } => execution.queue(1, reason.then(|| "draining".to_owned())).ok(),
        Command::Dispatch { back, agent: n } => {
            execution.dispatch(named(*back), &agent(*n), &instance(*n), 500, now).ok()
        }
        Command::Start { back } => execution.start(named(*back)).ok(),
        Command::Cancel => execution.cancel("because", "somebody").ok(),
        Command::ConfirmCancel { back } => {
            execution.confirm_cancel(named(*back), "terminated", None, None).ok()
        }
        Command::Expire { waited_ms } => execution.expire(execution.waiting_since.plus_ms(*waited_ms)).ok(),
        Command::Retry => execution.retry("operator").ok(),
        Command::Lose { back, reason } => execution.lose(loss(named(*back), *reason)).ok(),
        Command::Report { back, agent: by, outcome } => {
            execution.report(facts(execution, *back, *by, *outcome))
        }
    }
}

/// The book of losses, kept from the events alone.
#[derive(Default)]
struct Losses(u32);

impl Losses {
    fn note(&mut self, event: &ExecutionEvent, request: &Submitted) -> Result<(), String> {
        match event {
            ExecutionEvent::Retried(_) => self.0 = 0,
            ExecutionEvent::Recovered(recovered) => {
                self.0 += u32::from(!recovered.returned);
                let expected = match request.on_loss {
                    OnLoss::Fail => RecoveryAction::Failed,
                    OnLoss::Requeue if !recovered.returned && self.0 == request.max_attempts => {
                        RecoveryAction::Quarantined
                    }
                    OnLoss::Requeue => RecoveryAction::Requeued,
                };
                if recovered.action != expected {
                    return Err(format!("{:?} after {} losses, not {expected:?}", recovered.action, self.0));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn story(request: Submitted, commands: &[Command]) -> Result<(), TestCaseError> {
    let first = ExecutionEvent::from(request.clone());
    let mut log = vec![(1u64, first, START)];
    let mut execution = Execution::submitted(request.clone(), 1, START);
    let mut begun = Begun::default();
    let mut losses = Losses::default();
    let mut now = START;
    for command in commands {
        now = now.plus_ms(10);
        let before = execution.clone();
        let Some(event) = decide(&before, command, now) else { continue };
        let seq = before.seq + 1;
        // Whatever is decided is accepted by the fold.
        prop_assert_eq!(execution.evolve(seq, &event, now), Ok(()), "{:?} on {:?}", event, before.state);
        check_step(&before, &event, &execution, begun.last()).map_err(TestCaseError::fail)?;
        begun.note(&event, before.state);
        losses.note(&event, &request).map_err(TestCaseError::fail)?;
        prop_assert_eq!(execution.losses, losses.0);

        // The same entry once more changes nothing.
        let mut again = execution.clone();
        prop_assert_eq!(again.evolve(seq, &event, now.plus_ms(5)), Ok(()));
        prop_assert_eq!(&again, &execution);

        if let ExecutionEvent::Started(started) = &event {
            prop_assert!(execution.start(started.attempt).is_err(), "started once");
        }
        if let Command::Report { back, agent: by, outcome } = command {
            check_report(&before, &event, &execution, &facts(&before, *back, *by, *outcome))?;
        }
        log.push((seq, event, now));
    }
    check_replay(&log, &execution)
}

fn check_report(
    before: &Execution,
    event: &ExecutionEvent,
    after: &Execution,
    facts: &ReportFacts,
) -> Result<(), TestCaseError> {
    // The same report again is the first.
    prop_assert_eq!(after.report(facts.clone()), None, "{:?} twice", facts);
    if before.holder().is_some_and(|held| held.number == facts.attempt) {
        prop_assert_eq!(&before.holder().unwrap().agent_id, &facts.agent_id);
        prop_assert!(!matches!(event, ExecutionEvent::LateResult(_)));
        return Ok(());
    }
    // Of an attempt that no longer counts: kept, and nothing else, or finished work that still counts.
    match event {
        ExecutionEvent::LateResult(_) => prop_assert_eq!(without_notes(before), without_notes(after)),
        ExecutionEvent::Completed(done) => prop_assert!(done.late && facts.outcome == Outcome::Completed),
        other => prop_assert!(false, "an old report became {other:?}"),
    }
    Ok(())
}

fn check_replay(log: &[(u64, ExecutionEvent, Timestamp)], live: &Execution) -> Result<(), TestCaseError> {
    let once = log.iter().map(|(seq, event, time)| (*seq, event, *time));
    prop_assert!(Execution::fold(once).as_ref() == Some(live), "replayed, it is another");
    // Every entry comes twice, and then all of them again, as after a reconnect.
    let twice = log.iter().flat_map(|entry| [entry, entry]).chain(log);
    let twice = twice.map(|(seq, event, time)| (*seq, event, *time));
    prop_assert!(Execution::fold(twice).as_ref() == Some(live), "repetitions changed it");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(800))]

    #[test]
    fn no_sequence_of_commands_breaks_a_rule(
        requeue: bool,
        external: bool,
        max_attempts in 1u32..4,
        commands in proptest::collection::vec(command(), 0..60),
    ) {
        let on_loss = if requeue { OnLoss::Requeue } else { OnLoss::Fail };
        let delivery = if external { Delivery::External } else { Delivery::Push };
        story(request(on_loss, max_attempts, delivery), &commands)?;
    }
}
