use proptest::prelude::*;

use super::*;

const FAILURES: u32 = 3;
const SUCCESSES: u32 = 2;

fn channel(evidence: &[Evidence]) -> Channel {
    let mut channel = Channel::default();
    for one in evidence {
        channel.take(*one, SUCCESSES);
    }
    channel
}

/// An agent as the detector alone sees it: the status follows every judgement.
#[derive(Debug, Clone, Default)]
struct Subject {
    channels: Channels,
    status: Option<Status>,
}

impl Subject {
    fn with(beat: bool, probe: bool) -> Self {
        let mut subject = Self::default();
        subject.channels.beat = beat.then(Channel::default);
        subject.channels.probe = probe.then(Channel::default);
        subject
    }

    fn beat(&mut self, evidence: Evidence) -> Option<Status> {
        if let Some(beat) = &mut self.channels.beat {
            beat.take(evidence, SUCCESSES);
        }
        self.settle()
    }

    fn probe(&mut self, evidence: Evidence) -> Option<Status> {
        if let Some(probe) = &mut self.channels.probe {
            probe.take(evidence, SUCCESSES);
        }
        self.settle()
    }

    fn settle(&mut self) -> Option<Status> {
        if let Some(health) = judge(&self.channels, FAILURES, self.status) {
            self.status = Some(health.status());
        }
        self.status
    }
}

use Evidence::{Absent, Bad, Good, Slow, Void};
use Status::{Connected, Degraded, Disconnected, Error};

#[test]
fn one_channel_rises_and_falls_by_the_thresholds() {
    let table: [(&[Evidence], &[Option<Status>]); 8] = [
        // The first heartbeat connects at once.
        (&[Good], &[Some(Connected)]),
        (&[Void], &[None]),
        (
            &[Good, Absent, Absent, Absent],
            &[Some(Connected), Some(Disconnected), Some(Disconnected), Some(Error)],
        ),
        // After bad the success threshold counts.
        (
            &[Good, Absent, Good, Good],
            &[Some(Connected), Some(Disconnected), Some(Disconnected), Some(Connected)],
        ),
        // A success in between starts the failures anew, and error stays error until it is over.
        (
            &[Good, Absent, Absent, Absent, Good, Absent, Good, Good],
            &[
                Some(Connected),
                Some(Disconnected),
                Some(Disconnected),
                Some(Error),
                Some(Error),
                Some(Error),
                Some(Error),
                Some(Connected),
            ],
        ),
        // Void between failures starts the count again.
        (
            &[Good, Absent, Absent, Void, Absent, Absent, Absent],
            &[
                Some(Connected),
                Some(Disconnected),
                Some(Disconnected),
                Some(Disconnected),
                Some(Disconnected),
                Some(Disconnected),
                Some(Error),
            ],
        ),
        (&[Slow, Good], &[Some(Degraded), Some(Connected)]),
        // A refusal to let us in is certain at once.
        (&[Good, Bad(Cause::Auth)], &[Some(Connected), Some(Error)]),
    ];
    for (row, (evidence, wanted)) in table.into_iter().enumerate() {
        let mut subject = Subject::with(true, false);
        for (step, (one, want)) in evidence.iter().zip(wanted).enumerate() {
            assert_eq!(subject.beat(*one), *want, "row {row}, step {step}");
        }
    }
}

#[test]
fn one_of_two_bad_channels_degrades_and_both_are_silence() {
    let mut subject = Subject::with(true, true);
    assert_eq!(subject.beat(Good), Some(Connected), "a probe that was not made yet says nothing");
    assert_eq!(subject.probe(Bad(Cause::Refused)), Some(Degraded));
    assert_eq!(subject.probe(Bad(Cause::Refused)), Some(Degraded));
    assert_eq!(subject.probe(Bad(Cause::Auth)), Some(Degraded), "it beats: it is there");
    assert_eq!(subject.beat(Absent), Some(Disconnected), "bad together once");
    assert_eq!(subject.beat(Absent), Some(Disconnected));
    assert_eq!(subject.beat(Absent), Some(Error));
    assert_eq!(judge(&subject.channels, FAILURES, subject.status), Some(Health::Error(Cause::Auth)));
    assert_eq!(subject.beat(Good), Some(Error));
    assert_eq!(subject.beat(Good), Some(Degraded));
    assert_eq!(subject.probe(Good), Some(Degraded));
    assert_eq!(subject.probe(Good), Some(Connected));
}

#[test]
fn a_bad_probe_says_nothing_of_an_agent_that_beats_before_its_heartbeat_was_heard_or_missed() {
    for status in [None, Some(Connected), Some(Degraded), Some(Status::Draining)] {
        for cause in CAUSES {
            let mut subject = Subject { status, ..Subject::with(true, true) };
            for _ in 0..2 * FAILURES {
                assert_eq!(subject.probe(Bad(cause)), status, "{cause:?}");
            }
            assert_eq!(subject.beat(Good), Some(Degraded), "{cause:?}: it beats");
            let mut subject = Subject { status, ..Subject::with(true, true) };
            subject.probe(Bad(cause));
            assert_eq!(subject.beat(Absent), Some(Disconnected), "{cause:?}: it does not beat either");
        }
    }
}

