//! Two probers over one log: each decides by what it saw itself, and they don't argue.

use proptest::prelude::*;

use super::*;

/// Appends that one piece of evidence may lead to: a takeover takes three, and the other may have something to add.
const STEPS_MAX: usize = 5;

struct Pair {
    probers: [Lab; 2],
    seq: u64,
}

impl Pair {
    /// Two that heard the same first heartbeat, and probe if `probes`.
    fn new(probes: bool) -> Self {
        let mut pair = Self { probers: [Lab::new(), Lab::new()], seq: 0 };
        assert_eq!(pair.beat([true, true], 1), ["agent.registered", "agent.connected"]);
        pair.probers.iter_mut().filter(|_| probes).for_each(Lab::watch);
        pair
    }

    /// A heartbeat that those hear of whom it is said.
    fn beat(&mut self, heard: [bool; 2], seq: u64) -> Vec<&'static str> {
        let json =
            format!(r#"{{"instance_id":"i1","seq":{seq},"state":"ready","executions":[],"capacity":2}}"#);
        for (lab, _) in self.probers.iter_mut().zip(heard).filter(|(_, heard)| *heard) {
            hear(&mut lab.fleet, AGENT, json.as_bytes(), &lab.policy, lab.now).unwrap();
        }
        self.settle()
    }

    fn pass(&mut self, ms: u64) -> Vec<&'static str> {
        for lab in &mut self.probers {
            lab.now = lab.now.plus_ms(ms);
            let (floor, now) = (lab.fleet.floor, lab.now);
            lab.live().miss(floor, 1000, now);
        }
        self.settle()
    }

    /// What the probe of one of them brings.
    fn probed(&mut self, who: usize, evidence: Evidence) -> Vec<&'static str> {
        if let Some(probe) = self.probers[who].live().probe.as_mut() {
            probe.channel.take(evidence, 2);
        }
        self.settle()
    }

    /// A ping about failure `k` was answered to one of them.
    fn vouched(&mut self, who: usize, k: u32) -> Vec<&'static str> {
        let edge = &mut self.probers[who].live().edge;
        (edge.answers, edge.vouched) = (Answers::Yes, k);
        self.settle()
    }

    /// What both write until neither has anything to say.
    fn settle(&mut self) -> Vec<&'static str> {
        let mut types = Vec::new();
        loop {
            let said = (0..2).find_map(|who| match self.probers[who].next() {
                Some(Next::Append(event)) => Some((who, event)),
                _ => None,
            });
            let Some((who, event)) = said else { return types };
            types.push(event.short_type());
            assert!(types.len() <= STEPS_MAX, "they argue: {types:?}");
            self.seq += 1;
            for (n, lab) in self.probers.iter_mut().enumerate() {
                let index = lab.fleet.find_or_add(event.agent_id()).unwrap();
                lab.fleet.apply(index, self.seq, &event, lab.now, n == who);
            }
        }
    }
}

impl Lab {
    fn next(&self) -> Option<Next> {
        let entry = self.fleet.get(self.fleet.find(AGENT)?)?;
        next(&entry.known, &entry.live, None, &self.policy, self.now)
    }
}

#[test]
fn a_late_heartbeat_that_one_notices_before_the_other_is_said_once() {
    let mut pair = Pair::new(false);
    // The second began to see a little later.
    let later = pair.probers[1].now.plus_ms(300);
    pair.probers[1].fleet.restart_clocks(later);
    pair.pass(1250);
    pair.vouched(0, 1);
    assert_eq!(pair.pass(250), ["agent.degraded"]);
    assert_eq!(pair.pass(100), [""; 0]);
    pair.vouched(1, 1);
    assert_eq!(pair.pass(200), [""; 0], "the other one's turn to notice it");
    assert_eq!(pair.beat([true, true], 2), [""; 0]);
    assert_eq!(pair.beat([true, true], 3), ["agent.connected"]);
    // It answered pings and was not heard: that was no sign of life that would put off its silence.
    assert_eq!(pair.pass(1250), [""; 0]);
    pair.vouched(0, 1);
    pair.vouched(1, 1);
    assert_eq!(pair.pass(250), ["agent.degraded"]);
    let now = pair.probers[0].now;
    pair.probers[0].fleet.restart_clocks(now);
    let said = pair.pass(2000);
    assert_eq!(said, ["agent.disconnected", "agent.error"], "by the one that began anew, and by the other");
}

