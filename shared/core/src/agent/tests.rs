use proptest::prelude::*;

use super::*;
use crate::{
    event::{Marked, Superseded},
    samples,
};

fn instance(n: u8) -> InstanceId {
    InstanceId::new(&format!("instance-{n}")).unwrap()
}

fn profile(n: u8) -> Profile {
    Profile { instance_id: instance(n), ..samples::profile() }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_millis(1_700_000_000_000 + second * 1000)
}

/// A plain status event: no error, no wish, no instance but the current one.
fn change(since: Timestamp) -> StatusChanged {
    StatusChanged {
        by: None,
        code: None,
        message: None,
        deadline: None,
        undrained: false,
        instance_id: None,
        since,
        ..samples::status_changed()
    }
}

fn by(who: &str, since: Timestamp) -> StatusChanged {
    StatusChanged { by: Some(who.to_owned()), ..change(since) }
}

fn superseded(old: u8, new: u8) -> AgentEvent {
    AgentEvent::Superseded(Superseded {
        agent_id: samples::agent(),
        instance_id: instance(old),
        by_instance_id: instance(new),
    })
}

fn mark() -> Marked {
    Marked {
        agent_id: samples::agent(),
        instance_id: None,
        reason: "5 losses in 10 minutes".to_owned(),
        count: Some(5),
        by: None,
    }
}

#[test]
fn a_control_endpoint_of_an_unknown_kind_drives_nobody() {
    for (kind, driven) in [("http", true), ("ssh", false), ("HTTP", false), ("", false)] {
        let control = Endpoint { kind: kind.to_owned(), url: "http://10.0.0.7".to_owned() };
        let mut agent = Agent::unknown(samples::agent());
        agent.profile = Some(Profile { control: Some(control), ..profile(1) });
        assert_eq!(agent.control().is_some(), driven, "{kind}");
    }
}

/// An agent and one event after the other.
struct Story(Agent);

impl Story {
    fn connected() -> Self {
        let mut story = Self(Agent::unknown(samples::agent()));
        story.then(AgentEvent::Registered(profile(1))).then(AgentEvent::Connected(change(at(0))));
        story
    }

    fn then(&mut self, event: AgentEvent) -> &mut Self {
        self.0.evolve(self.0.seq + 1, &event, at(0));
        self
    }
}

#[test]
fn known_from_its_first_event() {
    let mut agent = Agent::unknown(samples::agent());
    assert!(!agent.is_known() && !agent.takes_work());
    assert_eq!((agent.capacity(), agent.pool()), (0, Pool::default()));
    agent.evolve(3, &AgentEvent::Registered(profile(1)), at(1));
    assert!(agent.is_known() && !agent.takes_work(), "registered is no status");
    assert_eq!((agent.seq, agent.capacity(), agent.registered_at), (3, 4, Some(at(1))));
    // An agent without heartbeats has a status and no profile.
    let mut probed = Agent::unknown(samples::agent());
    probed.evolve(1, &AgentEvent::Connected(change(at(0))), at(0));
    assert!(probed.is_known() && probed.takes_work());
}

#[test]
fn its_own_goodbye_is_not_taken_back_until_a_new_instance_registers() {
    let mut agent = Agent::unknown(AgentId::new("a").unwrap());
    agent.evolve(1, &AgentEvent::Registered(profile(1)), at(1));
    agent.evolve(2, &AgentEvent::Gone(by("operator", at(2))), at(2));
    assert_eq!(agent.parting, Some(Parting::Dismissed));
    agent.evolve(3, &AgentEvent::Gone(by("instance", at(3))), at(3));
    assert_eq!(agent.parting, Some(Parting::Goodbye));
    agent.evolve(4, &AgentEvent::Gone(by("operator", at(4))), at(4));
    assert_eq!(agent.parting, Some(Parting::Goodbye), "an operator does not take its own word back");
    agent.evolve(5, &AgentEvent::Registered(profile(2)), at(5));
    assert_eq!(agent.parting, None);
}

#[test]
fn a_past_instance_never_comes_back() {
    let mut story = Story::connected();
    story.then(superseded(1, 2));
    assert!(story.0.is_past(&instance(1)) && !story.0.takes_work(), "before the new one has registered");
    story.then(AgentEvent::Registered(profile(2)));
    assert!(story.0.is_past(&instance(1)) && !story.0.is_past(&instance(2)));
    story.then(AgentEvent::Gone(change(at(1))));
    assert!(story.0.is_past(&instance(2)), "gone is past as well");
    story.then(AgentEvent::Registered(profile(3))).then(AgentEvent::Connected(change(at(2))));
    assert!(story.0.takes_work());
    for n in 1..=2 {
        assert!(story.0.is_past(&instance(n)));
        // Whoever registers it again makes it no younger.
        story.then(AgentEvent::Registered(profile(n))).then(AgentEvent::Connected(change(at(3))));
        assert!(story.0.is_past(&instance(n)) && !story.0.takes_work());
    }
}

