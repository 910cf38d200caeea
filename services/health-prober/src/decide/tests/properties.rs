//! What holds of one agent whatever is seen of it, in whatever order.

use proptest::prelude::*;

use super::*;

const INTERVAL_MS: u64 = 1000;
/// Of [`Lab::new`]: three failures, the last at three and a half intervals.
const ERROR_AFTER_MS: u64 = 3500;

#[derive(Debug, Clone)]
enum Step {
    Beat(u8, bool),
    Pass(u64),
    Probed(Evidence),
    Vouched(u32),
    NoResponders,
    Void,
    Restart,
    Drain,
    Undrain,
}

/// An agent, and what it has sent.
struct Told {
    lab: Lab,
    probes: bool,
    seq: u64,
    said: Vec<&'static str>,
}

impl Told {
    fn new(probes: bool) -> Self {
        let mut told = Self { lab: Lab::new(), probes, seq: 0, said: Vec::new() };
        told.step(&Step::Beat(1, false));
        if probes {
            told.lab.watch();
        }
        told
    }

    fn step(&mut self, step: &Step) {
        let lab = &mut self.lab;
        let said = match step {
            Step::Beat(instance, labelled) => {
                self.seq += 1;
                let more = if *labelled { r#","labels":{"zone":"b"}"# } else { "" };
                let before = lab.fleet.find(AGENT).map(|_| lab.known().registered_seq);
                let said = lab.beat(&format!("i{instance}"), self.seq, more);
                if self.probes && before != Some(lab.known().registered_seq) {
                    lab.watch();
                }
                said
            }
            Step::Pass(ms) => lab.pass(*ms),
            Step::Probed(evidence) => lab.probed(*evidence),
            Step::Vouched(k) => lab.vouched(*k),
            Step::NoResponders => {
                // It moves the next failure forward, and asks no more than that.
                let (floor, now) = (lab.fleet.floor, lab.now);
                let live = lab.live();
                live.recount(floor);
                let k =
                    crate::state::misses(now.since_ms(live.counted_from) + INTERVAL_MS * 3 / 10, INTERVAL_MS);
                live.beat.fail_to(k, Cause::NoResponders);
                lab.settle()
            }
            Step::Void => {
                lab.fleet.restart_clocks(lab.now);
                lab.settle()
            }
            Step::Restart => {
                lab.restart();
                if self.probes {
                    lab.watch();
                }
                lab.settle()
            }
            Step::Drain => {
                let deadline = Some(lab.now.plus_ms(self.seq));
                lab.wish(Some(&Wish::Drain { reason: "r".into(), deadline, in_flight: None })).0
            }
            Step::Undrain => lab.wish(Some(&Wish::Undrain { reason: "r".into() })).0,
        };
        self.said.extend(said);
    }

    /// Lets time pass, and looks twice an interval.
    fn pass(&mut self, ms: u64) {
        for _ in 0..ms / (INTERVAL_MS / 2) {
            self.step(&Step::Pass(INTERVAL_MS / 2));
        }
    }
}

fn any_evidence() -> impl Strategy<Value = Evidence> {
    prop_oneof![
        2 => Just(Evidence::Good),
        1 => Just(Evidence::Slow),
        1 => Just(Evidence::Void),
        1 => Just(Evidence::Bad(Cause::Timeout)),
        1 => Just(Evidence::Bad(Cause::Refused)),
        1 => Just(Evidence::Bad(Cause::Tls)),
        1 => Just(Evidence::Bad(Cause::Auth)),
    ]
}

/// What an agent that beats in time may go through: nothing of it is its fault.
fn blameless(evidence: impl Strategy<Value = Evidence>) -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any::<bool>().prop_map(|labelled| Step::Beat(1, labelled)),
        4 => (1u64..INTERVAL_MS).prop_map(Step::Pass),
        3 => evidence.prop_map(Step::Probed),
        1 => Just(Step::Void),
        1 => Just(Step::Restart),
    ]
}

fn anything() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u8..4, any::<bool>()).prop_map(|(instance, labelled)| Step::Beat(instance, labelled)),
        4 => (1u64..1500).prop_map(Step::Pass),
        3 => any_evidence().prop_map(Step::Probed),
        1 => (1u32..4).prop_map(Step::Vouched),
        1 => Just(Step::NoResponders),
        1 => Just(Step::Void),
        1 => Just(Step::Restart),
        1 => Just(Step::Drain),
        1 => Just(Step::Undrain),
    ]
}

/// Runs the steps with a heartbeat before each interval is over.
fn in_time(told: &mut Told, steps: &[Step]) {
    let mut quiet = 0;
    for step in steps {
        if let Step::Pass(ms) = step {
            if quiet + ms >= INTERVAL_MS {
                told.step(&Step::Beat(1, false));
                quiet = 0;
            }
            quiet += ms;
        } else if matches!(step, Step::Beat(..)) {
            quiet = 0;
        }
        told.step(step);
    }
}

proptest! {
    #[test]
    fn nothing_is_said_against_who_beats_in_time(
        probes in any::<bool>(),
        steps in prop::collection::vec(
            blameless(prop_oneof![Just(Evidence::Good), Just(Evidence::Void)]),
            0..80,
        ),
    ) {
        let mut told = Told::new(probes);
        in_time(&mut told, &steps);
        let harmless = ["agent.registered", "agent.connected", "agent.updated", "agent.settled"];
        prop_assert!(told.said.iter().all(|kind| harmless.contains(kind)), "{:?}", told.said);
    }

    #[test]
    fn who_beats_in_time_is_never_silent_whatever_its_probe_says(
        steps in prop::collection::vec(blameless(any_evidence()), 0..80),
    ) {
        let mut told = Told::new(true);
        in_time(&mut told, &steps);
        let silent = ["agent.disconnected", "agent.error", "agent.gone"];
        prop_assert!(!told.said.iter().any(|kind| silent.contains(kind)), "{:?}", told.said);
    }

    #[test]
    fn silence_is_error_within_three_and_a_half_intervals_of_the_last_void_and_gone_within_its_bound(
        probes in any::<bool>(),
        before in prop::collection::vec(anything(), 0..60),
        voids in prop::collection::vec((1u64..5000, any::<bool>(), 0u32..4), 0..5),
        cause in prop::sample::select(&[Cause::Dns, Cause::Reset, Cause::Auth, Cause::Identity][..]),
    ) {
        let mut told = Told::new(probes);
        before.iter().for_each(|step| told.step(step));
        for (ms, restarts, k) in voids {
            told.step(&Step::Pass(ms));
            told.step(&if restarts { Step::Restart } else { Step::Void });
            told.step(&Step::Vouched(k));
        }
        told.step(&Step::Void);
        for _ in 0..3 {
            told.step(&Step::Probed(Evidence::Bad(cause)));
        }
        told.pass(ERROR_AFTER_MS);
        let status = told.lab.status();
        prop_assert!(matches!(status, Status::Error | Status::Gone), "{status:?} after {:?}", told.said);
        told.pass(told.lab.policy.forget_after_ms);
        prop_assert_eq!(told.lab.status(), Status::Gone);
    }
}