#[test]
fn a_probe_that_one_saw_fail_before_the_other_is_said_once() {
    let mut pair = Pair::new(true);
    for who in 0..2 {
        assert_eq!(pair.probed(who, Evidence::Good), [""; 0]);
    }
    assert_eq!(pair.probed(0, Evidence::Bad(Cause::Status)), ["agent.degraded"]);
    for seq in 2..20 {
        assert_eq!(pair.beat([true, true], seq), [""; 0], "heartbeats say nothing about the probe");
    }
    assert_eq!(pair.probed(1, Evidence::Bad(Cause::Status)), [""; 0]);
    assert_eq!(pair.probed(1, Evidence::Good), [""; 0], "once is not enough");
    assert_eq!(pair.probed(1, Evidence::Good), ["agent.connected"]);
    assert_eq!(pair.probed(0, Evidence::Good), [""; 0]);
    assert_eq!(pair.beat([true, true], 20), [""; 0]);
}

#[test]
fn failures_that_each_saw_once_do_not_add_up() {
    let mut pair = Pair::new(true);
    for who in 0..2 {
        pair.probed(who, Evidence::Good);
    }
    pair.pass(60_000);
    // Silent by its heartbeats: what counts is how often a prober saw the probe fail itself, and three are needed.
    for failure in 1..=2 {
        for who in 0..2 {
            let said = pair.probed(who, Evidence::Bad(Cause::Refused));
            assert!(!said.contains(&"agent.error"), "failure {failure} of prober {who}: {said:?}");
        }
    }
    assert_eq!(pair.probed(1, Evidence::Bad(Cause::Refused)), ["agent.error"]);
}

#[test]
fn two_that_see_different_causes_each_say_theirs_once() {
    let mut pair = Pair::new(true);
    pair.pass(4000);
    let mut said = Vec::new();
    for _ in 0..50 {
        said.extend(pair.probed(0, Evidence::Bad(Cause::Tls)));
        said.extend(pair.probed(1, Evidence::Bad(Cause::Timeout)));
        said.extend(pair.pass(10));
    }
    let errors = said.iter().filter(|kind| **kind == "agent.error").count();
    assert!((1..=2).contains(&errors), "{said:?}");
    // What changes is news again.
    assert_eq!(pair.probed(1, Evidence::Bad(Cause::Auth)), ["agent.error"]);
    assert_eq!(pair.probed(0, Evidence::Bad(Cause::Auth)), [""; 0]);
    assert_eq!(pair.probed(0, Evidence::Bad(Cause::Identity)), ["agent.error"]);
}

#[derive(Debug, Clone)]
enum Step {
    Beat([bool; 2]),
    Pass(u64),
    Probed(usize, Evidence),
    Vouched(usize, u32),
    Void(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let evidence = prop_oneof![
        3 => Just(Evidence::Good),
        1 => Just(Evidence::Slow),
        1 => Just(Evidence::Void),
        2 => Just(Evidence::Bad(Cause::Timeout)),
        1 => Just(Evidence::Bad(Cause::Tls)),
        1 => Just(Evidence::Bad(Cause::Auth)),
    ];
    prop_oneof![
        3 => any::<[bool; 2]>().prop_map(Step::Beat),
        3 => (1u64..1500).prop_map(Step::Pass),
        3 => (0usize..2, evidence).prop_map(|(who, evidence)| Step::Probed(who, evidence)),
        2 => (0usize..2, 1u32..4).prop_map(|(who, k)| Step::Vouched(who, k)),
        1 => (0usize..2).prop_map(Step::Void),
    ]
}

proptest! {
    /// Whatever each of them sees and misses: after every piece of evidence they come to rest.
    #[test]
    fn whatever_two_probers_see_they_do_not_argue(
        probes in any::<bool>(),
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let mut pair = Pair::new(probes);
        for (seq, step) in (2..).zip(steps) {
            match step {
                Step::Beat(heard) => pair.beat(heard, seq),
                Step::Pass(ms) => pair.pass(ms),
                Step::Probed(who, evidence) => pair.probed(who, evidence),
                Step::Vouched(who, k) => pair.vouched(who, k),
                Step::Void(who) => {
                    let now = pair.probers[who].now;
                    pair.probers[who].fleet.restart_clocks(now);
                    pair.settle()
                }
            };
        }
    }
}
