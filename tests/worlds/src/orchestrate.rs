//! Orchestrators of work with external delivery: they are told of a grant by the log, start the work on its agent
//! themselves, and it is they who release it. Some die on the way, and perhaps somebody goes on who knows no more than the log.

use std::{collections::BTreeSet, rc::Rc};

use rollcall_core::{
    ExecutionId,
    event::ExecutionEvent,
    execution::{Attempt, State},
};

use crate::{
    agent::{Answer, Reply, Request},
    exec::{Owner, Promise, pause},
    log::Report,
    plan::some_dispatcher,
    stage::Stage,
    watchdog::history,
};

/// Pause between two looks at the log.
const LOOK_MS: u64 = 150;
/// Of a thousand orchestrators.
const MORTAL: u64 = 200;
const HEIRS: u64 = 500;
const RELEASE_TIMEOUT_MS: u64 = 4_000;

/// Sees to an execution until the end of the world, or its own.
pub(crate) fn orchestrate(stage: &Rc<Stage>, id: ExecutionId) {
    let exec = &stage.exec;
    let dies_at = exec.chance(MORTAL).then(|| exec.now() + exec.between(100, 9_000));
    let stage = Rc::clone(stage);
    let exec = Rc::clone(exec);
    exec.spawn(Owner::World, async move {
        see_to(&stage, &id, dies_at.unwrap_or(u64::MAX)).await;
        stage.count("orchestrators died");
        if stage.exec.chance(HEIRS) {
            pause(&stage.exec, stage.exec.between(300, 5_000)).await;
            see_to(&stage, &id, u64::MAX).await;
        }
    });
}

/// Comes back when it dies.
async fn see_to(stage: &Rc<Stage>, id: &ExecutionId, until: u64) {
    let subject = stage.subjects.execution_event(id);
    let mut begun = BTreeSet::new();
    let mut seen = 0;
    while stage.exec.now() < until || stage.settling.get() {
        pause(&stage.exec, LOOK_MS).await;
        let last = stage.log.borrow().last_of(&subject);
        if last == seen {
            continue;
        }
        let execution = history(stage, id);
        let granted = execution.as_ref().filter(|e| e.state == State::Running).and_then(|e| e.current());
        match granted.filter(|held| !begun.contains(&held.number)) {
            None => seen = last,
            Some(held) if begin(stage, id, held).await => _ = begun.insert(held.number),
            Some(_) => {}
        }
    }
}

/// Starts it on its agent. False: nobody knows, or not now.
async fn begin(stage: &Rc<Stage>, id: &ExecutionId, held: &Attempt) -> bool {
    let asked_at = stage.exec.now();
    let Some(way) = stage.way() else { return false };
    pause(&stage.exec, way).await;
    let request = Request::Dispatch(id.clone(), held.number, held.timeout_ms);
    let (answer, _) = stage.deliver(&held.agent_id, &held.instance_id, &request, asked_at);
    let Some(way) = stage.way() else { return false };
    pause(&stage.exec, way).await;
    let accepted = answer == Answer::Said(Reply::Accepted);
    if accepted {
        stage.count("external work begun");
    }
    accepted
}

impl Stage {
    /// Whether the work is started by an orchestrator.
    pub(crate) fn is_external(&self, id: &ExecutionId) -> bool {
        let first = self.log.borrow().first_of(&self.subjects.execution_event(id));
        first.is_some_and(|entry| match entry.execution() {
            Some(ExecutionEvent::Submitted(request)) => {
                request.delivery == rollcall_core::wire::Delivery::External
            }
            _ => false,
        })
    }

    /// Asks a dispatcher to release what has ended. False: nobody knows.
    pub(crate) async fn release(self: &Rc<Self>, report: &Report) -> bool {
        let answer = Promise::new(&self.exec);
        answer.keep_after(RELEASE_TIMEOUT_MS, false);
        if let Some((me, dispatcher)) = some_dispatcher(self) {
            let (report, kept) = (report.clone(), answer.clone());
            self.exec.spawn(Owner::Service(me), async move {
                kept.keep(dispatcher.release_verb(&report).await);
            });
        }
        let answered = answer.await;
        if answered {
            self.count("external work released");
            self.truth.borrow_mut().released.push(report.clone());
        }
        answered
    }
}
