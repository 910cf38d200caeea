use rollcall_control::Trust;
use rollcall_core::AgentId;
use rollcall_core::event::RecoveryReason;
use rollcall_core::wire::Endpoint;

use super::*;
use crate::detector::Evidence;
use crate::hear::{Heard, hear};
use crate::state::{Answers, Fleet, LOSS_WINDOW_MS, Listening, Loss, ProbeSeen};

mod drains;
mod flapping;
mod losing;
mod pair;
mod properties;
mod said;

/// One agent whose events are appended to a log that always takes them.
struct Lab {
    fleet: Fleet,
    policy: Policy,
    now: Timestamp,
    seq: u64,
    log: Vec<AgentEvent>,
    /// When each event of the log was appended.
    times: Vec<Timestamp>,
}

const AGENT: &str = "a";

impl Lab {
    fn new() -> Self {
        let policy = Policy {
            interval_ms: 1000,
            failure_threshold: 3,
            success_threshold: 2,
            forget_after_ms: 60_000,
            activity_timeout_ms: None,
        };
        Self {
            fleet: Fleet::default(),
            policy,
            now: Timestamp::from_millis(1_000_000),
            seq: 0,
            log: Vec::new(),
            times: Vec::new(),
        }
    }

    /// Short types of the events that a heartbeat leads to.
    fn beat(&mut self, instance: &str, seq: u64, more: &str) -> Vec<&'static str> {
        let state = if more.contains("state") { "" } else { r#""state":"ready","# };
        let json = format!(
            r#"{{"instance_id":"{instance}","seq":{seq},{state}"executions":[],"capacity":2{more}}}"#
        );
        hear(&mut self.fleet, AGENT, json.as_bytes(), &self.policy, self.now).unwrap();
        self.settle()
    }

    fn heard(&mut self, json: &str) -> Heard {
        hear(&mut self.fleet, AGENT, json.as_bytes(), &self.policy, self.now).unwrap().1
    }

    fn settle(&mut self) -> Vec<&'static str> {
        self.wish(None).0
    }

    fn wish(&mut self, wish: Option<&Wish>) -> (Vec<&'static str>, Option<Next>) {
        let mut types = Vec::new();
        let index = self.fleet.find(AGENT).unwrap();
        let mut wish = wish;
        for _ in 0..20 {
            let entry = self.fleet.get(index).unwrap();
            match next(&entry.known, &entry.live, wish, &self.policy, self.now) {
                Some(Next::Append(event)) => {
                    types.push(event.short_type());
                    self.append(event);
                }
                Some(ended) => {
                    wish = None;
                    let entry = self.fleet.get(index).unwrap();
                    if next(&entry.known, &entry.live, None, &self.policy, self.now).is_none() {
                        return (types, Some(ended));
                    }
                }
                None => return (types, None),
            }
        }
        panic!("does not come to rest: {types:?}");
    }

    fn append(&mut self, event: AgentEvent) {
        self.seq += 1;
        let index = self.fleet.find_or_add(event.agent_id()).unwrap();
        self.fleet.apply(index, self.seq, &event, self.now, true);
        self.log.push(event);
        self.times.push(self.now);
    }

    /// Lets time pass without a heartbeat.
    /// The clock is set forward by so much.
    fn set_clock(&mut self, by_ms: u64) {
        let before = self.now;
        self.now = before.plus_ms(by_ms);
        self.fleet.rebase(before, self.now);
    }

    fn pass(&mut self, ms: u64) -> Vec<&'static str> {
        self.now = self.now.plus_ms(ms);
        let floor = self.fleet.floor;
        let index = self.fleet.find(AGENT).unwrap();
        let entry = self.fleet.get_mut(index).unwrap();
        entry.live.miss(floor, 1000, self.now);
        self.settle()
    }

    fn known(&self) -> &Known {
        &self.fleet.get(self.fleet.find(AGENT).unwrap()).unwrap().known
    }

    fn status(&self) -> Status {
        self.known().agent.status.unwrap()
    }

    fn live(&mut self) -> &mut Live {
        let index = self.fleet.find(AGENT).unwrap();
        &mut self.fleet.get_mut(index).unwrap().live
    }

    /// Has it probed from now on, as after its registration or a start of ours.
    fn watch(&mut self) {
        let known = self.known();
        let silent = known.agent.status.is_some_and(Status::is_silent) && !known.is_fresh();
        self.live().probe = Some(Box::new(ProbeSeen {
            endpoint: Endpoint { kind: "http".to_owned(), url: "http://agent:1".to_owned() },
            instance_id: "i1".parse().unwrap(),
            trust: Trust::Agent,
            generation: 1,
            channel: if silent { Channel::bad() } else { Channel::default() },
            listening: Listening::default(),
            result: String::new(),
            checked_at: None,
            latency_ms: None,
        }));
    }

    /// What its probe brings.
    fn probed(&mut self, evidence: Evidence) -> Vec<&'static str> {
        if let Some(probe) = self.live().probe.as_mut() {
            probe.channel.take(evidence, 2);
        }
        self.settle()
    }

    /// A ping about failure `k` was answered.
    fn vouched(&mut self, k: u32) -> Vec<&'static str> {
        let edge = &mut self.live().edge;
        (edge.answers, edge.vouched) = (Answers::Yes, k);
        self.settle()
    }

    /// What a loss of its first instance leads to.
    fn lose(&mut self, reason: RecoveryReason, returned: bool) -> Vec<&'static str> {
        let silent_since = None;
        self.lose_as(&Loss { returned, ..losing::loss("i1", reason, silent_since, self.now) })
    }

    fn lose_as(&mut self, loss: &Loss) -> Vec<&'static str> {
        let index = self.fleet.find(AGENT).unwrap();
        self.fleet.get_mut(index).unwrap().known.lose(loss);
        self.settle()
    }

    /// The prober is started again: only the log is left.
    fn restart(&mut self) {
        let log = std::mem::take(&mut self.log);
        self.fleet = Fleet::default();
        self.seq = 0;
        self.times.truncate(log.len());
        for (event, time) in log.into_iter().zip(&self.times) {
            self.seq += 1;
            let index = self.fleet.find_or_add(event.agent_id()).unwrap();
            self.fleet.apply(index, self.seq, &event, *time, false);
            self.log.push(event);
        }
        self.fleet.restart_clocks(self.now);
    }
}

