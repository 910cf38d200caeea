//! The loop's own decisions at their edges, on a real bus and in virtual time.

use rollcall_control::Trust;
use rollcall_core::subject::Subjects;
use rollcall_core::wire::{AgentState, Endpoint, GoodbyeReason};
use rollcall_nats::testing::NatsServer;
use rollcall_nats::{Entry, EventLog, Link, Message, Subscriber};
use rollcall_service::Settings;
use serde_json::{Value, json};

use super::*;
use crate::detector::{Cause, Channel};
use crate::probe::Found;
use crate::probe::scheduler::Bounds;
use crate::state::{Answers, FLAP_WINDOW_MS, Listening, ProbeSeen};

const AGENT: &str = "a1";
const INTERVAL_MS: u64 = 1000;
const ACTIVITY_TIMEOUT_MS: u64 = 10_000;

/// A loop that nobody turns: tests call its parts.
struct Bench {
    shell: Shell,
    /// Of the loop, and moved by the test.
    now: Timestamp,
    seq: u64,
    _server: NatsServer,
    inputs: mpsc::Receiver<Input>,
}

impl Bench {
    async fn open() -> Self {
        let server = NatsServer::start().unwrap();
        let bus = server.bus("rollcall").await;
        rollcall_nats::ensure_streams(&bus).await.unwrap();
        let url = server.url();
        let timeout = ACTIVITY_TIMEOUT_MS.to_string();
        let environment = [
            ("ROLLCALL_NATS_URL", url.as_str()),
            ("ROLLCALL_HEARTBEAT_INTERVAL_MS", "1000"),
            ("ROLLCALL_ACTIVITY_TIMEOUT_MS", &timeout),
        ];
        let environment = environment.map(|(name, value)| (name.into(), value.into()));
        let settings = Settings::load_from("health-prober", environment).unwrap().settings;
        let config = Config::from(&settings);
        let reach = Reach {
            log: EventLog::new(&bus),
            bus,
            subjects: Subjects::default(),
            source: "/rollcall/health-prober/bench".to_owned(),
        };
        let (sender, inputs) = mpsc::channel(INPUTS);
        let scheduler = Scheduler::new(config.probe_interval, Bounds::FULL);
        let mut shell = Shell::new(&config, scheduler, reach, sender, Arc::new(SystemClock::new()));
        shell.ready = true;
        shell.fleet.deaf = false;
        let now = shell.clock.now();
        Self { shell, now, seq: 0, _server: server, inputs }
    }

    /// One that has registered and is well, by the log.
    async fn with_agent() -> Self {
        let mut bench = Self::open().await;
        let profile = json!({ "agent_id": AGENT, "instance_id": "i1", "capacity": 2, "pool": "default",
            "interval_ms": INTERVAL_MS, "labels": {} });
        let status = json!({ "agent_id": AGENT, "instance_id": "i1", "previous": null, "reason": "first_heartbeat",
            "since": bench.now, "evidence": {} });
        bench.fold("registered", bench.now, &profile);
        bench.fold("connected", bench.now, &status);
        bench
    }

    /// An event of another prober.
    fn fold(&mut self, kind: &str, time: Timestamp, body: &Value) {
        let event = json!({
            "specversion": "1.0", "id": uuid::Uuid::now_v7(), "source": "/rollcall/health-prober/other",
            "type": format!("rollcall.agent.{kind}"), "subject": AGENT, "time": time,
            "datacontenttype": "application/json", "data": body,
        });
        let seq = self.shell.fleet.get(0).map_or(1, |entry| entry.known.agent.seq + 1);
        let subject = self.shell.reach.subjects.agent_event(&AGENT.parse().unwrap());
        let bytes = event.to_string().into_bytes().into();
        self.shell.fold_entry(&Entry { seq, subject: subject.into(), bytes, time: Default::default() });
        assert_eq!(self.shell.fleet.get(0).unwrap().known.agent.seq, seq, "{event}");
    }

