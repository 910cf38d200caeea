//! What happens to a world: drawn from its seed as it goes.

use std::{collections::BTreeMap, rc::Rc};

use rollcall_core::{
    AgentId, ExecutionId, Pool,
    event::{PayloadRef, Submitted},
    wire::{Delivery, OnLoss},
};

use crate::{
    clock::HOST_WRONG_MS,
    disturb::{current, disturb, lose_everywhere},
    exec::{Owner, Promise, pause},
    operate::{Order, insist},
    orchestrate::orchestrate,
    services::Body,
    stage::{Stage, Weather},
    watchdog::history,
};

const SUBMIT_TIMEOUT_MS: u64 = 4_000;
const SUBMIT_TRIES: u32 = 12;
/// Of a thousand worlds.
const QUIET_WORLDS: u64 = 150;
/// Of a thousand submissions.
const EXTERNAL: u64 = 250;
/// Of a thousand dispatches.
const WORST_MOMENTS: u64 = 60;

/// Everything that goes wrong is over by then, counted from the beginning.
pub(crate) const CHAOS_MS: u64 = 30_000;

pub(crate) fn agent(number: u64) -> AgentId {
    AgentId::new(&format!("agent-{number}")).expect("a valid id")
}

/// Sets a world up and lets chaos begin.
pub(crate) fn begin(stage: &Rc<Stage>) {
    let exec = &stage.exec;
    stage.weather.set(Weather {
        loss: exec.between(0, 30),
        twice: exec.between(0, 40),
        way_max: exec.between(3, 200),
        astray: exec.between(0, 15),
    });
    let services = stage.places.borrow().len();
    for me in 0..services {
        // Most hosts are nearly right; a wrong one is put right by the log's server before anything is decided on it.
        let wrong = if exec.chance(100) { 20_000 } else { HOST_WRONG_MS };
        stage.places.borrow_mut()[me].clocks.wall = stage.either_way(wrong);
        stage.start(me);
    }
    let agents = exec.between(2, 4);
    let mut capacities = BTreeMap::new();
    for number in 0..agents {
        let capacity = u32::try_from(exec.between(1, 2)).unwrap_or(1);
        capacities.insert(agent(number), capacity);
        stage.boot(&agent(number), capacity);
    }
    for number in 0..exec.between(6, 12) {
        let at = exec.between(1_500, CHAOS_MS - 4_000);
        let task = Rc::clone(stage);
        exec.later(at, move || submit(&task, number, agents));
    }
    let task = Rc::clone(stage);
    exec.spawn(Owner::World, async move {
        if task.exec.chance(QUIET_WORLDS) {
            // Only after some quiet time does a hole in the numbers of heartbeats say anything.
            pause(&task.exec, task.exec.between(9_500, 13_000)).await;
            lose_everywhere(&task);
        }
        while task.exec.now() < CHAOS_MS {
            pause(&task.exec, task.exec.between(200, 3_000)).await;
            disturb(&task, &capacities);
        }
        heal(&task, &capacities);
    });
}

/// Now and then capacity is lost between the confirmation of a slot and the event that says who has it, and somebody wants
/// that very slot.
pub(crate) fn worst_moment(stage: &Rc<Stage>, agent: &AgentId) {
    if stage.settling.get() || !stage.exec.chance(WORST_MOMENTS) {
        return;
    }
    if stage.exec.chance(500) {
        stage.wipe();
    } else {
        stage.fail_over();
    }
    let id = ExecutionId::new(&format!("rival-{}", stage.exec.now())).expect("a valid id");
    hand_in(stage, Submitted { priority: 0, ..request(stage, id, Some(agent.clone())) });
}

fn request(stage: &Stage, id: ExecutionId, agent_id: Option<AgentId>) -> Submitted {
    let exec = &stage.exec;
    Submitted {
        execution_id: id,
        attempt: 1,
        agent_id,
        pool: Pool::default(),
        input: PayloadRef { bytes: 0, sha256: String::new(), seq: 0, attempt: 1 },
        timeout_ms: Some(exec.between(1_500, 9_000)),
        priority: u8::try_from(exec.between(0, 9)).unwrap_or(5),
        queue_ttl_ms: exec.between(10_000, 90_000),
        on_loss: if exec.chance(650) { OnLoss::Requeue } else { OnLoss::Fail },
        max_attempts: 3,
        stall_timeout_ms: exec.chance(300).then(|| exec.between(2_000, 5_000)),
        lost_after_ms: exec.chance(200).then(|| exec.between(1_000, 5_000)),
        delivery: Delivery::Push,
        labels: BTreeMap::new(),
        request_sha256: String::new(),
    }
}

