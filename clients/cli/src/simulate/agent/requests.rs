//! What a simulated agent answers, and what its work does.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use rollcall_agent::state::{Admission, Ending, Key, Refusal, StopCause, Termination};
use rollcall_core::{
    Clock, Timestamp,
    wire::{
        DispatchReply, DispatchRequest, ExecutionsReply, GoodbyeReply, Outcome, OwnedClaim, PingReply,
        Report, TerminateReply, TerminateRequest, TerminateState,
    },
};
use rollcall_nats::{Message, Reports};
use serde::Serialize;
use tokio::time::Instant;

use super::{FAULT_AFTER_MS, FLAP_INTERVALS, FLAPS, Instance, Kind, Timer};

/// How long work refuses to die, from when it was first told to.
const REFUSE_FOR: Duration = Duration::from_secs(6);
/// How long after its termination the completion of late-reporting work arrives.
const LATE_BY: Duration = Duration::from_secs(1);
/// A slow agent's answers take that long (the dispatcher waits for 2 s).
const SLOW_REPLY_MS: std::ops::Range<u64> = 300..1_500;
/// First and longest pause between two tries to publish a report.
const REPORT_PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

impl Instance<'_> {
    pub(super) async fn on_request(&mut self, message: Message) {
        if self.muted {
            return;
        }
        let verb = message.subject.rsplit('.').next().unwrap_or_default();
        match verb {
            "dispatch" => {
                if let Ok(request) = serde_json::from_slice::<DispatchRequest>(&message.payload) {
                    let reply = self.dispatch(&request);
                    self.reply(&message, &reply).await;
                }
            }
            "terminate" => {
                if let Ok(request) = serde_json::from_slice::<TerminateRequest>(&message.payload) {
                    let state = self.terminate(&request);
                    self.reply(&message, &TerminateReply { state }).await;
                }
            }
            "executions" => {
                let executions = self
                    .book
                    .claims()
                    .map(|key| OwnedClaim {
                        id: key.execution_id.clone(),
                        attempt: key.attempt,
                        progress: self.progress_of(key),
                    })
                    .collect();
                let reply =
                    ExecutionsReply { instance_id: self.id.clone(), seq: self.book.seq(), executions };
                self.reply(&message, &reply).await;
            }
            "ping" => {
                let reply = PingReply { instance_id: self.id.clone(), state: self.book.state() };
                self.reply(&message, &reply).await;
            }
            "goodbye" => self.reply(&message, &GoodbyeReply { ok: true }).await,
            _ => {}
        }
    }

    async fn reply<T: Serialize>(&mut self, message: &Message, value: &T) {
        let Some(to) = message.reply.as_ref().map(ToString::to_string) else { return };
        let bytes: Bytes = serde_json::to_vec(value).expect("replies hold text and numbers").into();
        if self.agent.kind == Kind::Slow {
            let after = self.between(SLOW_REPLY_MS);
            self.set(after, Timer::Reply(to, bytes));
        } else {
            self.reply_now(&to, bytes).await;
        }
    }

    pub(super) async fn reply_now(&self, to: &str, bytes: Bytes) {
        self.agent.bus.reply_to(Some(to), None, bytes).await;
    }

    fn dispatch(&mut self, request: &DispatchRequest) -> DispatchReply {
        let key = Key::new(request.execution_id.clone(), request.attempt);
        match self.book.dispatch(&key) {
            Admission::Held => DispatchReply { accepted: true, reason: None },
            Admission::Refused(refusal) => {
                if let Refusal::OlderAttemptRuns(older) = &refusal {
                    self.end(&older.clone(), StopCause::Terminated);
                }
                DispatchReply { accepted: false, reason: Some(refusal.as_str().to_owned()) }
            }
            Admission::Start => {
                self.agent.world.dispatches.fetch_add(1, Ordering::Relaxed);
                self.begin(key, request.deadline);
                DispatchReply { accepted: true, reason: None }
            }
        }
    }

    /// Work begins: what is wrong with it is arranged now. Only first attempts are struck by their own fault.
    fn begin(&mut self, key: Key, deadline: Timestamp) {
        let (kind, work, stall_timeout_ms) = {
            let mut truth = self.agent.world.truth();
            truth.accepted(&key, &self.agent.id);
            match truth.work(&key.execution_id) {
                Some(work) => (work.kind, Duration::from_millis(work.duration_ms), work.stall_timeout_ms),
                // Somebody else's: done at once.
                None => (Kind::Normal, Duration::ZERO, None),
            }
        };
        let kind = if key.attempt == 1 { kind } else { Kind::Normal };
        let now = self.agent.world.clock.now();
        self.progress.insert(key.clone(), (Instant::now(), kind != Kind::Stalling));
        match kind {
            Kind::Normal | Kind::DoubleReporting | Kind::Slow | Kind::ClockSkewed => {
                self.set(work, Timer::Finish(key))
            }
            Kind::Hung | Kind::RefusingTerminate | Kind::LateReporting => {
                self.agent.world.truth().struck(&key, kind, deadline);
            }
            Kind::Stalling => {
                self.agent.world.truth().struck(
                    &key,
                    kind,
                    now.plus_ms(stall_timeout_ms.unwrap_or_default()),
                );
            }
            Kind::Orphaning => {
                let after = self.between(FAULT_AFTER_MS);
                self.set(after, Timer::Forget(key));
            }
            Kind::Flapping => {
                self.set(
                    self.agent.world.interval * (FLAPS * (FLAP_INTERVALS.0 + FLAP_INTERVALS.1)),
                    Timer::Finish(key),
                );
                if self.arm() {
                    let after = self.between(FAULT_AFTER_MS);
                    self.set(after, Timer::Flap(FLAPS - 1));
                }
            }
            Kind::Silent | Kind::Crashing | Kind::Restarting | Kind::Returning => {
                if self.arm() {
                    let after = self.between(FAULT_AFTER_MS);
                    self.set(after, Timer::Fault);
                }
            }
        }
    }

    /// True if no fault of this agent is under way yet.
    fn arm(&mut self) -> bool {
        self.agent.front.is_up.store(false, Ordering::Release);
        !std::mem::replace(&mut self.fault_is_set, true)
    }

    fn kind_of(&self, key: &Key) -> Kind {
        if key.attempt > 1 {
            return Kind::Normal;
        }
        self.agent.world.truth().work(&key.execution_id).map_or(Kind::Normal, |work| work.kind)
    }

    fn terminate(&mut self, request: &TerminateRequest) -> TerminateState {
        let key = Key::new(request.execution_id.clone(), request.attempt);
        self.end(&key, StopCause::of_terminate(&request.reason))
    }

    fn end(&mut self, key: &Key, cause: StopCause) -> TerminateState {
        if self.dying_late.contains(key) {
            return TerminateState::Terminated;
        }
        if self.book.terminate(key, cause) == Termination::NotRunning {
            return TerminateState::NotRunning;
        }
        match self.kind_of(key) {
            Kind::RefusingTerminate => {
                let since = *self.refused_since.entry(key.clone()).or_insert_with(Instant::now);
                if since.elapsed() < REFUSE_FOR {
                    return TerminateState::StillRunning;
                }
                self.finish(key, Ending::Stopped);
            }
            Kind::LateReporting => {
                self.dying_late.insert(key.clone());
                self.agent.world.truth().dead(key);
                self.set(LATE_BY, Timer::Finish(key.clone()));
            }
            _ => self.finish(key, Ending::Stopped),
        }
        TerminateState::Terminated
    }

    /// The work ended: it is reported until that is acknowledged.
    pub(super) fn finish(&mut self, key: &Key, ending: Ending) {
        let Some(outcome) = self.book.finish(key, ending) else { return };
        self.agent.world.truth().dead(key);
        let now = self.agent.world.clock.now().as_millis() + self.agent.skew_ms;
        let report = Report {
            agent_id: None,
            execution_id: None,
            instance_id: self.id.clone(),
            attempt: key.attempt,
            outcome,
            result: (outcome == Outcome::Completed)
                .then(|| serde_json::value::to_raw_value(&0).expect("0 is JSON")),
            error: None,
            checkpoint: None,
            finished_at: Some(Timestamp::from_millis(now)),
        };
        let bytes: Bytes = serde_json::to_vec(&report).expect("a report holds text and numbers").into();
        let times = if self.kind_of(key) == Kind::DoubleReporting { 2 } else { 1 };
        let subject = self.agent.world.subjects.report(&self.agent.id, &key.execution_id);
        let (reports, key, done) = (Reports::new(&self.agent.bus), key.clone(), self.acknowledged.0.clone());
        let over = self.agent.world.over.clone();
        tokio::spawn(async move {
            for _ in 0..times {
                let mut pause = REPORT_PAUSE.0;
                while reports.publish(&subject, bytes.clone()).await.is_err() {
                    tokio::select! {
                        () = over.cancelled() => return,
                        () = tokio::time::sleep(pause) => {}
                    }
                    pause = (pause * 2).min(REPORT_PAUSE.1);
                }
            }
            // The instance may be gone meanwhile: then nobody needs to know.
            let _ = done.send(key).await;
        });
    }

    pub(super) async fn on_acknowledged(&mut self, key: &Key) {
        self.book.acknowledged(key);
        self.progress.remove(key);
        self.refused_since.remove(key);
        self.dying_late.remove(key);
        self.leave_if_empty().await;
    }
}