    fn entry(&mut self) -> &mut crate::state::Entry {
        self.shell.fleet.get_mut(0).unwrap()
    }

    /// A heartbeat, `after_ms` after whatever was last.
    fn beat(&mut self, after_ms: u64, executions: &Value) {
        self.now = self.now.plus_ms(after_ms);
        self.seq += 1;
        let beat = json!({ "instance_id": "i1", "seq": self.seq, "state": AgentState::Ready, "capacity": 2,
            "interval_ms": INTERVAL_MS, "executions": executions });
        let (shell, now) = (&mut self.shell, self.now);
        crate::hear::hear(&mut shell.fleet, AGENT, beat.to_string().as_bytes(), &shell.policy, now).unwrap();
    }

    /// Heartbeats in time that all say the same, for so long.
    fn beat_for(&mut self, ms: u64, executions: &Value) {
        for _ in 0..ms / INTERVAL_MS {
            self.beat(INTERVAL_MS, executions);
        }
    }

    /// What the instance is told, by its next timer and in the answer to a heartbeat of this moment.
    fn told(&mut self) -> Option<GoodbyeReason> {
        self.shell.enforce_deadlines(0, self.now);
        self.answered()
    }

    /// Sends a canary, which is on its way back once this returns.
    async fn canary(&mut self) -> hearing::Canary {
        let now = self.shell.clock.now();
        self.shell.look_at_proven(now);
        // Somebody waits for one.
        self.shell.hearing.unproven.push(0);
        self.shell.canary_if_due();
        loop {
            if let Input::Canary(canary) = self.inputs.recv().await.unwrap() {
                return canary;
            }
        }
    }

    fn answered(&self) -> Option<GoodbyeReason> {
        self.shell.goodbye_due(0, &"i1".parse().unwrap(), self.now).map(|goodbye| goodbye.reason)
    }
}

fn one(progress: u32) -> Value {
    json!([{ "id": "e1", "attempt": 1, "progress": progress }])
}

#[tokio::test]
async fn a_prober_that_reads_the_log_leaves_heartbeats_to_others() {
    let mut bench = Bench::open().await;
    bench.shell.ready = false;
    let bus = bench.shell.reach.bus.clone();
    let mut answers = bus.subscribe("_INBOX.bench.1").await.unwrap();
    let mut beats = bus.subscribe(bench.shell.reach.subjects.all_heartbeats()).await.unwrap();
    bus.flush().await.unwrap();
    let subject = bench.shell.reach.subjects.heartbeat(&AGENT.parse().unwrap());
    for state in ["ready", "gone"] {
        let beat = json!({ "instance_id": "i1", "seq": 1, "state": state, "capacity": 1, "executions": [] });
        bus.publish(subject.clone(), beat.to_string().into_bytes().into()).await.unwrap();
        let message = beats.next().await.unwrap();
        bench.shell.hear(&Message { reply: Some("_INBOX.bench.1".into()), ..message });
    }
    // Whatever it had said would have come before this.
    bench.shell.publish("_INBOX.bench.1", b"last".to_vec());
    assert_eq!(answers.next().await.unwrap().payload.as_ref(), b"last");
    assert!(bench.shell.fleet.is_empty());
}

#[tokio::test]
async fn work_that_stands_still_is_told_and_what_moves_again_takes_it_back() {
    let mut bench = Bench::with_agent().await;
    bench.beat_for(ACTIVITY_TIMEOUT_MS, &one(3));
    assert_eq!(bench.told(), None, "a heartbeat short of it");
    bench.beat_for(INTERVAL_MS, &one(3));
    assert_eq!(bench.told(), Some(GoodbyeReason::ActivityTimeout));
    bench.beat_for(INTERVAL_MS, &one(3));
    assert_eq!(bench.answered(), Some(GoodbyeReason::ActivityTimeout), "until it is confirmed");
    bench.beat(INTERVAL_MS, &one(4));
    assert_eq!(bench.answered(), None, "it moves");
    bench.beat_for(ACTIVITY_TIMEOUT_MS - INTERVAL_MS, &one(4));
    assert_eq!(bench.told(), None);
}