fn submit(stage: &Rc<Stage>, number: u64, agents: u64) {
    let exec = &stage.exec;
    let id = ExecutionId::new(&format!("x{number}")).expect("a valid id");
    let agent_id = exec.chance(600).then(|| agent(exec.between(0, agents - 1)));
    let mut request = request(stage, id.clone(), agent_id);
    if exec.chance(EXTERNAL) {
        request.delivery = Delivery::External;
        orchestrate(stage, id.clone());
    }
    if exec.chance(200) {
        command(stage, exec.between(100, 6_000), id.clone(), false);
    }
    if exec.chance(100) {
        command(stage, exec.between(5_000, 12_000), id.clone(), true);
    }
    hand_in(stage, request);
}

/// Submits until it is accepted.
fn hand_in(stage: &Rc<Stage>, request: Submitted) {
    let stage = Rc::clone(stage);
    let exec = Rc::clone(&stage.exec);
    exec.spawn(Owner::World, async move {
        for _ in 0..SUBMIT_TRIES {
            let answer = Promise::new(&stage.exec);
            answer.keep_after(SUBMIT_TIMEOUT_MS, false);
            if let Some((me, dispatcher)) = some_dispatcher(&stage) {
                let (request, kept) = (request.clone(), answer.clone());
                stage.exec.spawn(Owner::Service(me), async move {
                    let accepted = dispatcher.submit(request).await;
                    kept.keep(accepted);
                });
            }
            if answer.await {
                stage.truth.borrow_mut().accepted.insert(request.execution_id.clone());
                return;
            }
            pause(&stage.exec, 700).await;
        }
    });
}

pub(crate) fn some_dispatcher(stage: &Stage) -> Option<(usize, Rc<crate::dispatcher::Dispatcher>)> {
    let places = stage.places.borrow();
    let running: Vec<_> = places
        .iter()
        .enumerate()
        .filter(|(_, place)| !place.link.bus_cut)
        .filter_map(|(me, place)| match &place.body {
            Some(Body::Dispatcher(dispatcher)) => Some((me, Rc::clone(dispatcher))),
            _ => None,
        })
        .collect();
    let last = (running.len() as u64).checked_sub(1)?;
    let drawn = usize::try_from(stage.exec.between(0, last)).unwrap_or(0);
    running.get(drawn).cloned()
}

fn command(stage: &Rc<Stage>, after: u64, id: ExecutionId, retry: bool) {
    let task = Rc::clone(stage);
    stage.exec.later(after, move || {
        if history(&task, &id).is_none() {
            return;
        }
        let Some((me, dispatcher)) = some_dispatcher(&task) else { return };
        task.exec.spawn(Owner::Service(me), async move {
            if retry { dispatcher.retry(&id).await } else { dispatcher.cancel(&id).await }
        });
    });
}

/// The end of chaos: everything works from here on, most agents are back.
fn heal(stage: &Rc<Stage>, capacities: &BTreeMap<AgentId, u32>) {
    stage.say(|| "chaos is over".to_owned());
    stage.settling.set(true);
    stage.weather.set(Weather::FAIR);
    stage.agents_cut.borrow_mut().clear();
    let services = stage.places.borrow().len();
    for me in 0..services {
        stage.set_link(me, false, false);
        stage.start(me);
    }
    stage.agents_losing.borrow_mut().clear();
    stage.places.borrow_mut().iter_mut().for_each(|place| place.loses = 0);
    for instance in stage.instances.borrow_mut().iter_mut() {
        instance.frozen_until = 0;
    }
    for agent in capacities.keys() {
        if stage.exec.chance(700) {
            insist(stage, agent, Order::Undrain);
        }
        if let Some(at) = current(stage, agent).filter(|at| stage.instances.borrow()[*at].capacity == 0) {
            stage.set_capacity(at, 1);
        }
    }
    for (agent, capacity) in capacities {
        if current(stage, agent).is_none() && stage.exec.chance(700) {
            stage.boot(agent, *capacity);
        }
    }
}
