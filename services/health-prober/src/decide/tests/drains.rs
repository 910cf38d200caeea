//! Drains: by an operator or by the instance, of agents that are well and of silent ones.

use super::*;

#[test]
fn a_drain_outlives_the_instance_and_hides_alarms_but_not_error() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    let drain = Wish::Drain { reason: "maintenance".into(), deadline: None };
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
    lab.wish(Some(&Wish::Drain { reason: "r".into(), deadline: None }));
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
    let drain = Wish::Drain { reason: "r".into(), deadline: None };
    assert_eq!(lab.wish(Some(&drain)).0, ["agent.draining", "agent.error"]);
    assert_eq!(lab.known().agent.silent_since, Some(since));
    assert_eq!(lab.status(), Status::Error);
}