#[tokio::test]
async fn work_that_names_no_progress_does_not_stand_still() {
    let mut bench = Bench::with_agent().await;
    let unmeasured = json!([{ "id": "e1", "attempt": 1 }]);
    bench.beat_for(3 * ACTIVITY_TIMEOUT_MS, &unmeasured);
    assert_eq!(bench.told(), None, "nobody knows whether it does");
    let mixed = json!([{ "id": "e1", "attempt": 1 }, { "id": "e2", "attempt": 1, "progress": 3 }]);
    bench.beat_for(3 * ACTIVITY_TIMEOUT_MS, &mixed);
    assert_eq!(bench.told(), None, "the goodbye would end the other one too");
    bench.beat_for(3 * ACTIVITY_TIMEOUT_MS, &json!([]));
    assert_eq!(bench.told(), None, "nothing to do is no standstill");
}

#[tokio::test]
async fn what_we_could_not_hear_is_no_standstill() {
    // We are deaf, and then hear again: the first heartbeats say what the last ones said.
    let mut bench = Bench::with_agent().await;
    bench.beat_for(2 * ACTIVITY_TIMEOUT_MS, &one(3));
    bench.shell.fleet.deaf = true;
    assert_eq!(bench.told(), None, "deaf");
    bench.shell.fleet.deaf = false;
    bench.shell.fleet.restart_clocks(bench.now);
    bench.beat_for(ACTIVITY_TIMEOUT_MS - INTERVAL_MS, &one(3));
    assert_eq!(bench.told(), None, "every clock has started again");
    bench.beat_for(INTERVAL_MS, &one(3));
    assert_eq!(bench.told(), Some(GoodbyeReason::ActivityTimeout), "and runs");
    bench.shell.fleet.restart_clocks(bench.now);
    assert_eq!(bench.answered(), None, "what was told before we were deaf is taken back");
    // It alone is cut off.
    let mut bench = Bench::with_agent().await;
    bench.beat_for(ACTIVITY_TIMEOUT_MS / 2, &one(3));
    bench.now = bench.now.plus_ms(2 * ACTIVITY_TIMEOUT_MS);
    assert_eq!(bench.told(), None, "it is silent, that is another matter");
    bench.beat(0, &one(3));
    assert_eq!(bench.told(), None, "what it did meanwhile nobody knows");
}

#[tokio::test]
async fn a_goodbye_for_an_operator_is_not_taken_back() {
    let mut bench = Bench::with_agent().await;
    let goodbye = Goodbye {
        reason: GoodbyeReason::ActivityTimeout,
        deadline_ms: 0,
        in_flight: rollcall_core::wire::InFlight::Return,
    };
    let (reply, answer) = oneshot::channel();
    bench.shell.answer(Ask::Part(AGENT.parse().unwrap(), goodbye, reply));
    assert!(answer.await.unwrap().is_ok());
    bench.beat(INTERVAL_MS, &one(1));
    assert_eq!(bench.answered(), Some(GoodbyeReason::ActivityTimeout));
}

#[tokio::test]
async fn a_goodbye_that_another_prober_said_is_repeated_to_that_instance() {
    let goodbye = Goodbye {
        reason: GoodbyeReason::Operator,
        deadline_ms: 7,
        in_flight: rollcall_core::wire::InFlight::Return,
    };
    for (instance, told) in [("i1", Some(GoodbyeReason::Operator)), ("i0", None)] {
        let mut bench = Bench::with_agent().await;
        let (agent_id, instance_id) = (AGENT.parse().unwrap(), instance.parse().unwrap());
        let unanswered = crate::api::Unanswered { agent_id, instance_id, goodbye: goodbye.clone() };
        bench.shell.answer(Ask::Told(unanswered));
        bench.beat(INTERVAL_MS, &one(1));
        assert_eq!(bench.answered(), told, "{instance}");
    }
}

