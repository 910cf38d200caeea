//! Instances that were replaced, and agents that fell silent: what has to be proven before their work is taken.

use rollcall_core::{
    agent::Status,
    event::{Queued, RecoveryReason},
    wire::Heartbeat,
};
use watchdog::{
    decide::{Verdict, judge},
    matrix::{Row, SAMPLE_LIMITS, sample},
    state::INSTANCES_MAX,
};

use crate::sim::{Begun, HOUR, LIMITS, Sim, Truth, agent, execution, t};

/// Its old instance lists it, also after the new one registered, and then nothing more is heard of it.
fn vouched_and_then_quiet(truth: Truth) -> Sim {
    let mut sim = Sim::new(HOUR * 24, None);
    for n in 0..12 {
        if n == 6 {
            sim.supersede();
        }
        sim.advance(900);
        sim.beat(true, n);
    }
    sim.truth = truth;
    sim
}

#[test]
fn work_that_says_itself_how_long_its_agent_may_be_away_is_lost_after_that() {
    let lost_after = |mut sim: Sim| {
        sim.beat(true, 0);
        sim.advance(100);
        sim.truth = Truth::Mute;
        let silent = sim.now;
        sim.status("i-1", Status::Disconnected);
        sim.advance(20 * LIMITS.lost_after_ms);
        assert_eq!(sim.recovered[0].0, RecoveryReason::AgentLost);
        sim.recovered[0].2.since_ms(silent)
    };
    let of_the_fleet = lost_after(Sim::new(HOUR, None));
    assert!((LIMITS.lost_after_ms..LIMITS.lost_after_ms + 500).contains(&of_the_fleet), "{of_the_fleet}");
    let longer = lost_after(Sim::of_own_lost_after(10 * LIMITS.lost_after_ms));
    assert!((10 * LIMITS.lost_after_ms..10 * LIMITS.lost_after_ms + 500).contains(&longer), "{longer}");
    // Never before its heartbeats are silent to the threshold.
    let shorter = lost_after(Sim::of_own_lost_after(1));
    assert!((3_400..LIMITS.lost_after_ms).contains(&shorter), "{shorter}");
}

/// Processes that come and go in haste, under one name.
#[test]
fn of_too_many_instances_those_that_list_nothing_are_forgotten_first() {
    let mut sim = Sim::new(HOUR, None);
    sim.beat(true, 0);
    sim.supersede();
    for n in 0..2 * INSTANCES_MAX {
        sim.advance(10);
        let beat = format!(
            r#"{{"instance_id": "n-{n}", "seq": 1, "state": "ready", "capacity": 1, "executions": []}}"#
        );
        sim.world.beat("a", &Heartbeat::read("a", beat.as_bytes()).unwrap(), sim.now);
    }
    let claims = &sim.world.agents[&agent()].claims;
    assert_eq!(claims.len(), INSTANCES_MAX);
    assert!(claims.iter().any(|of| of.instance.as_str() == "i-1"), "it vouches for its work");
}

fn row(sim: &Sim) -> Row {
    sim.world.troubles[&execution()].row
}

#[test]
fn the_silence_of_a_replaced_instance_is_no_verdict_before_our_own_message_came_back() {
    for truth in [Truth::Mute, Truth::Away] {
        let mut sim = vouched_and_then_quiet(truth);
        sim.world.agents.get_mut(&agent()).unwrap().claims_mut("i-1").unwrap().answered = true;
        sim.canary = false;
        sim.advance(30_000);
        assert!(sim.is_untouched(), "{truth:?}: {:?}", sim.recovered);
        sim.canary = true;
        sim.advance(1_000);
        assert_eq!(sim.recovered[0].0, RecoveryReason::AgentRestarted, "{truth:?}");
    }
}

#[test]
fn the_silence_of_a_replaced_instance_counts_for_nothing_while_the_breaker_is_open_and_its_absence_does() {
    let mut sim = vouched_and_then_quiet(Truth::Mute);
    let last = sim.now;
    sim.mass_failure();
    sim.advance(29_000);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    assert_eq!(row(&sim), Row::Suspended);
    // Its process ends: that is no silence.
    let mut gone = vouched_and_then_quiet(Truth::Away);
    gone.world.agents.get_mut(&agent()).unwrap().claims_mut("i-1").unwrap().answered = true;
    gone.mass_failure();
    gone.advance(1_600);
    assert_eq!(gone.recovered[0].0, RecoveryReason::AgentRestarted);
    // The window passes, and every clock begins anew.
    sim.advance(last.plus_ms(31_000).since_ms(sim.now));
    sim.world.check_breaker(sim.now);
    assert!(!sim.world.is_suspended());
    sim.advance(3_400);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    sim.advance(200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::AgentRestarted);
}

