//! The world and its judgements in virtual time: events as the log has them, heartbeats, and an oracle that answers
//! what the judgements ask for.

#![allow(missing_docs, unreachable_pub)]
// A failed expectation ends the test; that is what it is for.
#![allow(clippy::unwrap_used)]

mod away;
mod clock;
mod driven;
mod gone;
mod heard;
mod net;
mod promise;
mod properties;
mod registry;
mod report;
mod sim;
mod started;

use std::collections::BTreeSet;

use rollcall_core::{
    agent::Status,
    event::{RecoveryReason, TerminateOutcome},
    wire::{Heartbeat, Outcome, TerminateState},
};
use serde_json::json;
use watchdog::{
    decide::{Finding, Verdict, judge},
    effect,
    facts::{Asked, Edge, Facts, Listing, Waiting},
    matrix::{Row, SAMPLE_LIMITS, healthy_sample, sample},
    sight::Void,
};

use sim::{HOUR, LIMITS, Sim, Truth, agent, execution, t};

#[test]
fn the_first_list_after_the_grace_is_not_enough_and_the_second_is() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Empty;
    // Inside the grace nothing counts, however often.
    for _ in 0..4 {
        sim.advance(1_000);
        sim.beat(false, 0);
    }
    sim.advance(1_000);
    sim.beat(false, 0);
    assert!(sim.is_untouched());
    sim.advance(1_000);
    sim.beat(false, 0);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Orphaned);
    assert_eq!(sim.recovered[0].1, TerminateOutcome::NotRunning);
}

#[test]
fn lists_before_and_after_a_blindness_are_not_in_a_row() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Mute;
    sim.advance(6_000);
    sim.beat(false, 0);
    sim.world.void(Void::Dropped);
    sim.see();
    sim.advance(500);
    sim.beat(false, 0);
    assert!(sim.is_untouched());
    sim.advance(500);
    sim.beat(false, 0);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Orphaned);
}

#[test]
fn a_superseded_instance_is_not_silent_while_we_are_blind() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Mute;
    sim.beat(true, 0);
    sim.advance(6_000);
    sim.world.void(Void::BusCut);
    sim.supersede();
    sim.advance(50_000);
    assert!(sim.is_untouched());
    sim.see();
    sim.advance(3_400);
    assert!(sim.is_untouched());
    sim.advance(1_200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentRestarted);
}

#[test]
fn standing_still_needs_a_list_from_after_the_stall_timeout() {
    let mut sim = Sim::new(HOUR, Some(2_000));
    sim.beat(true, 7);
    sim.advance(1_500);
    sim.beat(true, 7);
    sim.advance(900);
    assert!(sim.is_untouched(), "the last list is older than the stall timeout");
    sim.beat(true, 8);
    sim.advance(1_000);
    sim.beat(true, 8);
    assert!(sim.is_untouched(), "it moved");
    sim.advance(1_100);
    sim.beat(true, 8);
    sim.advance(1_000);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Stalled);
    assert_eq!(sim.terminations, 1);
}

#[test]
fn work_without_progress_never_stands_still_also_when_it_named_some_before() {
    for named_before in [false, true] {
        let mut sim = Sim::new(HOUR, Some(2_000));
        if named_before {
            // It has finished since, and its report is not acknowledged yet.
            sim.beat(true, 7);
            sim.advance(900);
            sim.beat(true, 7);
        }
        never_stands_still(sim);
    }
}

fn never_stands_still(mut sim: Sim) {
    for _ in 0..20 {
        sim.advance(900);
        sim.beat_seq += 1;
        let beat = format!(
            r#"{{"instance_id":"i-1","seq":{},"state":"busy","capacity":1,"executions":[{{"id":"x","attempt":1}}]}}"#,
            sim.beat_seq
        );
        sim.world.beat("a", &Heartbeat::read("a", beat.as_bytes()).unwrap(), sim.now);
        sim.work();
    }
    assert!(sim.is_untouched());
}

#[test]
fn an_idle_healthy_execution_is_judged_once_however_long_it_runs() {
    let mut sim = Sim::new(HOUR, None);
    let works = sim.works;
    for n in 0..1_000 {
        sim.advance(1_000);
        sim.beat(true, n);
    }
    assert_eq!((sim.works, sim.terminations), (works, 0));
    assert_eq!(sim.world.due.next(), Some(t(0).plus_ms(HOUR)), "only its deadline is planned");
}

