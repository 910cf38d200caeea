//! Drains: by an operator or by the instance, of agents that are well and of silent ones.

use super::*;

#[test]
fn a_drain_outlives_the_instance_and_hides_alarms_but_not_error() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    let drain = Wish::Drain { reason: "maintenance".into(), deadline: None, in_flight: None };
    assert_eq!(lab.wish(Some(&drain)), (vec!["agent.draining"], Some(Next::Fulfilled)));
    assert_eq!(lab.wish(Some(&drain)).0, [""; 0], "asked twice, said once");
    assert_eq!(lab.pass(2000), [""; 0], "no alarm below the threshold");
    assert_eq!(lab.pass(1500), ["agent.error"]);
    lab.beat("i1", 2, "");
    assert_eq!(lab.beat("i1", 3, ""), ["agent.draining"]);
    assert!(lab.known().agent.operator_drain.is_some());
    assert_eq!(lab.beat("i2", 1, ""), ["agent.superseded", "agent.registered", "agent.draining"]);
    lab.restart();
    assert_eq!(lab.beat("i2", 2, ""), [""; 0]);
    let undrain = Wish::Undrain { reason: "done".into() };
    assert_eq!(lab.wish(Some(&undrain)), (vec!["agent.connected"], Some(Next::Fulfilled)));
    assert!(lab.known().agent.takes_work());
    assert_eq!(lab.wish(Some(&undrain)), (vec![], Some(Next::Fulfilled)));
}

#[test]
fn an_operators_undrain_does_not_undo_the_instances_own() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.wish(Some(&Wish::Drain { reason: "r".into(), deadline: None, in_flight: None }));
    assert_eq!(lab.beat("i1", 2, r#","state":"draining","reason":"sigterm""#), ["agent.draining"]);
    assert_eq!(lab.wish(Some(&Wish::Undrain { reason: "r".into() })).0, ["agent.draining"]);
    assert!(lab.known().agent.operator_drain.is_none());
    assert!(!lab.known().agent.takes_work());
    assert_eq!(lab.beat("i1", 3, ""), [""; 0], "sticky until a new instance");
    assert_eq!(lab.beat("i2", 1, ""), ["agent.superseded", "agent.registered", "agent.connected"]);
}

#[test]
fn a_drain_of_a_silent_agent_does_not_renew_its_silence() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.pass(1500);
    let since = lab.known().agent.silent_since.unwrap();
    lab.pass(3000);
    assert_eq!(lab.status(), Status::Error);
    let drain = Wish::Drain { reason: "r".into(), deadline: None, in_flight: None };
    assert_eq!(lab.wish(Some(&drain)).0, ["agent.draining", "agent.error"]);
    assert_eq!(lab.known().agent.silent_since, Some(since));
    assert_eq!(lab.status(), Status::Error);
}

#[test]
fn drains_of_a_dead_agent_are_no_falls() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.pass(1500);
    lab.pass(2000);
    for minute in 0..3 {
        let deadline = Some(lab.now.plus_ms(minute));
        let drain = Wish::Drain { reason: "r".into(), deadline, in_flight: None };
        assert_eq!(lab.wish(Some(&drain)).0, ["agent.draining", "agent.error"], "drain {minute}");
        lab.pass(1000);
    }
    assert_eq!(lab.known().falls(lab.now), 1, "it fell once");
    // The same by another way: a silence below the threshold that was drained.
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.pass(1500);
    lab.wish(Some(&Wish::Drain { reason: "r".into(), deadline: None, in_flight: None }));
    assert_eq!(lab.pass(2000), ["agent.error"]);
    assert_eq!(lab.known().falls(lab.now), 1);
    // One that fell while it was drained did fall.
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.wish(Some(&Wish::Drain { reason: "r".into(), deadline: None, in_flight: None }));
    lab.pass(3500);
    assert_eq!(lab.known().falls(lab.now), 1);
}