#[test]
fn the_first_heartbeat_registers_and_connects_and_the_next_ones_are_steady() {
    let mut lab = Lab::new();
    assert_eq!(lab.beat("i1", 1, ""), ["agent.registered", "agent.connected"]);
    let index = lab.fleet.find(AGENT).unwrap();
    lab.fleet.get_mut(index).unwrap().live.settled = true;
    let json = r#"{"instance_id":"i1","seq":2,"state":"ready","capacity":2,"executions":[]}"#;
    assert_eq!(lab.heard(json), Heard::Steady);
    assert_eq!(lab.heard(json), Heard::Replay);
    assert_eq!(lab.beat("i1", 3, r#","labels":{"zone":"b"}"#), ["agent.updated"]);
    assert_eq!(lab.beat("i1", 4, r#","labels": {"zone": "b"}"#), [""; 0], "only the spaces differ");
}

#[test]
fn silence_is_disconnected_at_one_and_a_half_intervals_and_error_at_three_and_a_half() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    assert_eq!(lab.pass(1499), [""; 0]);
    assert_eq!(lab.pass(1), ["agent.disconnected"]);
    assert_eq!(lab.pass(1999), [""; 0]);
    assert_eq!(lab.pass(1), ["agent.error"]);
    assert_eq!(lab.known().agent.error_code.as_deref(), Some("unreachable"));
    let since = lab.known().agent.silent_since.unwrap();
    assert_eq!(since, Timestamp::from_millis(1_001_500), "one silence, since disconnected");
    assert_eq!(lab.beat("i1", 2, ""), [""; 0], "one success is not enough");
    assert_eq!(lab.beat("i1", 3, ""), ["agent.connected"]);
    assert_eq!(lab.known().agent.reason, "recovered");
}

#[test]
fn void_starts_the_clock_again() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.now = lab.now.plus_ms(60_000);
    lab.fleet.restart_clocks(lab.now);
    assert_eq!(lab.pass(1400), [""; 0], "a minute of our own deafness counts for nothing");
    assert_eq!(lab.pass(100), ["agent.disconnected"]);
    lab.fleet.restart_clocks(lab.now);
    assert_eq!(lab.pass(3400), [""; 0], "what was counted before the void does not add up");
    assert_eq!(lab.pass(100), ["agent.error"]);
}

#[test]
fn a_silence_that_the_log_did_not_take_before_a_void_is_forgotten() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.now = lab.now.plus_ms(2_000);
    let (index, floor, now) = (lab.fleet.find(AGENT).unwrap(), lab.fleet.floor, lab.now);
    lab.fleet.get_mut(index).unwrap().live.miss(floor, 1_000, now);
    let entry = lab.fleet.get(index).unwrap();
    let decided = next(&entry.known, &entry.live, None, &lab.policy, now);
    assert!(matches!(decided, Some(Next::Append(AgentEvent::Disconnected(_)))), "{decided:?}");
    // The log is away with the bus, and when both are back it has beaten all the time.
    lab.fleet.void(lab.now);
    assert_eq!(lab.settle(), [""; 0]);
    lab.fleet.restart_clocks(lab.now);
    assert_eq!(lab.pass(1_499), [""; 0]);
    assert_eq!(lab.pass(1), ["agent.disconnected"]);
    // What the log says stands, until the agent itself is heard.
    lab.fleet.void(lab.now);
    assert_eq!((lab.settle(), lab.status()), (vec![], Status::Disconnected));
}

#[test]
fn nobody_is_forgotten_for_what_was_counted_before_a_void() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.pass(1500);
    lab.pass(2000);
    assert_eq!(lab.status(), Status::Error);
    lab.now = lab.now.plus_ms(60_000);
    lab.fleet.restart_clocks(lab.now);
    assert_eq!(lab.pass(1000), [""; 0], "due to be forgotten, but we were deaf meanwhile");
    assert_eq!(lab.pass(2500), ["agent.gone"]);
}