#[test]
fn a_deadline_inside_the_grace_still_counts() {
    let mut sim = Sim::new(2_000, None);
    sim.ending = Some(TerminateState::NotRunning);
    sim.truth = Truth::Empty;
    sim.advance(2_000);
    assert_eq!(sim.recovered, [(RecoveryReason::TimedOut, TerminateOutcome::NotRunning, t(2_000))]);
}

#[test]
fn a_terminated_report_that_waits_is_the_confirmation() {
    let mut sim = Sim::new(2_000, None);
    sim.waiting = Waiting::Confirms(Outcome::Terminated);
    sim.advance(2_000);
    assert_eq!(sim.terminations, 0);
    assert_eq!(sim.recovered, [(RecoveryReason::TimedOut, TerminateOutcome::Confirmed, t(2_000))]);
}

#[test]
fn an_instance_that_we_never_heard_was_not_silent_before_it_got_its_work() {
    let (mut facts, _) = sample(Row::AgentSilent);
    facts.channel.last_at = None;
    facts.channel.interval_ms = 1_000;
    facts.sight_since = Some(t(0));
    facts.dispatched_at = t(10_000);
    assert_eq!(facts.silent_at(&LIMITS), Some(t(13_500)));
    facts.sight_since = Some(t(20_000));
    assert_eq!(facts.silent_at(&LIMITS), Some(t(23_500)), "nor before we saw");
}

/// Nobody asked for its death: what its agent says is its own end of it, and the dispatcher's to write down.
#[test]
fn a_terminated_report_that_nobody_asked_for_withholds_the_verdict_on_absence() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Empty;
    sim.waiting = Waiting::Confirms(Outcome::Terminated);
    for _ in 0..10 {
        sim.advance(900);
        sim.beat(false, 0);
    }
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    assert_eq!(sim.world.troubles[&execution()].row, Row::Withheld);
}

#[test]
fn an_end_whose_answer_was_lost_is_known_by_the_report_or_by_the_list() {
    for report in [true, false] {
        let mut sim = Sim::new(6_000, None);
        sim.ending = None;
        sim.truth = Truth::Empty;
        for n in 0..7 {
            sim.advance(900);
            sim.beat(true, n);
        }
        assert_eq!(sim.terminations, 1);
        if report {
            sim.waiting = Waiting::Confirms(Outcome::Terminated);
            sim.advance(1_000);
        } else {
            sim.beat(false, 0);
            sim.beat(false, 0);
        }
        let expected = if report { TerminateOutcome::Confirmed } else { TerminateOutcome::NotRunning };
        assert_eq!((sim.recovered[0].0, sim.recovered[0].1), (RecoveryReason::TimedOut, expected));
    }
}

#[test]
fn what_is_not_running_and_still_listed_is_held_until_its_report_is_acknowledged_or_should_be() {
    for (truth, acknowledged) in [(Truth::Lists, true), (Truth::Mute, true), (Truth::Lists, false)] {
        let mut sim = Sim::new(6_000, None);
        sim.ending = Some(TerminateState::NotRunning);
        sim.truth = truth;
        // Its time is up after 6 s, and its report has the dispatch grace from there.
        for n in 0..11 {
            sim.advance(900);
            sim.beat(true, n);
        }
        assert!(sim.recovered.is_empty(), "{truth:?}: {:?}", sim.recovered);
        assert!(sim.terminations > 1, "it is asked again: another agent may not have begun it yet");
        assert_eq!(sim.world.troubles[&execution()].row, Row::Withheld);
        if acknowledged {
            // Its report is applied elsewhere; whatever became of it, the agent has let go.
            sim.truth = if truth == Truth::Lists { Truth::Empty } else { truth };
            sim.beat(false, 0);
            sim.advance(1_000);
        } else {
            sim.advance(900);
            sim.beat(true, 99);
            sim.advance(900);
        }
        assert_eq!(
            (sim.recovered[0].0, sim.recovered[0].1),
            (RecoveryReason::TimedOut, TerminateOutcome::NotRunning)
        );
        let grace_ends = t(6_000).plus_ms(LIMITS.dispatch_grace_ms);
        assert!(acknowledged || sim.recovered[0].2 >= grace_ends, "{:?}", sim.recovered);
    }
}