#[test]
fn an_answered_ping_delays_disconnected_but_never_error_and_never_raises() {
    let mut channels = Channels { beat: Some(channel(&[Good, Absent])), vouched: true, probe: None };
    assert_eq!(judge(&channels, FAILURES, Some(Connected)), Some(Health::Degraded("heartbeat_late")));
    assert_eq!(
        judge(&channels, FAILURES, Some(Disconnected)),
        Some(Health::Disconnected(Cause::MissedHeartbeat))
    );
    channels.beat = Some(channel(&[Good, Absent, Absent, Absent]));
    assert_eq!(judge(&channels, FAILURES, Some(Degraded)), Some(Health::Error(Cause::Protocol)));
    channels.vouched = false;
    assert_eq!(judge(&channels, FAILURES, Some(Degraded)), Some(Health::Error(Cause::MissedHeartbeat)));
}

#[test]
fn a_restarted_prober_keeps_error_until_the_success_threshold() {
    let mut channels = Channels { beat: Some(Channel::bad()), ..Channels::default() };
    for status in [None, Some(Error), Some(Disconnected), Some(Status::Draining)] {
        assert_eq!(judge(&channels, FAILURES, status), None, "nothing was seen yet: {status:?}");
    }
    channels.beat = channels.beat.map(|mut beat| {
        beat.take(Absent, SUCCESSES);
        beat
    });
    assert_eq!(judge(&channels, FAILURES, Some(Error)), None, "error does not turn into disconnected");
}

fn harmless() -> impl Strategy<Value = Evidence> {
    prop_oneof![Just(Good), Just(Void)]
}

/// What people read in events, messages and metrics.
#[test]
fn every_cause_is_said_by_a_name_of_its_own() {
    let all: Vec<Cause> = CAUSES.into_iter().chain([Cause::NotProbed]).collect();
    for cause in &all {
        assert_eq!(serde_json::json!(cause), cause.as_str());
        assert_eq!(Health::Error(*cause).reason(), cause.as_str());
    }
    let names: std::collections::HashSet<&str> = all.iter().map(|cause| cause.as_str()).collect();
    assert_eq!(names.len(), all.len(), "{names:?}");
}

const CAUSES: [Cause; 11] = [
    Cause::MissedHeartbeat,
    Cause::NoResponders,
    Cause::Dns,
    Cause::Refused,
    Cause::Reset,
    Cause::Timeout,
    Cause::Status,
    Cause::Tls,
    Cause::Protocol,
    Cause::Auth,
    Cause::Identity,
];

fn bad() -> impl Strategy<Value = Evidence> {
    prop_oneof![1 => Just(Absent), 4 => prop::sample::select(&CAUSES[..]).prop_map(Bad)]
}

fn anything() -> impl Strategy<Value = Evidence> {
    prop_oneof![Just(Good), Just(Slow), Just(Void), bad()]
}

/// An agent that beats, one that is probed, and one that does both.
fn subject() -> impl Strategy<Value = Subject> {
    prop::sample::select(&[(true, false), (false, true), (true, true)][..])
        .prop_map(|(beat, probe)| Subject::with(beat, probe))
}

proptest! {
    #[test]
    fn only_good_and_void_never_leads_to_a_verdict(
        mut subject in subject(),
        evidence in prop::collection::vec((any::<bool>(), any::<bool>(), harmless()), 0..60),
    ) {
        for (on_probe, vouched, one) in evidence {
            subject.channels.vouched = vouched;
            let status = if on_probe { subject.probe(one) } else { subject.beat(one) };
            prop_assert!(matches!(status, None | Some(Connected)), "{status:?}");
        }
    }

    #[test]
    fn an_agent_that_beats_is_never_silent_whatever_its_probe_says(
        evidence in prop::collection::vec(
            prop_oneof![
                harmless().prop_map(|beat| (false, beat)),
                anything().prop_map(|probe| (true, probe)),
            ],
            0..60,
        ),
    ) {
        // As after a start of ours: the first that is known may be the probe.
        let mut subject = Subject::with(true, true);
        for (on_probe, one) in evidence {
            let status = if on_probe { subject.probe(one) } else { subject.beat(one) };
            prop_assert!(!status.is_some_and(Status::is_silent), "{status:?}");
        }
    }

    #[test]
    fn every_bad_sequence_ends_in_error_within_its_bound(
        mut subject in subject(),
        before in prop::collection::vec((any::<bool>(), anything()), 0..40),
        tail in prop::collection::vec((bad(), bad(), any::<bool>()), FAILURES as usize),
    ) {
        for (on_probe, one) in before {
            if on_probe { subject.probe(one) } else { subject.beat(one) };
        }
        // From here on nothing but bad on every channel: the threshold bounds it, whatever was before, and whoever vouches.
        let mut status = None;
        for (on_beat, on_probe, vouched) in tail {
            subject.channels.vouched = vouched;
            subject.beat(on_beat);
            status = subject.probe(on_probe);
        }
        prop_assert_eq!(status, Some(Error));
    }

    #[test]
    fn every_agent_comes_back_within_the_success_threshold(
        mut subject in subject(),
        before in prop::collection::vec((any::<bool>(), anything()), 0..40),
    ) {
        for (on_probe, one) in before {
            if on_probe { subject.probe(one) } else { subject.beat(one) };
        }
        let mut status = None;
        for _ in 0..SUCCESSES {
            subject.beat(Good);
            status = subject.probe(Good);
        }
        prop_assert_eq!(status, Some(Connected));
    }

    #[test]
    fn void_never_makes_anything_worse(
        mut subject in subject(),
        before in prop::collection::vec((any::<bool>(), anything()), 0..40),
        on_probe in any::<bool>(),
    ) {
        for (on_probe, one) in before {
            if on_probe { subject.probe(one) } else { subject.beat(one) };
        }
        let status = subject.status;
        prop_assert_eq!(if on_probe { subject.probe(Void) } else { subject.beat(Void) }, status);
    }
}