/// Everything as it must be for "no responders" to count, after a heartbeat that is overdue.
async fn overdue() -> (Bench, Timestamp) {
    let mut bench = Bench::with_agent().await;
    // The loop's own clock counts here: its heartbeat was so long ago.
    bench.now = Timestamp::from_millis(bench.shell.clock.now().as_millis() - 1200);
    bench.beat(0, &json!([]));
    let entry = bench.entry();
    entry.live.edge.answers = Answers::Yes;
    entry.live.edge.waiting = true;
    let from = entry.live.counted_from;
    (bench, from)
}

fn nobody_there(bench: &mut Bench, from: Timestamp) -> u32 {
    bench.shell.pinged(0, &"i1".parse().unwrap(), 1, from, PingOutcome::NoResponders);
    bench.entry().live.beat.fails
}

#[tokio::test]
async fn no_responders_is_a_failure_of_an_instance_that_answered_before() {
    let (mut bench, from) = overdue().await;
    assert_eq!(nobody_there(&mut bench, from), 1);
    let (mut bench, from) = overdue().await;
    bench.entry().live.edge.answers = Answers::Unknown;
    assert_eq!(nobody_there(&mut bench, from), 0, "it never answered");
}

#[tokio::test]
async fn no_responders_counts_for_nothing_around_our_reconnect() {
    let (mut bench, from) = overdue().await;
    let now = bench.shell.clock.now();
    bench.shell.fleet.reconnected_at = Some(Timestamp::from_millis(now.as_millis() - 900));
    assert_eq!(nobody_there(&mut bench, from), 0, "within an interval");
    bench.shell.fleet.reconnected_at = Some(Timestamp::from_millis(now.as_millis() - 1100));
    assert_eq!(nobody_there(&mut bench, from), 1, "beyond it");
}

/// What a probe over the bus that finds nobody is said to mean. Somebody answered there before.
fn probe_finds_nobody(bench: &mut Bench) -> String {
    probe_finds(bench, Found::Bad(Cause::NoResponders, "nobody".to_owned()), Duration::ZERO)
}

/// The same of anything that it finds, after so long.
fn probe_finds(bench: &mut Bench, found: Found, took: Duration) -> String {
    let mut listening = Listening::default();
    listening.answered();
    bench.entry().live.probe = Some(Box::new(ProbeSeen {
        endpoint: Endpoint { kind: "nats".to_owned(), url: String::new() },
        instance_id: "i1".parse().unwrap(),
        trust: Trust::Agent,
        generation: 1,
        channel: Channel::default(),
        listening,
        result: String::new(),
        checked_at: None,
        latency_ms: None,
    }));
    bench.shell.probed(Report { index: 0, generation: 1, found, took });
    bench.entry().live.probe.as_deref().unwrap().result.clone()
}

#[tokio::test]
async fn an_answer_that_comes_late_while_we_are_slow_ourselves_is_not_slow() {
    let (mut bench, _) = overdue().await;
    let took = bench.shell.probe_timeout;
    assert_eq!(probe_finds(&mut bench, Found::Good, took), "slow");
    let (mut bench, _) = overdue().await;
    bench.shell.fleet.deaf = true;
    assert_eq!(probe_finds(&mut bench, Found::Good, took), "ok");
}

#[tokio::test]
async fn a_probe_that_finds_nobody_counts_for_nothing_around_our_reconnect() {
    let (mut bench, _) = overdue().await;
    assert_eq!(probe_finds_nobody(&mut bench), "no_responders: nobody");
    let (mut bench, _) = overdue().await;
    let now = bench.shell.clock.now();
    bench.shell.fleet.reconnected_at = Some(now);
    assert_eq!(probe_finds_nobody(&mut bench), "void: no_responders: nobody", "within an interval");
    bench.shell.fleet.reconnected_at = Some(Timestamp::from_millis(now.as_millis() - 1100));
    assert_eq!(probe_finds_nobody(&mut bench), "no_responders: nobody", "beyond it");
}