#[test]
fn a_suspension_holds_up_a_replaced_instance_up_to_the_net() {
    let mut sim = vouched_and_then_quiet(Truth::Mute);
    let last = sim.now;
    sim.world.log_suspended = true;
    sim.advance(LIMITS.stale_after_ms - 100);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    sim.advance(200);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Stale);
    assert_eq!(sim.recovered[0].2.since_ms(last), LIMITS.stale_after_ms, "counted from its last list");
}

#[test]
fn a_replaced_instance_keeps_its_own_interval_over_a_restart_of_ours() {
    for is_known in [true, false] {
        let mut sim = Sim::empty();
        let slow_ms = if is_known { 20_000 } else { 60_000 };
        if is_known {
            sim.register("i-1", slow_ms);
        } else {
            // Its registration is not in the log any more, or never was.
            sim.register("i-0", 1_000);
        }
        sim.submit("x", Begun::Started, None);
        sim.dispatch("x", HOUR);
        sim.started();
        sim.supersede();
        sim.truth = Truth::Mute;
        sim.restart(10_000);
        let up = sim.now;
        sim.advance(slow_ms * 7 / 2 - 100);
        assert!(sim.is_untouched(), "{:?} ms after our start", sim.recovered[0].2.since_ms(up));
        sim.advance(200);
        assert_eq!(sim.recovered[0].0, RecoveryReason::AgentRestarted, "known: {is_known}");
    }
}

#[test]
fn a_silent_agent_that_answers_is_never_ended_for_its_silence() {
    let mut sim = Sim::new(HOUR * 24, None);
    sim.beat(true, 0);
    sim.status("i-1", Status::Disconnected);
    // It answers when asked, for longer than the net.
    sim.advance(LIMITS.stale_after_ms * 2);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    assert_eq!(row(&sim), Row::SilentAnswers);
    // Others fall silent, and the breaker opens: at the net it is asked again, and answers.
    sim.world.log_suspended = true;
    sim.advance(LIMITS.stale_after_ms * 3);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    let answered_at = sim.world.troubles[&execution()].vouched_at.unwrap();
    // It answers no more: asked before it is ended, and only if we see.
    sim.truth = Truth::Mute;
    let net = answered_at.plus_ms(LIMITS.lost_after_ms + LIMITS.stale_after_ms);
    sim.advance(net.since_ms(sim.now) - 100);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    sim.canary = false;
    sim.advance(1_000);
    assert!(sim.is_untouched(), "{:?}", sim.recovered);
    sim.canary = true;
    sim.advance(1_000);
    assert_eq!(sim.recovered[0].0, RecoveryReason::Stale);
}

#[test]
fn lists_from_before_it_was_dispatched_again_are_no_absence_inside_the_new_grace() {
    let (mut facts, now) = sample(Row::Orphaned);
    assert!(matches!(judge(&facts, &SAMPLE_LIMITS, now).verdict, Verdict::Recover(_)));
    facts.dispatched_at = now;
    assert_eq!(judge(&facts, &SAMPLE_LIMITS, now).row, Row::InGrace);
}

#[test]
fn dispatched_again_the_same_attempt_has_a_grace_of_its_own() {
    let mut sim = Sim::begun(Begun::Dispatched, HOUR, None);
    sim.truth = Truth::Empty;
    sim.advance(6_000);
    sim.beat(false, 0);
    let since = sim.now;
    let back = Queued {
        execution_id: execution(),
        attempt: 1,
        agent_id: Some(agent()),
        position: 1,
        reason: Some("at_capacity".to_owned()),
    };
    sim.execution(back.into());
    sim.dispatch("x", HOUR);
    // No list comes in the new grace; the first beyond it counts as the first.
    sim.advance(LIMITS.dispatch_grace_ms + 100);
    sim.beat(false, 0);
    sim.advance(100);
    assert!(sim.is_untouched(), "{} ms after it was dispatched", sim.recovered[0].2.since_ms(since));
    sim.beat(false, 0);
    assert_eq!(sim.recovered[0].0, RecoveryReason::DispatchLost);
    assert!(sim.now > t(0));
}