#[test]
fn a_new_instance_supersedes_and_the_old_one_never_counts_again() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.pass(4000);
    assert_eq!(lab.status(), Status::Error);
    assert_eq!(
        lab.beat("i2", 1, ""),
        ["agent.superseded", "agent.registered", "agent.connected"],
        "a new instance connects at once"
    );
    let old = r#"{"instance_id":"i1","seq":99,"state":"ready","capacity":2,"executions":[]}"#;
    assert_eq!(lab.heard(old), Heard::Past("i1".parse().unwrap()));
    assert_eq!(lab.settle(), [""; 0]);
    lab.restart();
    assert_eq!(lab.heard(old), Heard::Past("i1".parse().unwrap()), "not after a restart either");
    assert_eq!(told(lab.known(), &"i1".parse().unwrap()), "superseded");
}

#[test]
fn the_newest_instance_wins_although_the_old_one_speaks_while_that_is_on_its_way_into_the_log() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    let beat = |instance: &str, seq: u64| {
        format!(r#"{{"instance_id":"{instance}","seq":{seq},"state":"ready","capacity":2,"executions":[]}}"#)
    };
    lab.heard(&beat("i2", 1));
    lab.heard(&beat("i1", 2));
    assert_eq!(lab.settle(), ["agent.superseded", "agent.registered", "agent.connected"]);
    assert_eq!(lab.known().agent.instance_id, Some("i2".parse().unwrap()));
}

#[test]
fn a_crash_between_the_steps_of_a_takeover_is_finished_by_the_next_heartbeat() {
    for keep in 2..=4 {
        let mut lab = Lab::new();
        lab.beat("i1", 1, "");
        lab.beat("i2", 1, "");
        lab.log.truncate(keep);
        lab.restart();
        lab.beat("i2", 2, "");
        let types: Vec<_> = lab.log.iter().map(AgentEvent::short_type).collect();
        assert_eq!(
            types,
            [
                "agent.registered",
                "agent.connected",
                "agent.superseded",
                "agent.registered",
                "agent.connected"
            ],
            "kept {keep}"
        );
    }
}