#[test]
fn a_finished_report_that_waits_at_the_deadline_spares_it_the_terminate() {
    let mut sim = Sim::new(2_000, None);
    sim.waiting = Waiting::Withholds(Outcome::Completed);
    sim.advance(10_000);
    assert!(sim.is_untouched());
}

#[test]
fn a_silent_agent_is_not_lost_while_we_still_hear_it_and_lost_when_we_do_not() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Mute;
    sim.status("i-1", Status::Error);
    for n in 0..20 {
        sim.advance(900);
        sim.beat(true, n);
    }
    assert!(sim.is_untouched());
    let last = sim.now;
    sim.advance(3_400);
    assert!(sim.is_untouched(), "silent, but not to the threshold");
    sim.advance(200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentLost);
    assert_eq!(sim.recovered[0].2.since_ms(last), 3_500, "failure k falls at (k + 0.5) intervals");
}

#[test]
fn no_responders_needs_an_instance_that_used_to_answer_and_an_overdue_heartbeat() {
    // Its list vouches for what it names up to then; for what came after its last list nothing does.
    for lists in [true, false] {
        for (answered, expected_after) in [(true, 1_500), (false, 3_500)] {
            let mut sim = Sim::new(HOUR, None);
            for n in 0..4 {
                sim.advance(900);
                sim.beat(lists, n);
            }
            sim.truth = Truth::Away;
            let claims = sim.world.agents.get_mut(&agent()).unwrap().claims_mut("i-1").unwrap();
            claims.answered = answered;
            let last = sim.now;
            sim.supersede();
            sim.advance(10_000);
            assert_eq!(sim.recovered.len(), 1);
            assert_eq!(sim.recovered[0].0, RecoveryReason::AgentRestarted);
            let after = sim.recovered[0].2.since_ms(last);
            assert_eq!(after, expected_after, "listed: {lists}, answered before: {answered}");
        }
    }
}

#[test]
fn a_dispatch_that_found_nobody_is_left_to_the_dispatcher_for_a_moment() {
    let mut sim = Sim::new(HOUR, None);
    // Taken back and dispatched again, not started.
    sim.world.executions.get_mut(&execution()).unwrap().attempts[0].started_at = None;
    sim.gone(Some("instance"));
    sim.advance(2_900);
    assert!(sim.is_untouched());
    sim.advance(200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentGone);
}

#[test]
fn a_mass_of_silences_condemns_nobody_until_the_net_and_time_reopens_the_way() {
    let mut sim = Sim::new(HOUR, None);
    sim.truth = Truth::Away;
    sim.mass_failure();
    sim.status("i-1", Status::Disconnected);
    sim.advance(25_000);
    assert!(sim.is_untouched());
    sim.advance(6_000);
    sim.world.check_breaker(sim.now);
    assert!(!sim.world.is_suspended());
    sim.advance(LIMITS.lost_after_ms - 100);
    assert!(sim.is_untouched(), "every clock starts again after a suspension");
    sim.advance(200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentLost);
}

#[test]
fn neither_silence_nor_absence_is_a_verdict_before_our_own_message_came_back() {
    for (truth, reason) in
        [(Truth::Away, RecoveryReason::AgentLost), (Truth::Empty, RecoveryReason::Orphaned)]
    {
        let mut sim = Sim::new(HOUR, None);
        sim.advance(900);
        sim.beat(true, 0);
        sim.truth = truth;
        sim.canary = false;
        if reason == RecoveryReason::AgentLost {
            sim.status("i-1", Status::Disconnected);
        }
        for _ in 0..30 {
            sim.advance(900);
            if reason == RecoveryReason::Orphaned {
                sim.beat(false, 0);
            }
        }
        assert!(sim.is_untouched(), "{:?}", sim.recovered);
        sim.canary = true;
        sim.advance(500);
        assert_eq!(sim.recovered[0].0, reason);
    }
}