#[tokio::test]
async fn a_link_that_is_made_again_is_our_reconnect() {
    let link = |connected, epoch| Link { connected, epoch, changed_at: Instant::now() };
    // It was seen to be away, or only to be another one than before.
    for before in [link(false, 1), link(true, 1)] {
        let (mut bench, from) = overdue().await;
        bench.shell.link_changed(link(true, 1), link(false, 1));
        assert_eq!(bench.shell.fleet.reconnected_at, None, "it is away");
        bench.shell.link_changed(before, link(true, 2));
        // We hear again at once.
        bench.shell.fleet.deaf = false;
        assert_eq!(nobody_there(&mut bench, from), 0);
        assert_eq!(probe_finds_nobody(&mut bench), "void: no_responders: nobody");
    }
}

#[tokio::test]
async fn an_answer_vouches_for_this_silence_and_says_that_its_instance_answers() {
    for (k, vouched) in [(0, 0), (1, 1)] {
        let (mut bench, from) = overdue().await;
        bench.entry().live.edge.answers = Answers::Unknown;
        bench.shell.pinged(0, &"i1".parse().unwrap(), k, from, PingOutcome::Answered);
        let edge = &bench.entry().live.edge;
        assert_eq!((edge.waiting, edge.vouched), (false, vouched), "an introduction vouches for nothing");
        assert_eq!(nobody_there(&mut bench, from), 1, "it answered before");
    }
}

#[tokio::test]
async fn no_responders_counts_for_nothing_while_we_are_deaf() {
    let (mut bench, from) = overdue().await;
    bench.shell.fleet.deaf = true;
    assert_eq!(nobody_there(&mut bench, from), 0);
}

#[tokio::test]
async fn no_responders_counts_for_nothing_once_another_silence_has_begun() {
    let (mut bench, from) = overdue().await;
    bench.beat(1000, &json!([]));
    assert_eq!(nobody_there(&mut bench, from), 0, "it has beaten since it was asked");
    let (mut bench, from) = overdue().await;
    let now = bench.shell.clock.now();
    bench.shell.fleet.restart_clocks(now);
    assert_eq!(nobody_there(&mut bench, from), 0, "its clock has started again since it was asked");
    // An answer from before does not vouch for the silence after it either.
    let (mut bench, from) = overdue().await;
    bench.beat(1000, &json!([]));
    bench.shell.pinged(0, &"i1".parse().unwrap(), 1, from, PingOutcome::Answered);
    assert_eq!(bench.entry().live.edge.vouched, 0);
}

/// A prober with an agent whose first canary is back, and what it hears heartbeats with.
async fn hearing() -> (Bench, Subscriber) {
    let mut bench = Bench::with_agent().await;
    let heartbeats = bench.shell.reach.subjects.all_heartbeats();
    let mut beats = bench.shell.reach.bus.subscribe(heartbeats).await.unwrap();
    bench.shell.link_is(Link { connected: true, epoch: 1, changed_at: Instant::now() });
    bench.shell.listen_up();
    let first = bench.canary().await;
    bench.shell.canary_ended(first, &mut beats);
    assert!(bench.shell.hearing.hears());
    (bench, beats)
}

#[tokio::test]
async fn a_canary_proves_no_silence_from_after_it_was_sent() {
    let (mut bench, mut beats) = hearing().await;
    bench.now = bench.shell.clock.now();
    bench.beat(0, &json!([]));
    // It goes out before the next heartbeat is overdue, and is back afterwards.
    let canary = bench.canary().await;
    bench.shell.clock.shift(2 * INTERVAL_MS.cast_signed());
    bench.shell.canary_ended(canary, &mut beats);
    let now = bench.shell.clock.now();
    bench.shell.hearing.unproven.clear();
    bench.shell.look_at(0, now);
    assert_eq!(bench.entry().live.beat.fails, 0, "what was on its way then came too late for it");
    assert_eq!(bench.shell.hearing.unproven, [0], "the next one will tell");
}