#[test]
fn a_new_instance_makes_the_old_one_past_even_without_being_told() {
    let mut story = Story::connected();
    story.then(AgentEvent::Registered(profile(2)));
    assert!(story.0.is_past(&instance(1)));
    // The same instance once more (a replayed registration) does not make it past.
    story.then(AgentEvent::Registered(profile(2)));
    assert!(!story.0.is_past(&instance(2)));
}

#[test]
fn one_silence_from_disconnected_to_error_and_back() {
    let mut story = Story::connected();
    assert_eq!(story.0.silent_since, None);
    story.then(AgentEvent::Disconnected(change(at(10))));
    story.then(AgentEvent::Error(StatusChanged { code: Some("unreachable".into()), ..change(at(20)) }));
    assert_eq!((story.0.silent_since, story.0.since), (Some(at(10)), at(20)));
    assert_eq!(story.0.error_code.as_deref(), Some("unreachable"));
    story.then(AgentEvent::Error(StatusChanged { code: Some("tls".into()), ..change(at(25)) }));
    assert_eq!(story.0.silent_since, Some(at(10)), "another code is the same silence");
    story.then(AgentEvent::Disconnected(change(at(27))));
    assert_eq!(story.0.silent_since, Some(at(10)), "nor did falling back to disconnected end it");
    story.then(AgentEvent::Connected(change(at(30))));
    assert_eq!((story.0.silent_since, story.0.error_code.as_deref()), (None, None));
    story.then(AgentEvent::Error(change(at(40))));
    assert_eq!(story.0.silent_since, Some(at(40)), "an error at once begins a silence");
    story.then(AgentEvent::Degraded(change(at(50))));
    assert_eq!(story.0.silent_since, None);
}

#[test]
fn a_new_instance_begins_no_silence_with_the_old_ones() {
    let mut story = Story::connected();
    story.then(AgentEvent::Disconnected(change(at(10))));
    story.then(AgentEvent::Registered(profile(2)));
    assert_eq!(story.0.silent_since, None);
    story.then(AgentEvent::Error(change(at(60))));
    assert_eq!(story.0.silent_since, Some(at(60)));
}

#[test]
fn a_drain_of_the_instance_ends_with_it() {
    let mut story = Story::connected();
    story.then(AgentEvent::Draining(by("instance", at(1))));
    assert!(!story.0.takes_work());
    assert_eq!(story.0.instance_drain.as_ref().unwrap().since, at(1));
    // Silent and back: the wish stands.
    story.then(AgentEvent::Error(change(at(2)))).then(AgentEvent::Draining(change(at(3))));
    assert_eq!(story.0.instance_drain.as_ref().unwrap().since, at(1));
    assert_eq!(story.0.operator_drain, None);
    story.then(AgentEvent::Registered(profile(2))).then(AgentEvent::Connected(change(at(4))));
    assert!(story.0.takes_work());
}

#[test]
fn an_operators_drain_outlives_instances_until_it_is_taken_back() {
    let mut story = Story::connected();
    let deadline = Some(at(100));
    story.then(AgentEvent::Draining(StatusChanged { deadline, ..by("operator", at(1)) }));
    assert_eq!(story.0.operator_drain.as_ref().unwrap().deadline, deadline);
    story.then(AgentEvent::Registered(profile(2))).then(AgentEvent::Connected(change(at(2))));
    assert!(story.0.operator_drain.is_some() && !story.0.takes_work());
    story.then(AgentEvent::Connected(StatusChanged { undrained: true, ..change(at(3)) }));
    assert!(story.0.operator_drain.is_none() && story.0.takes_work());
    // What the operator takes back is not what the instance said.
    story.then(AgentEvent::Draining(by("instance", at(4)))).then(AgentEvent::Draining(by("operator", at(5))));
    story.then(AgentEvent::Draining(StatusChanged { undrained: true, ..change(at(6)) }));
    assert!(story.0.instance_drain.is_some() && !story.0.takes_work());
}

