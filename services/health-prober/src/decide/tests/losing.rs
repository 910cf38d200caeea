//! What counts as one loss.

use RecoveryReason::{AgentGone, AgentLost, AgentRestarted, DispatchLost, Orphaned, Stale, Stalled};

use super::*;
use crate::state::{LOSS_WINDOW_MS, LOSSES_MAX};

pub(super) fn loss(
    instance: &str,
    reason: RecoveryReason,
    silent_since: Option<Timestamp>,
    time: Timestamp,
) -> Loss {
    Loss {
        agent_id: AGENT.parse().unwrap(),
        instance_id: instance.parse().unwrap(),
        reason,
        returned: false,
        silent_since,
        time,
    }
}

/// One that lost something like this after another.
fn after<'a>(losses: impl IntoIterator<Item = (&'a str, RecoveryReason, Option<Timestamp>)>) -> Lab {
    let mut lab = Lab::new();
    lab.beat("i9", 1, "");
    for (instance, reason, silent_since) in losses {
        lab.now = lab.now.plus_ms(1);
        lab.lose_as(&loss(instance, reason, silent_since, lab.now));
    }
    lab
}

fn silence(number: i64) -> Option<Timestamp> {
    Some(Timestamp::from_millis(500_000 + number))
}

#[test]
fn one_crash_counts_once_against_those_that_come_after_it_however_much_it_took() {
    for reason in [AgentLost, AgentRestarted, AgentGone] {
        let silent_since = silence(1).filter(|_| reason == AgentLost);
        let lab = after(std::iter::repeat_n(("i1", reason, silent_since), 20));
        assert_eq!(lab.known().losses(lab.now), 1, "{reason:?}");
        assert!(lab.known().agent.takes_work(), "{reason:?}: whoever comes after it gets work");
    }
    // Against the instance itself each counts, as long as it is the one that counts.
    for reason in [AgentLost, AgentGone] {
        let crash = |times| after(std::iter::repeat_n(("i9", reason, None), times));
        assert!(crash(LOSSES_MAX - 1).known().agent.takes_work(), "{reason:?}");
        let mut lab = crash(LOSSES_MAX);
        assert!(lab.known().agent.quarantined.is_some(), "{reason:?}");
        lab.now = lab.now.plus_ms(1);
        let kinds = lab.beat("i10", 1, "");
        assert!(kinds.ends_with(&["agent.released"]), "{reason:?}: {kinds:?}");
        assert!(lab.known().agent.takes_work(), "{reason:?}: its successor has done nothing wrong");
    }
    // Some of it is recovered while it is silent, the rest when its successor is there.
    let mut all = vec![("i1", AgentLost, silence(1)); 10];
    all.extend([("i1", AgentRestarted, None); 10]);
    let lab = after(all);
    assert_eq!(lab.known().losses(lab.now), 1);
}

#[test]
fn five_crashes_are_five_losses() {
    for reason in [AgentLost, AgentRestarted, AgentGone] {
        let instances = ["i1", "i2", "i3", "i4", "i5"];
        let crash = |n: usize| [(instances[n], reason, silence(0).filter(|_| reason == AgentLost)); 3];
        let lab = after((0..LOSSES_MAX - 1).flat_map(crash));
        assert_eq!(lab.known().losses(lab.now), LOSSES_MAX - 1);
        assert!(lab.known().agent.takes_work());
        let lab = after((0..LOSSES_MAX).flat_map(crash));
        assert!(!lab.known().agent.takes_work(), "{reason:?}");
        // Nor does the next one, or the one after that.
        let mut lab = lab;
        for instance in ["i10", "i11"] {
            lab.now = lab.now.plus_ms(1);
            lab.beat(instance, 1, "");
            assert!(lab.known().agent.quarantined.is_some(), "{reason:?} {instance}");
        }
    }
}

#[test]
fn each_silence_of_one_instance_is_a_loss_and_its_end_belongs_to_one_of_them() {
    let silences = |n: i64| (1..=n).flat_map(|n| [("i1", AgentLost, silence(n)); 3]);
    let lab = after(silences(4).chain([("i1", AgentRestarted, None)]));
    assert_eq!(lab.known().losses(lab.now), 4);
    let lab = after(silences(5));
    assert!(!lab.known().agent.takes_work());
}

#[test]
fn what_an_instance_loses_while_it_lives_counts_each() {
    for reason in [Orphaned, DispatchLost, Stalled, Stale] {
        let lab = after(std::iter::repeat_n(("i1", reason, silence(1)), LOSSES_MAX - 1));
        assert!(lab.known().agent.takes_work(), "{reason:?}");
        let lab = after(std::iter::repeat_n(("i1", reason, silence(1)), LOSSES_MAX));
        assert!(!lab.known().agent.takes_work(), "{reason:?}");
    }
}

#[test]
fn it_is_the_same_whatever_is_read_first() {
    // Losses and the agent's own events are two readers' matter, and a start reads both at once.
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    for _ in 0..LOSSES_MAX {
        lab.lose(Orphaned, false);
    }
    lab.now = lab.now.plus_ms(1);
    lab.wish(Some(&Wish::Undrain { reason: "fixed".into() }));
    let released = lab.now;
    lab.now = lab.now.plus_ms(1);
    let mut late = Lab::new();
    (late.log, late.times, late.now) = (lab.log.clone(), lab.times.clone(), lab.now);
    let index = late.fleet.find_or_add(&AGENT.parse().unwrap()).unwrap();
    let known = &mut late.fleet.get_mut(index).unwrap().known;
    known.lose(&loss("i1", Orphaned, None, released));
    known.lose(&loss("i1", Orphaned, None, lab.now));
    let log: Vec<_> = late.log.iter().cloned().zip(late.times.clone()).collect();
    for (seq, (event, time)) in (1..).zip(log) {
        late.fleet.apply(index, seq, &event, time, false);
    }
    lab.lose(Orphaned, false);
    assert_eq!(late.known().losses(late.now), 1, "what it lost since it was released counts");
    assert_eq!(lab.known().losses(lab.now), late.known().losses(late.now));
}

#[test]
fn who_ends_again_and_again_is_not_released_because_the_first_end_is_long_ago() {
    let mut lab = after([]);
    let step_ms = LOSS_WINDOW_MS / 5;
    for instance in ["i1", "i2", "i3", "i4", "i5"] {
        lab.now = lab.now.plus_ms(step_ms);
        lab.lose_as(&loss(instance, AgentRestarted, None, lab.now));
    }
    assert!(lab.known().agent.quarantined.is_some());
    lab.now = lab.now.plus_ms(1);
    lab.beat("i10", 1, "");
    // Four within ten minutes now.
    lab.now = lab.now.plus_ms(step_ms);
    lab.beat("i10", 2, "");
    assert!(lab.known().losses(lab.now) < LOSSES_MAX);
    assert!(lab.known().agent.quarantined.is_some());
    lab.now = lab.now.plus_ms(LOSS_WINDOW_MS);
    assert!(lab.beat("i10", 3, "").ends_with(&["agent.released"]), "ten minutes without a loss");
}