#[tokio::test]
async fn a_canary_that_comes_to_hand_after_a_standstill_proves_nothing() {
    let (mut bench, mut beats) = hearing().await;
    bench.beat(0, &json!([]));
    let canary = bench.canary().await;
    // It was back in time, and nobody was there to see it. The tick that would tell comes after it.
    bench.shell.clock.shift(5 * INTERVAL_MS.cast_signed());
    bench.shell.canary_ended(canary, &mut beats);
    assert!(!bench.shell.hearing.hears(), "what it would prove may have been lost in our own buffers");
    assert!(bench.shell.hearing.proven_at < bench.shell.clock.now());
    bench.shell.look_at(0, bench.shell.clock.now());
    assert_eq!(bench.entry().live.beat.fails, 0);
}

#[tokio::test]
async fn a_clock_of_another_prober_that_is_ahead_hides_no_silence() {
    let mut bench = Bench::with_agent().await;
    let ahead = bench.shell.clock.now().plus_ms(3_600_000);
    let change = json!({ "agent_id": AGENT, "instance_id": "i1", "previous": "connected", "reason": "slow",
        "since": ahead, "evidence": { "heartbeat": { "grade": "good" } } });
    bench.fold("degraded", ahead, &change);
    let now = bench.shell.clock.now();
    assert!(bench.entry().live.anchor <= now, "it was heard in the future");
    let profile =
        json!({ "agent_id": AGENT, "instance_id": "i2", "capacity": 2, "pool": "default", "labels": {} });
    bench.fold("registered", ahead, &profile);
    let now = bench.shell.clock.now();
    assert_eq!(bench.entry().live.instance, Some("i2".parse().unwrap()));
    assert!(bench.entry().live.anchor <= now, "it registered in the future");
}

#[tokio::test]
async fn a_clock_of_another_prober_that_is_ahead_makes_no_silence_younger() {
    let mut bench = Bench::with_agent().await;
    let before = bench.shell.clock.now();
    let ahead = before.plus_ms(3_600_000);
    let change = json!({ "agent_id": AGENT, "instance_id": "i1", "previous": "connected", "reason": "missed_heartbeats",
        "since": ahead, "evidence": {}, "code": "unreachable" });
    bench.fold("error", ahead, &change);
    let now = bench.shell.clock.now();
    let forget_after_ms = bench.shell.policy.forget_after_ms;
    let known = &bench.entry().known;
    for since in [known.silent_since, known.agent.silent_since, Some(known.agent.since)] {
        assert!(since.is_some_and(|since| (before..=now).contains(&since)), "{since:?} at {now:?}");
    }
    assert!(known.forget_due(forget_after_ms).is_some_and(|due| due <= now.plus_ms(forget_after_ms)));
    // Nor does its fall count for longer.
    assert_eq!((known.falls(now), known.falls(now.plus_ms(FLAP_WINDOW_MS))), (1, 0));
    // A drain is what it says it is, by then.
    let drain = json!({ "agent_id": AGENT, "instance_id": "i1", "previous": "error", "reason": "test", "since": ahead,
        "evidence": {}, "by": "operator" });
    bench.fold("draining", ahead, &drain);
    let now = bench.shell.clock.now();
    assert!(bench.entry().known.agent.operator_drain.as_ref().is_some_and(|drain| drain.since <= now));
}

/// Quarantined so long ago, by the log.
async fn quarantined(age_ms: i64) -> Bench {
    let mut bench = Bench::with_agent().await;
    let at = Timestamp::from_millis(bench.shell.clock.now().as_millis() - age_ms);
    let mark = json!({ "agent_id": AGENT, "instance_id": "i1", "reason": "test", "count": 5 });
    bench.fold("quarantined", at, &mark);
    // It was this instance that was quarantined.
    bench.entry().known.agent.registered_at = Some(Timestamp::from_millis(at.as_millis() - 1));
    bench
}