#[test]
fn gone_is_final_for_the_instance_and_a_new_one_comes_back() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    assert_eq!(lab.beat("i1", 2, r#","state":"draining","reason":"sigterm""#), ["agent.draining"]);
    assert_eq!(lab.known().agent.reason, "sigterm");
    assert_eq!(lab.beat("i1", 3, r#","state":"gone","reason":"sigterm""#), ["agent.gone"]);
    let again = r#"{"instance_id":"i1","seq":4,"state":"ready","capacity":2,"executions":[]}"#;
    assert_eq!(lab.heard(again), Heard::Past("i1".parse().unwrap()));
    assert_eq!(lab.pass(600_000), [""; 0]);
    lab.restart();
    assert_eq!(lab.heard(again), Heard::Past("i1".parse().unwrap()));
    assert_eq!(lab.pass(600_000), [""; 0]);
    assert_eq!(lab.beat("i2", 1, ""), ["agent.registered", "agent.connected"], "nobody is superseded");
}

#[test]
fn a_goodbye_of_nobody_registers_nobody() {
    let mut lab = Lab::new();
    let gone = r#"{"instance_id":"i0","seq":9,"state":"gone","capacity":2,"executions":[]}"#;
    assert_eq!(lab.heard(gone), Heard::Stranger("i0".parse().unwrap()));
    assert!(lab.fleet.is_empty());
    lab.beat("i1", 1, "");
    assert_eq!(lab.heard(gone), Heard::Stranger("i0".parse().unwrap()));
    assert_eq!(lab.settle(), [""; 0], "a late goodbye of an unknown instance supersedes nobody");
}

#[test]
fn a_restart_does_not_condemn_an_agent_that_beats_for_its_probe() {
    for cause in [Cause::Auth, Cause::Refused, Cause::Status, Cause::Timeout] {
        let mut lab = Lab::new();
        lab.beat("i1", 1, "");
        lab.watch();
        assert_eq!(lab.probed(Evidence::Bad(cause)), ["agent.degraded"]);
        lab.restart();
        lab.watch();
        for _ in 0..4 {
            assert_eq!(lab.probed(Evidence::Bad(cause)), [""; 0], "{cause:?}");
        }
        lab.pass(1000);
        assert_eq!(lab.beat("i1", 2, ""), [""; 0], "{cause:?}");
        assert_eq!(lab.status(), Status::Degraded);
        assert_eq!(lab.known().falls(lab.now), 0);
    }
}

#[test]
fn who_answers_pings_and_does_not_beat_is_in_error_once_and_stays_so() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    for k in 1..=3 {
        lab.pass(900);
        lab.vouched(k);
        lab.pass(if k == 1 { 600 } else { 100 });
    }
    assert_eq!(lab.status(), Status::Error);
    assert_eq!(lab.known().agent.error_code.as_deref(), Some("protocol"));
    // Nobody is pinged beyond the threshold.
    for _ in 0..5 {
        assert_eq!(lab.pass(1000), [""; 0]);
    }
    assert_eq!(lab.known().agent.error_code.as_deref(), Some("protocol"));
}

#[test]
fn what_it_said_of_itself_while_something_older_was_on_its_way_into_the_log_is_not_lost() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    let capacity = |seq: u64, capacity: u32| {
        format!(r#"{{"instance_id":"i1","seq":{seq},"state":"ready","executions":[],"capacity":{capacity}}}"#)
    };
    lab.heard(&capacity(2, 4));
    let entry = lab.fleet.get(0).unwrap();
    let Some(Next::Append(on_its_way)) = next(&entry.known, &entry.live, None, &lab.policy, lab.now) else {
        panic!("nothing to append");
    };
    lab.heard(&capacity(3, 2));
    lab.append(on_its_way);
    assert_eq!(lab.known().agent.capacity(), 4);
    lab.heard(&capacity(4, 2));
    assert_eq!(lab.settle(), ["agent.updated"]);
    assert_eq!(lab.known().agent.capacity(), 2);
}

#[test]
fn error_survives_a_restart_and_is_not_forgotten_before_it_is_silent_again() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.pass(1500);
    lab.pass(2000);
    lab.now = lab.now.plus_ms(10_000_000);
    lab.restart();
    assert_eq!(lab.settle(), [""; 0]);
    assert_eq!(lab.status(), Status::Error);
    assert_eq!(lab.pass(1500), [""; 0], "error does not become disconnected, and nothing is forgotten yet");
    assert_eq!(lab.pass(2000), ["agent.gone"]);
    assert_eq!(lab.known().agent.reason, "forgotten");
}

#[test]
fn a_restart_over_a_healthy_fleet_condemns_nobody() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    lab.now = lab.now.plus_ms(10_000_000);
    lab.restart();
    assert_eq!(lab.pass(1000), [""; 0]);
    assert_eq!(lab.beat("i1", 1, ""), [""; 0]);
}

#[test]
fn another_probers_verdict_is_taken_over() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    let index = lab.fleet.find(AGENT).unwrap();
    let entry = lab.fleet.get(index).unwrap();
    let event = AgentEvent::Disconnected(changed(&entry.known, &entry.live, "missed_heartbeat", lab.now));
    lab.seq += 1;
    lab.fleet.apply(index, lab.seq, &event, lab.now, false);
    assert_eq!(lab.settle(), [""; 0], "no quarrel about it");
    assert_eq!(lab.beat("i1", 2, ""), [""; 0]);
    assert_eq!(lab.beat("i1", 3, ""), ["agent.connected"]);
}