#[test]
fn an_instance_that_we_could_not_ask_has_not_answered_no() {
    for row in [Row::AgentLost, Row::Orphaned, Row::DispatchLost, Row::AgentRestarted] {
        let (mut facts, now) = sample(row);
        assert!(matches!(judge(&facts, &SAMPLE_LIMITS, now).verdict, Verdict::Recover(_)), "{row:?}");
        facts.edge = Edge::Void;
        let judgement = judge(&facts, &SAMPLE_LIMITS, now);
        assert_eq!(judgement.row, Row::Blind, "{row:?}");
        assert!(matches!(judgement.verdict, Verdict::Postpone(_)), "{row:?}: {judgement:?}");
    }
}

#[test]
fn its_agent_is_asked_before_the_safety_net_takes_it() {
    // We were away for longer than the net: it is due by both.
    let (mut facts, _) = healthy_sample();
    facts.waiting = Waiting::Nothing;
    let now = facts.deadline.plus_ms(SAMPLE_LIMITS.stale_after_ms + 1);
    let verdict = |asked| {
        let facts = Facts { asked, ..facts.clone() };
        judge(&facts, &SAMPLE_LIMITS, now).verdict
    };
    assert_eq!(verdict(Asked::No), Verdict::Terminate(RecoveryReason::TimedOut));
    let Verdict::Recover(ended) = verdict(Asked::Confirmed) else { panic!("it is dead") };
    assert_eq!((ended.reason, ended.terminate), (RecoveryReason::TimedOut, TerminateOutcome::Confirmed));
    let Verdict::Recover(stale) = verdict(Asked::Unconfirmed { next_at: now }) else { panic!("it is stale") };
    assert_eq!((stale.reason, stale.terminate), (RecoveryReason::Stale, TerminateOutcome::Failed));
}

#[test]
fn what_is_not_known_is_null_in_the_evidence() {
    let (mut facts, now) = healthy_sample();
    facts.channel.last_at = None;
    facts.sight_since = None;
    facts.listing = Listing::Listed { at: now, rose_at: None, stands_since: None, named_at: None };
    let evidence = effect::evidence(&facts, &SAMPLE_LIMITS, None, now);
    for unknown in [
        "/heartbeats/last_age_ms",
        "/heartbeats/silent_at",
        "/list/progress_rose_ms_ago",
        "/sight_since",
        "/agent",
    ] {
        assert_eq!(evidence.pointer(unknown), Some(&json!(null)), "{unknown}: {evidence}");
    }
    assert_eq!(evidence["list"]["list_age_ms"], 0);
}

#[test]
fn every_recovery_says_in_a_sentence_what_happened_and_where() {
    let sim = Sim::new(HOUR, Some(2_000));
    let execution = &sim.world.executions[&execution()];
    let (facts, _) = healthy_sample();
    let mut told = BTreeSet::new();
    for reason in RecoveryReason::ALL {
        let finding = Finding { reason, terminate: TerminateOutcome::Confirmed, true_at: sim.now };
        let held = execution.holder().unwrap();
        let loss = effect::loss(execution, held, &finding, &facts, json!({}), sim.now.plus_ms(7));
        let words: Vec<&str> = loss.message.split([' ', ',']).collect();
        assert!(words.windows(2).any(|pair| pair == ["agent", "a"]) && words.len() > 6, "{}", loss.message);
        assert_eq!((loss.reason, loss.detected_after_ms), (reason, 7));
        told.insert(loss.message);
    }
    assert_eq!(told.len(), RecoveryReason::ALL.len(), "each another one");
}

#[test]
fn an_entry_that_is_no_event_changes_nothing_but_the_sequence() {
    let mut sim = Sim::new(HOUR, None);
    let before = sim.world.executions[&execution()].clone();
    let subject = sim.subjects.execution_event(&execution());
    assert!(sim.world.apply(&sim.subjects, &subject, sim.seq + 1, b"{}", sim.now).is_err());
    let after = &sim.world.executions[&execution()];
    assert_eq!((after.seq, after.state), (sim.seq + 1, before.state), "the next append has to name it");
    assert_eq!(sim.world.counters.invalid, 1);
}

#[test]
fn the_page_for_operators_says_what_to_do_for_each_reason() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/OPERATIONS.md");
    let page = std::fs::read_to_string(path).unwrap();
    let section = page.split("## What to do for each reason").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let told: BTreeSet<&str> = rows.collect();
    assert_eq!(told, RecoveryReason::ALL.map(RecoveryReason::as_str).into_iter().collect());
}