#[test]
fn only_connected_and_degraded_agents_without_a_mark_take_work() {
    for (status, takes) in [
        (Status::Connected, true),
        (Status::Degraded, true),
        (Status::Disconnected, false),
        (Status::Error, false),
        (Status::Draining, false),
        (Status::Gone, false),
    ] {
        let mut story = Story::connected();
        story.then(AgentEvent::status(status, change(at(1))));
        assert_eq!((story.0.status, story.0.takes_work()), (Some(status), takes));
        assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
    }
    let mut story = Story::connected();
    story.then(AgentEvent::Quarantined(mark()));
    assert!(!story.0.takes_work());
    story.then(AgentEvent::Registered(profile(2))).then(AgentEvent::Connected(change(at(2))));
    assert!(!story.0.takes_work(), "a restart does not release it");
    story.then(AgentEvent::Released(mark()));
    assert!(story.0.takes_work());
    story.then(AgentEvent::Flapping(mark()));
    assert!(story.0.takes_work() && story.0.flapping);
    story.then(AgentEvent::Settled(mark()));
    assert!(!story.0.flapping);
}

#[test]
fn an_update_changes_what_it_is_and_not_how_it_is() {
    let mut story = Story::connected();
    let before = story.0.clone();
    story.then(AgentEvent::Updated(Profile { capacity: 9, pool: Pool::new("gpu").unwrap(), ..profile(1) }));
    assert_eq!((story.0.capacity(), story.0.pool().as_str()), (9, "gpu"));
    let undone = Agent { profile: before.profile.clone(), seq: before.seq, ..story.0.clone() };
    assert_eq!(undone, before);
}

fn event() -> impl Strategy<Value = AgentEvent> {
    let who = prop_oneof![Just(None), Just(Some("operator")), Just(Some("instance"))];
    (0..AgentEvent::NAMES.len(), 0u8..4, 0u8..4, 0i64..1000, who, proptest::bool::weighted(0.2)).prop_map(
        |(kind, n, other, since, who, undrained)| {
            let mut event = samples::agent_events().swap_remove(kind);
            match &mut event {
                AgentEvent::Registered(p) | AgentEvent::Updated(p) => *p = profile(n),
                AgentEvent::Superseded(_) => event = superseded(n, other),
                AgentEvent::Connected(c)
                | AgentEvent::Degraded(c)
                | AgentEvent::Disconnected(c)
                | AgentEvent::Error(c)
                | AgentEvent::Draining(c)
                | AgentEvent::Gone(c) => {
                    *c = StatusChanged { by: who.map(str::to_owned), undrained, ..change(at(since)) };
                }
                AgentEvent::Flapping(_)
                | AgentEvent::Settled(_)
                | AgentEvent::Quarantined(_)
                | AgentEvent::Released(_) => {}
            }
            event
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn no_order_of_events_brings_an_instance_back_or_loses_a_wish(
        entries in proptest::collection::vec((event(), 0u64..3), 0..80),
    ) {
        let mut agent = Agent::unknown(samples::agent());
        let mut log = Vec::new();
        for (event, step) in entries {
            let seq = agent.seq + step;
            let before = agent.clone();
            agent.evolve(seq, &event, at(0));
            if step == 0 {
                prop_assert_eq!(&agent, &before, "a repetition changes nothing");
                continue;
            }
            log.push((seq, event.clone()));
            prop_assert!(before.past.is_subset(&agent.past));
            if agent.takes_work() {
                prop_assert!(agent.instance_id.as_ref().is_none_or(|i| !agent.past.contains(i)));
                prop_assert!(agent.operator_drain.is_none() && agent.instance_drain.is_none());
                prop_assert!(agent.quarantined.is_none() && agent.status.is_some_and(Status::takes_work));
            }
            if agent.silent_since.is_some() {
                prop_assert!(agent.status.is_some_and(Status::is_silent));
            }
            if before.silent_since.is_some() && agent.silent_since.is_some() {
                prop_assert_eq!(before.silent_since, agent.silent_since);
            }
            let undrained = matches!(&event,
                AgentEvent::Connected(c) | AgentEvent::Degraded(c) | AgentEvent::Disconnected(c)
                | AgentEvent::Error(c) | AgentEvent::Draining(c) | AgentEvent::Gone(c) if c.undrained);
            if before.operator_drain.is_some() && agent.operator_drain.is_none() {
                prop_assert!(undrained);
            }
            if before.instance_drain.is_some() && agent.instance_drain.is_none() {
                prop_assert!(matches!(event, AgentEvent::Registered(_)));
            }
        }
        let mut replayed = Agent::unknown(samples::agent());
        for (seq, event) in log.iter().chain(&log) {
            replayed.evolve(*seq, event, at(0));
        }
        prop_assert_eq!(replayed, agent);
    }
}
