//! What becomes of the work on an instance: its fate is drawn when it begins.

use std::rc::Rc;

use rollcall_agent::state::{Ending, Key, StopCause, Termination};
use rollcall_core::{
    ExecutionId,
    wire::{AgentState, InFlight, Outcome},
};

use super::{REPORT_AGAIN_MS, Reply};
use crate::{
    Defect,
    exec::{Owner, pause},
    log::Report,
    stage::Stage,
    truth::{End, Run},
};

/// Of a thousand ends of work with external delivery.
const RELEASED: u64 = 800;

impl Stage {
    pub(super) fn note_run(&self, at: usize, key: &Key, asked_at: u64) {
        let instance = &self.instances.borrow()[at];
        self.truth.borrow_mut().runs.push(Run {
            agent: instance.agent.clone(),
            instance: instance.id.clone(),
            execution: key.execution_id.clone(),
            attempt: key.attempt,
            began_at: self.exec.now(),
            asked_at,
            ended: None,
        });
    }

    /// The work itself: what will become of it is drawn now.
    pub(super) fn perform(self: &Rc<Self>, at: usize, key: Key, timeout: u64) {
        let fate = if self.settling.get() { 0 } else { self.exec.between(0, 99) };
        let lasts = self.exec.between(200, timeout.saturating_sub(1_000).max(400));
        let stage = Rc::clone(self);
        self.exec.spawn(Owner::Instance(at), async move {
            match fate {
                // Never ends by itself: it goes on for ever, or stands still from some moment on.
                0..=3 if !stage.settling.get() => {}
                4..=7 if !stage.settling.get() => {
                    pause(&stage.exec, stage.exec.between(0, 3_000)).await;
                    stage.stick(at, key);
                }
                // Forgets it.
                8..=15 => {
                    pause(&stage.exec, lasts).await;
                    stage.forget(at, &key, End::Forgotten);
                }
                // Takes longer than it may.
                16..=23 => {
                    pause(&stage.exec, timeout + lasts).await;
                    stage.finish(at, &key, Ending::Completed, 0).await;
                }
                24..=31 => {
                    pause(&stage.exec, lasts).await;
                    stage.finish(at, &key, Ending::Failed, 0).await;
                }
                // Reports late, and perhaps twice.
                32..=45 => {
                    pause(&stage.exec, lasts).await;
                    let late = stage.exec.between(0, 6_000);
                    let reported = stage.finish(at, &key, Ending::Completed, late).await;
                    if reported && stage.exec.chance(500) {
                        stage.hand_in(at, &key, Outcome::Completed).await;
                    }
                }
                _ => {
                    pause(&stage.exec, lasts).await;
                    stage.finish(at, &key, Ending::Completed, 0).await;
                }
            }
        });
    }

    pub(super) async fn thawed(self: &Rc<Self>, at: usize) {
        loop {
            let until = self.instances.borrow()[at].frozen_until;
            let now = self.exec.now();
            if until <= now {
                return;
            }
            pause(&self.exec, until - now).await;
        }
    }

    pub(super) fn stick(&self, at: usize, key: Key) {
        let now = self.exec.now();
        let instance = &mut self.instances.borrow_mut()[at];
        let stuck = (instance.id.clone(), key.execution_id.clone(), key.attempt);
        self.truth.borrow_mut().stuck.insert(stuck, now);
        instance.stuck.insert(key, now);
    }

    /// The work ends, and is reported until that is acknowledged. False: it was not running.
    pub(super) async fn finish(self: &Rc<Self>, at: usize, key: &Key, ending: Ending, late: u64) -> bool {
        self.thawed(at).await;
        let outcome = self.over(at, key, ending);
        let Some(outcome) = outcome else { return false };
        pause(&self.exec, late).await;
        self.hand_in(at, key, outcome).await;
        if self.instances.borrow_mut()[at].book.acknowledged(key) {
            let id = self.instances.borrow()[at].id.clone();
            self.note_dropped(&id, key.clone());
        }
        true
    }

    pub(super) fn over(&self, at: usize, key: &Key, ending: Ending) -> Option<Outcome> {
        let instance = &mut self.instances.borrow_mut()[at];
        let outcome = instance.book.finish(key, ending)?;
        let over = (instance.id.clone(), key.execution_id.clone(), key.attempt);
        let now = self.exec.now();
        let mut truth = self.truth.borrow_mut();
        truth.ran(&instance.id, &key.execution_id, key.attempt, now, End::Over);
        truth.over.insert(over, now);
        Some(outcome)
    }