fn lost(bench: &Bench, age_ms: i64) -> Loss {
    Loss {
        agent_id: AGENT.parse().unwrap(),
        instance_id: "i1".parse().unwrap(),
        reason: rollcall_core::event::RecoveryReason::Orphaned,
        returned: false,
        silent_since: None,
        time: Timestamp::from_millis(bench.shell.clock.now().as_millis() - age_ms),
    }
}

const MINUTE_MS: i64 = 60_000;

#[tokio::test]
async fn nobody_is_released_before_it_is_known_what_was_lost_meanwhile() {
    let mut bench = quarantined(11 * MINUTE_MS).await;
    bench.shell.look_at(0, bench.now);
    assert!(!bench.entry().work.busy, "there may have been another loss since");
    // There was.
    let loss = lost(&bench, 2 * MINUTE_MS);
    let at = loss.time;
    bench.shell.lost(loss);
    bench.shell.all_losses_read();
    assert!(!bench.entry().work.busy, "two minutes ago");
    assert_eq!(bench.entry().known.release_due(), at.plus_ms(600_000));
    // There was none.
    let mut bench = quarantined(11 * MINUTE_MS).await;
    bench.shell.all_losses_read();
    assert!(bench.entry().work.busy, "it is on its way into the log");
    // An operator need not wait.
    let mut bench = quarantined(MINUTE_MS).await;
    let (reply, _answer) = oneshot::channel();
    bench.shell.answer(Ask::Wish(AGENT.parse().unwrap(), Wish::Undrain { reason: "fixed".into() }, reply));
    assert!(bench.entry().work.busy);
}

#[tokio::test]
async fn a_quarantine_that_can_not_be_lifted_yet_keeps_no_timer_busy() {
    let mut bench = quarantined(11 * MINUTE_MS).await;
    // Nothing else is ever due about one that is gone.
    let gone = json!({ "agent_id": AGENT, "instance_id": "i1", "previous": "connected", "reason": "test",
        "since": bench.now, "evidence": {}, "by": "instance" });
    bench.fold("gone", bench.now, &gone);
    bench.entry().work.armed = None;
    bench.shell.rearm(0);
    assert_eq!(bench.entry().work.armed, None);
    let loss = lost(&bench, MINUTE_MS);
    bench.shell.lost(loss);
    bench.shell.all_losses_read();
    let due = bench.entry().known.release_due();
    assert_eq!(bench.entry().work.armed, Some(due));
}

/// What the probe of one of the agents file, as its log has it, is said to mean when it finds nobody there.
fn finds_nobody(bench: &mut Bench) -> String {
    let generation = bench.entry().live.probe.as_deref().unwrap().generation;
    let found = Found::Bad(Cause::NoResponders, "nobody".to_owned());
    bench.shell.probed(Report { index: 0, generation, found, took: Duration::ZERO });
    bench.entry().live.probe.as_deref().unwrap().result.clone()
}