#[test]
fn four_falls_are_flapping_once_and_then_it_takes_more_to_be_believed() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    let mut seen = Vec::new();
    let mut seq = 1;
    for _ in 0..5 {
        seen.extend(lab.pass(1500));
        for _ in 0..6 {
            seq += 1;
            seen.extend(lab.beat("i1", seq, ""));
        }
    }
    let flapping = seen.iter().filter(|kind| **kind == "agent.flapping").count();
    assert_eq!(flapping, 1, "{seen:?}");
    lab.pass(1500);
    for step in 0..5 {
        seq += 1;
        assert_eq!(lab.beat("i1", seq, ""), [""; 0], "success {step} of six");
    }
    seq += 1;
    assert_eq!(lab.beat("i1", seq, ""), ["agent.connected"]);
    lab.now = lab.now.plus_ms(301_000);
    seq += 1;
    assert_eq!(lab.beat("i1", seq, ""), [""; 0], "six falls weigh more than four");
    lab.now = lab.now.plus_ms(100_000);
    seq += 1;
    assert_eq!(lab.beat("i1", seq, ""), ["agent.settled"]);
}

#[test]
fn a_new_instance_answers_for_no_fall_of_the_old_one() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    let mut seq = 1;
    for _ in 0..FLAP_FALLS {
        lab.pass(1500);
        for _ in 0..6 {
            seq += 1;
            lab.beat("i1", seq, "");
        }
    }
    assert!(lab.known().agent.flapping);
    lab.beat("i2", 1, "");
    assert!(!lab.known().agent.flapping, "its mark goes with it");
    // One fall of its own: it is believed again after two successes, as anybody is.
    assert_eq!(lab.pass(1500), ["agent.disconnected"]);
    assert_eq!(lab.beat("i2", 2, ""), [""; 0]);
    assert_eq!(lab.beat("i2", 3, ""), ["agent.connected"]);
}

#[test]
fn losing_work_again_and_again_is_quarantined_and_lifted() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    for _ in 0..9 {
        assert_eq!(lab.lose(RecoveryReason::TimedOut, false), [""; 0]);
        assert_eq!(lab.lose(RecoveryReason::AgentGone, true), [""; 0]);
    }
    for _ in 0..4 {
        assert_eq!(lab.lose(RecoveryReason::Orphaned, false), [""; 0]);
    }
    assert_eq!(lab.lose(RecoveryReason::Stalled, false), ["agent.quarantined"]);
    assert!(!lab.known().agent.takes_work());
    assert_eq!(lab.status(), Status::Connected, "its health is another matter");
    assert_eq!(lab.wish(Some(&Wish::Undrain { reason: "fixed".into() })).0, ["agent.released"]);
    for _ in 0..5 {
        lab.now = lab.now.plus_ms(1);
        lab.lose(RecoveryReason::Orphaned, false);
    }
    assert!(lab.known().agent.quarantined.is_some());
    lab.now = lab.now.plus_ms(599_000);
    lab.beat("i1", 2, "");
    assert!(lab.known().agent.quarantined.is_some());
    lab.now = lab.now.plus_ms(2_000);
    assert_eq!(lab.beat("i1", 3, ""), ["agent.released"]);
}

#[test]
fn what_was_long_ago_stays_so_when_the_clock_is_set() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    for _ in 0..10 {
        assert_eq!(lab.lose(RecoveryReason::Orphaned, false), [""; 0]);
        lab.now = lab.now.plus_ms(LOSS_WINDOW_MS / 4);
    }
    lab.now = lab.now.plus_ms(LOSS_WINDOW_MS);
    lab.set_clock(2_000);
    assert_eq!(lab.known().losses(lab.now), 0);
    assert_eq!(lab.settle(), [""; 0], "it has not lost anything for long");
}

#[test]
fn a_clock_that_is_set_forward_lifts_no_quarantine_and_forgets_nobody() {
    const JUMP_MS: u64 = 10_000_000;
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    for _ in 0..4 {
        lab.lose(RecoveryReason::Orphaned, false);
    }
    assert_eq!(lab.lose(RecoveryReason::Orphaned, false), ["agent.quarantined"]);
    lab.pass(3500);
    assert_eq!(lab.status(), Status::Error);
    lab.set_clock(JUMP_MS);
    for _ in 0..59 {
        assert_eq!(lab.pass(1000), [""; 0]);
    }
    assert_eq!(lab.pass(1000), ["agent.gone"], "a minute by the new clock");
    assert_eq!(lab.known().falls(lab.now), 1);
    lab.now = lab.now.plus_ms(539_000);
    assert_eq!(lab.settle(), [""; 0]);
    lab.now = lab.now.plus_ms(1000);
    assert_eq!(lab.settle(), ["agent.released"], "ten minutes by the new clock");
}