#[test]
fn an_undrain_connects_nobody_who_was_silent_and_not_heard_since() {
    let drain = Wish::Drain { reason: "r".into(), deadline: None, in_flight: None };
    let undrain = Wish::Undrain { reason: "r".into() };
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.pass(1500);
    let since = lab.known().agent.silent_since.unwrap();
    lab.pass(2000);
    lab.restart();
    lab.pass(1000);
    assert_eq!(lab.wish(Some(&drain)).0, ["agent.draining"]);
    assert_eq!(lab.wish(Some(&undrain)).0, ["agent.disconnected"]);
    assert_eq!(lab.known().agent.silent_since, Some(since), "it is as silent as it was");
    assert_eq!(lab.pass(2500), ["agent.error"]);
    assert_eq!(lab.known().agent.silent_since, Some(since));
    // Heard in between, and silent again: a silence of its own.
    lab.wish(Some(&drain));
    lab.beat("i1", 2, "");
    lab.beat("i1", 3, "");
    lab.pass(1500);
    let now = lab.now;
    assert_eq!(lab.wish(Some(&undrain)).0, ["agent.disconnected"]);
    assert_eq!(lab.known().agent.silent_since, Some(now));
    // Silent for us, and our evidence became void before anybody asked.
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.wish(Some(&drain));
    lab.pass(1500);
    lab.fleet.restart_clocks(lab.now);
    lab.pass(100);
    assert_eq!(lab.wish(Some(&undrain)).0, ["agent.disconnected"]);
}

#[test]
fn an_undrain_below_the_threshold_does_not_renew_a_silence() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.pass(1500);
    let since = lab.known().agent.silent_since.unwrap();
    lab.wish(Some(&Wish::Drain { reason: "r".into(), deadline: None, in_flight: None }));
    lab.pass(500);
    assert_eq!(lab.wish(Some(&Wish::Undrain { reason: "r".into() })).0, ["agent.disconnected"]);
    assert_eq!(lab.known().agent.silent_since, Some(since), "lost_after runs from here");
}

#[test]
fn who_was_silent_when_it_was_drained_and_is_well_again_is_not_silent_any_more() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.pass(1500);
    lab.wish(Some(&Wish::Drain { reason: "r".into(), deadline: None, in_flight: None }));
    assert_eq!(lab.beat("i1", 2, ""), [""; 0]);
    assert_eq!(lab.beat("i1", 3, ""), ["agent.draining"], "said once");
    assert_eq!(lab.beat("i1", 4, ""), [""; 0]);
    lab.restart();
    assert_eq!(lab.wish(Some(&Wish::Undrain { reason: "r".into() })).0, ["agent.connected"]);
}

#[test]
fn what_is_to_become_of_the_work_at_the_deadline_is_in_the_log() {
    let drain = |in_flight, deadline| Wish::Drain {
        reason: "r".into(),
        deadline: Some(Timestamp::from_millis(deadline)),
        in_flight,
    };
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    for in_flight in [InFlight::Finish, InFlight::Abort] {
        assert_eq!(lab.wish(Some(&drain(Some(in_flight), 9))).0, ["agent.draining"]);
        assert_eq!(lab.wish(Some(&drain(Some(in_flight), 9))).0, [""; 0], "said once");
    }
    // Neither a new instance nor a new prober changes it, nor a silence in between.
    lab.beat("i2", 1, "");
    lab.pass(3500);
    lab.beat("i2", 2, "");
    lab.beat("i2", 3, "");
    assert_eq!(lab.status(), Status::Draining);
    lab.restart();
    assert_eq!(lab.known().drain_in_flight(), Some(InFlight::Abort));
    // Another drain says it anew, or nothing.
    lab.wish(Some(&drain(None, 10)));
    assert_eq!(lab.known().drain_in_flight(), None);
    lab.wish(Some(&drain(Some(InFlight::Abort), 11)));
    lab.wish(Some(&Wish::Undrain { reason: "r".into() }));
    assert_eq!(lab.known().drain_in_flight(), None);
}