    /// Nobody knows of it any more, and no report tells.
    pub(super) fn forget(&self, at: usize, key: &Key, end: End) {
        if self.instances.borrow_mut()[at].book.forget(key) {
            let id = self.instances.borrow()[at].id.clone();
            let now = self.exec.now();
            self.truth.borrow_mut().ran(&id, &key.execution_id, key.attempt, now, end);
            self.note_dropped(&id, key.clone());
        }
    }

    /// Reports until the stream has acknowledged.
    pub(super) async fn hand_in(self: &Rc<Self>, at: usize, key: &Key, outcome: Outcome) {
        let (agent, instance) = {
            let instances = self.instances.borrow();
            (instances[at].agent.clone(), instances[at].id.clone())
        };
        let report = Report {
            agent: agent.clone(),
            instance,
            execution: key.execution_id.clone(),
            attempt: key.attempt,
            outcome,
        };
        self.note_report(&agent, &key.execution_id, key.attempt, outcome);
        // Most is released by its orchestrator; an agent may report it all the same.
        let released = self.is_external(&key.execution_id) && self.exec.chance(RELEASED);
        loop {
            self.thawed(at).await;
            if released {
                if self.release(&report).await {
                    return;
                }
                pause(&self.exec, REPORT_AGAIN_MS).await;
                continue;
            }
            if let Some(way) = self.way().filter(|_| !self.is_cut(&agent)) {
                pause(&self.exec, way).await;
                self.reports.borrow_mut().publish(&report, self.exec.now());
                self.say(|| format!("report {report:?}"));
                // The acknowledgement can be lost: then it is reported once more.
                if let Some(way) = self.way().filter(|_| !self.is_cut(&agent)) {
                    pause(&self.exec, way).await;
                    return;
                }
            }
            pause(&self.exec, REPORT_AGAIN_MS).await;
        }
    }

    pub(super) fn end(self: &Rc<Self>, at: usize, id: &ExecutionId, attempt: u32) -> Reply {
        let key = Key::new(id.clone(), attempt);
        let (termination, stubborn) = {
            let instance = &mut self.instances.borrow_mut()[at];
            if self.has(Defect::NoTombstone) && !instance.book.claims().any(|held| *held == key) {
                return Reply::NotRunning;
            }
            (instance.book.terminate(&key, StopCause::Terminated), instance.stubborn)
        };
        if termination == Termination::NotRunning {
            return Reply::NotRunning;
        }
        if !self.settling.get() && self.exec.between(1, 10) <= stubborn {
            return Reply::StillRunning;
        }
        self.say(|| format!("{id}:{attempt} is ended where it runs"));
        if self.exec.chance(500) {
            // Without a report, and remembered all the same: a request that is repeated must not start it again.
            self.forget(at, &key, End::Over);
            if !self.has(Defect::NoTombstone) {
                self.instances.borrow_mut()[at].book.terminate(&key, StopCause::Terminated);
            }
        } else {
            let stage = Rc::clone(self);
            self.exec.spawn(Owner::Instance(at), async move {
                stage.finish(at, &key, Ending::Stopped, 0).await;
            });
        }
        Reply::Terminated
    }

    /// The shutdown routine: take nothing more, finish or hand back, wait for acknowledgements, say goodbye.
    pub(crate) fn shut_down(self: &Rc<Self>, at: usize, in_flight: InFlight) {
        if !self.instances.borrow_mut()[at].book.close() {
            return;
        }
        let stage = Rc::clone(self);
        self.exec.spawn(Owner::Instance(at), async move {
            stage.beat(at, None);
            if in_flight == InFlight::Finish {
                // Most are in a hurry; some drain for as long as their work lasts.
                let longest = if stage.exec.chance(300) { 12_000 } else { 4_000 };
                pause(&stage.exec, stage.exec.between(200, longest)).await;
            }
            stage.thawed(at).await;
            let running = stage.instances.borrow_mut()[at].book.return_all();
            for key in running {
                stage.finish(at, &key, Ending::Stopped, 0).await;
            }
            while stage.instances.borrow()[at].book.claims().next().is_some() {
                pause(&stage.exec, REPORT_AGAIN_MS).await;
            }
            for _ in 0..3 {
                stage.beat(at, Some(AgentState::Gone));
                pause(&stage.exec, 100).await;
            }
            stage.say(|| format!("instance {at} exits"));
            let stage_too = Rc::clone(&stage);
            stage.exec.later(0, move || stage_too.kill_instance(at));
        });
    }
}