#[test]
fn a_forgotten_agent_is_gone_for_this_instance() {
    let mut lab = Lab::new();
    lab.beat("i1", 1, "");
    let forget = Wish::Forget { reason: "forgotten".into() };
    assert_eq!(lab.wish(Some(&forget)), (vec!["agent.gone"], Some(Next::Fulfilled)));
    assert_eq!(lab.wish(Some(&forget)), (vec![], Some(Next::Fulfilled)));
    let drain = Wish::Drain { reason: "r".into(), deadline: None, in_flight: None };
    assert!(matches!(lab.wish(Some(&drain)).1, Some(Next::Refused(_))));
    assert_eq!(lab.status(), Status::Gone);
}

#[test]
fn what_can_not_be_read_changes_nothing() {
    let mut lab = Lab::new();
    for bad in [
        "",
        "{}",
        r#"{"instance_id":"i","seq":1,"state":"ready","capacity":1,"executions":[],"labels":[1]}"#,
        r#"{"instance_id":"i","seq":1,"state":"ready","capacity":1,"executions":[],"probe":7}"#,
        r#"{"instance_id":"file-1","seq":1,"state":"ready","capacity":1,"executions":[]}"#,
    ] {
        assert!(hear(&mut lab.fleet, AGENT, bad.as_bytes(), &lab.policy, lab.now).is_err(), "{bad}");
        assert!(lab.fleet.is_empty(), "{bad}");
    }
    let good = r#"{"instance_id":"i","seq":1,"state":"ready","capacity":1,"executions":[]}"#;
    for bad_agent in ["", "a b", "*"] {
        assert!(hear(&mut lab.fleet, bad_agent, good.as_bytes(), &lab.policy, lab.now).is_err());
    }
    lab.beat("i1", 1, "");
    let bad = r#"{"instance_id":"i1","seq":2,"state":"ready","capacity":1,"executions":[],"labels":7}"#;
    assert!(hear(&mut lab.fleet, AGENT, bad.as_bytes(), &lab.policy, lab.now).is_err());
    assert_eq!(lab.fleet.get(0).unwrap().live.seq, 1, "it does not count as a sign of life either");
    assert!(AgentId::new(AGENT).is_ok());
}

#[test]
fn an_agent_fits_its_share_of_memory() {
    // A kibibyte per agent at a million of them (BENCHMARKS.md). What hangs off it is the size of its texts.
    let entry = std::mem::size_of::<crate::state::Entry>();
    assert!(entry <= 800, "{entry} bytes");
}

#[test]
fn an_agent_that_left_the_file_is_gone_however_often_the_log_refuses_that() {
    let mut lab = Lab::new();
    let index = lab.fleet.find_or_add(&AgentId::new(AGENT).unwrap()).unwrap();
    let instance: rollcall_core::InstanceId = "file-1".parse().unwrap();
    let row = crate::agents_file::parse(
        "[[agents]]\nagent_id = \"a\"\ncapacity = 1\nprobe = { kind = \"tcp\", url = \"h:1\" }",
    )
    .unwrap();
    let live = &mut lab.fleet.get_mut(index).unwrap().live;
    live.meet(instance.clone(), lab.now);
    live.profile = Some(Box::new(row.agents[0].profile(instance)));
    assert_eq!(lab.settle(), ["agent.registered"]);
    lab.fleet.get_mut(index).unwrap().live.removed = true;
    for _ in 0..3 {
        // Not appended: it is decided again.
        let entry = lab.fleet.get(index).unwrap();
        let Some(Next::Append(AgentEvent::Gone(change))) =
            next(&entry.known, &entry.live, None, &lab.policy, lab.now)
        else {
            panic!("it is not in the file");
        };
        assert_eq!(
            (change.reason.as_str(), change.by.as_deref()),
            ("removed from the agents file", Some("operator"))
        );
    }
    assert_eq!(lab.settle(), ["agent.gone"]);
    // Somebody who beats is in no file.
    lab.beat("i1", 1, "");
    lab.fleet.get_mut(index).unwrap().live.removed = true;
    assert_eq!(lab.settle(), Vec::<&str>::new());
}