#[tokio::test]
async fn who_answered_another_kind_of_probe_has_not_answered_on_the_bus() {
    let never = "void: no_responders: it never answered there";
    let mut bench = Bench::open().await;
    let profile = |kind: &str, url: &str, capacity: u32| {
        json!({ "agent_id": AGENT, "instance_id": "file-1", "capacity": capacity, "pool": "default", "labels": {},
            "probe": { "kind": kind, "url": url } })
    };
    let now = bench.now;
    let well = |reason: &str, by: Option<&str>| {
        json!({ "agent_id": AGENT, "instance_id": "file-1", "previous": null, "reason": reason, "since": now,
            "evidence": {}, "by": by })
    };
    bench.fold("registered", now, &profile("http", "http://10.0.0.7/", 1));
    bench.fold("connected", now, &well("probed", None));
    bench.fold("updated", now, &profile("nats", "legacy", 1));
    assert_eq!(finds_nobody(&mut bench), never, "that was over http");
    bench.fold("connected", now, &well("undrained", Some("operator")));
    bench.entry().live.probe = None;
    bench.shell.sync_probe(0);
    assert_eq!(finds_nobody(&mut bench), never, "an operator's word is no answer");
    // It is well by this probe, and whoever takes over knows that by the log, also after another change of its row.
    bench.fold("connected", now, &well("probed", None));
    bench.fold("updated", now, &profile("nats", "legacy", 2));
    bench.entry().live.probe = None;
    bench.shell.sync_probe(0);
    assert_eq!(finds_nobody(&mut bench), "void: no_responders: nobody", "it may be connecting again");
    bench.fold("updated", now, &profile("nats", "another", 2));
    assert_eq!(finds_nobody(&mut bench), never, "that is another subject");
}

#[tokio::test]
async fn what_is_overdue_and_can_not_be_done_keeps_no_timer_busy() {
    // The deadline of its drain has passed, and its instance does not count any more.
    let mut bench = Bench::with_agent().await;
    let (now, past) = (bench.now, Timestamp::from_millis(bench.now.as_millis() - MINUTE_MS));
    let drain = json!({ "agent_id": AGENT, "instance_id": "i1", "previous": "connected", "reason": "test",
        "since": past, "evidence": {}, "by": "operator", "deadline": past });
    bench.fold("draining", now, &drain);
    let due = |bench: &Bench| bench.shell.fleet.get(0).and_then(|entry| bench.shell.due(entry, now));
    assert_eq!(due(&bench), Some(past), "its instance is told");
    bench.shell.enforce_deadlines(0, now);
    assert!(due(&bench).is_some_and(|at| at > now), "it was");
    bench.entry().work.partings = None;
    let superseded = json!({ "agent_id": AGENT, "instance_id": "i1", "by_instance_id": "i2" });
    bench.fold("superseded", now, &superseded);
    assert!(due(&bench).is_some_and(|at| at > now), "{:?} at {now:?}", due(&bench));
    // The log did not take the end of its quarantine, or has it under way.
    let mut bench = quarantined(11 * MINUTE_MS).await;
    let gone = json!({ "agent_id": AGENT, "instance_id": "i1", "previous": "connected", "reason": "test",
        "since": now, "evidence": {}, "by": "instance" });
    bench.fold("gone", now, &gone);
    bench.shell.losses_read = true;
    assert_eq!(due(&bench), Some(bench.entry().known.release_due()));
    bench.entry().work.retry_at = Some(now.plus_ms(5000));
    assert_eq!(due(&bench), Some(now.plus_ms(5000)));
    bench.entry().work.retry_at = None;
    bench.entry().work.busy = true;
    assert_eq!(due(&bench), None);
}

/// In a log from before they were refused when they were read.
#[tokio::test]
async fn a_user_or_password_of_the_log_is_in_no_view_and_no_probe() {
    let mut bench = Bench::with_agent().await;
    let at = json!({ "kind": "http", "url": "http://u:hunter2@10.0.0.7/" });
    let profile = json!({ "agent_id": AGENT, "instance_id": "i1", "capacity": 2, "pool": "default",
        "interval_ms": INTERVAL_MS, "labels": {}, "probe": at, "control": at });
    bench.fold("updated", bench.now, &profile);
    let (policy, now) = (bench.shell.policy.clone(), bench.now);
    let view = serde_json::to_string(&crate::view::AgentView::new(bench.entry(), &policy, now)).unwrap();
    assert!(view.contains("http://***@10.0.0.7/") && !view.contains("hunter2"), "{view}");
    let probe = bench.entry().live.probe.as_deref().map(|seen| seen.endpoint.url.clone());
    assert_eq!(probe.as_deref(), Some("http://***@10.0.0.7/"));
}
