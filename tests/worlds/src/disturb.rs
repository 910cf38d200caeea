//! What goes wrong in a world, one thing at a time.

use std::{collections::BTreeMap, rc::Rc};

use rollcall_core::{AgentId, wire::InFlight};

use crate::{
    exec::Exec,
    operate::{Order, operate},
    plan::agent,
    services::Kind,
    stage::Stage,
};

#[derive(Debug, Clone, Copy)]
enum Trouble {
    Crash,
    CutService,
    /// All who watch are deaf at once, and the log is there.
    CutWatchers,
    KillAgent,
    /// A new instance beside the old one.
    DoubleAgent,
    FreezeAgent,
    CutAgent,
    CutAllAgents,
    /// One agent's heartbeats are lost now and then.
    LoseAgent,
    /// One service loses heartbeats of all agents, and is not told.
    LoseHeartbeats,
    /// All who watch do.
    LoseEverywhere,
    /// It drains itself and exits.
    StopAgent,
    /// An operator drains an agent, with a deadline or without, and takes that back or not.
    Drain,
    /// An operator says that an agent won't come back; it does.
    Forget,
    ChangeCapacity,
    WipeCapacity,
    /// A failover to stale data.
    RestoreCapacity,
    SetHostClock,
    /// Somebody puts the time source of all hosts right.
    SetFleetTime,
    StallService,
    /// The machine that all who watch run on.
    StallWatchers,
}

/// Of a thousand moments in which something goes wrong.
const REPLICATED: u64 = 300;

/// How often each of them happens among the others.
const TROUBLES: [(u64, Trouble); 21] = [
    (16, Trouble::Crash),
    (11, Trouble::CutService),
    (7, Trouble::CutWatchers),
    (9, Trouble::KillAgent),
    (5, Trouble::DoubleAgent),
    (6, Trouble::FreezeAgent),
    (8, Trouble::CutAgent),
    (3, Trouble::CutAllAgents),
    (3, Trouble::LoseAgent),
    (4, Trouble::LoseHeartbeats),
    (2, Trouble::LoseEverywhere),
    (6, Trouble::StopAgent),
    (8, Trouble::Drain),
    (2, Trouble::Forget),
    (7, Trouble::ChangeCapacity),
    (5, Trouble::WipeCapacity),
    (7, Trouble::RestoreCapacity),
    (4, Trouble::SetHostClock),
    (6, Trouble::SetFleetTime),
    (7, Trouble::StallService),
    (3, Trouble::StallWatchers),
];

fn draw(exec: &Exec) -> Trouble {
    let all: u64 = TROUBLES.iter().map(|(weight, _)| weight).sum();
    let mut left = exec.between(0, all - 1);
    for (weight, trouble) in TROUBLES {
        match left.checked_sub(weight) {
            Some(rest) => left = rest,
            None => return trouble,
        }
    }
    Trouble::Crash
}

/// One thing goes wrong.
pub(crate) fn disturb(stage: &Rc<Stage>, capacities: &BTreeMap<AgentId, u32>) {
    let exec = &stage.exec;
    let services = stage.places.borrow().len() as u64;
    let me = usize::try_from(exec.between(0, services - 1)).unwrap_or(0);
    let victim = agent(exec.between(0, capacities.len() as u64 - 1));
    let capacity = capacities.get(&victim).copied().unwrap_or(1);
    if exec.chance(REPLICATED) {
        stage.replicate();
    }
    match draw(exec) {
        Trouble::Crash => {
            stage.crash(me);
            stage.count("services crashed");
            let task = Rc::clone(stage);
            exec.later(exec.between(100, 6_000), move || task.start(me));
        }
        Trouble::CutService => {
            let (bus, log) = [(true, true), (true, false), (false, true)]
                [usize::try_from(exec.between(0, 2)).unwrap_or(0)];
            cut_service(stage, me, bus, log, exec.between(300, 10_000));
        }
        Trouble::CutWatchers => {
            let lasts = exec.between(4_000, 14_000);
            for me in watchers(stage) {
                cut_service(stage, me, true, false, lasts);
            }
        }
        Trouble::KillAgent => replace(stage, &victim, capacity, true),
        Trouble::DoubleAgent => replace(stage, &victim, capacity, false),
        Trouble::FreezeAgent => {
            let until = exec.now() + exec.between(500, 9_000);
            if let Some(at) = current(stage, &victim) {
                stage.say(|| format!("{victim} freezes until {until}"));
                stage.instances.borrow_mut()[at].frozen_until = until;
            }
        }
        Trouble::CutAgent => cut_agent(stage, &victim, exec.between(500, 10_000)),
        Trouble::CutAllAgents => {
            let lasts = exec.between(2_000, 9_000);
            stage.count("fleets cut off");
            for agent in capacities.keys() {
                cut_agent(stage, agent, lasts);
            }
        }
        Trouble::LoseAgent => lose_agent(stage, &victim),
        Trouble::LoseHeartbeats => {
            let lasts = exec.between(1_000, 5_000);
            stage.lose(me, lossiness(exec), lasts);
        }
        Trouble::LoseEverywhere => lose_everywhere(stage),
        Trouble::StopAgent => stop_agent(stage, &victim, capacity),
        Trouble::Drain => {
            let deadline = exec.chance(400).then(|| exec.between(500, 6_000));
            operate(stage, &victim, Order::Drain(deadline));
            if exec.chance(800) {
                let (task, victim) = (Rc::clone(stage), victim.clone());
                exec.later(exec.between(1_000, 12_000), move || operate(&task, &victim, Order::Undrain));
            }
        }
        Trouble::Forget => {
            operate(stage, &victim, Order::Forget);
            let task = Rc::clone(stage);
            exec.later(exec.between(1_000, 9_000), move || {
                task.boot(&victim, capacity);
            });
        }
        Trouble::ChangeCapacity => {
            if let Some(at) = current(stage, &victim) {
                stage.set_capacity(at, u32::try_from(exec.between(0, 4)).unwrap_or(1));
            }
        }
        Trouble::WipeCapacity => {
            stage.wipe();
            stage.count("capacity wiped");
        }
        Trouble::RestoreCapacity => stage.fail_over(),
        Trouble::SetHostClock => {
            stage.set_wall(me, stage.either_way(3_000));
            stage.count("clocks jumped");
        }
        Trouble::SetFleetTime => stage.set_fleet_time(stage.either_way(2_500)),
        Trouble::StallService => stage.stall(me, stall(exec), exec.chance(250)),
        Trouble::StallWatchers => {
            let lasts = stall(exec);
            watchers(stage).into_iter().for_each(|me| stage.stall(me, lasts, false));
        }
    }
}

/// Mostly short, now and then long enough for a connection to be given up.
fn stall(exec: &Exec) -> u64 {
    let longest = exec.between(300, 9_000);
    exec.between(200, longest)
}

/// Of a thousand.
fn lossiness(exec: &Exec) -> u64 {
    if exec.chance(500) { 1_000 } else { exec.between(200, 800) }
}

pub(crate) fn lose_everywhere(stage: &Rc<Stage>) {
    let (per_mille, lasts) = (lossiness(&stage.exec), stage.exec.between(1_000, 3_000));
    watchers(stage).into_iter().for_each(|me| stage.lose(me, per_mille, lasts));
}

fn watchers(stage: &Stage) -> Vec<usize> {
    let places = stage.places.borrow();
    (0..places.len()).filter(|me| places[*me].kind != Kind::Dispatcher).collect()
}

fn cut_service(stage: &Rc<Stage>, me: usize, bus: bool, log: bool, lasts: u64) {
    stage.set_link(me, bus, log);
    stage.count(if log { "services cut off from the log" } else { "services cut off from the bus" });
    let task = Rc::clone(stage);
    stage.exec.later(lasts, move || task.set_link(me, false, false));
}

fn cut_agent(stage: &Rc<Stage>, agent: &AgentId, lasts: u64) {
    stage.say(|| format!("{agent} is cut off for {lasts} ms"));
    stage.count("agents cut off");
    stage.agents_cut.borrow_mut().insert(agent.clone());
    stage.truth.borrow_mut().cut.push((agent.clone(), stage.exec.now(), stage.exec.now() + lasts));
    let (task, agent) = (Rc::clone(stage), agent.clone());
    stage.exec.later(lasts, move || {
        task.agents_cut.borrow_mut().remove(&agent);
    });
}

fn lose_agent(stage: &Rc<Stage>, agent: &AgentId) {
    let (per_mille, lasts) = (lossiness(&stage.exec), stage.exec.between(1_000, 8_000));
    stage.say(|| format!("{per_mille} of a thousand heartbeats of {agent} are lost for {lasts} ms"));
    stage.agents_losing.borrow_mut().insert(agent.clone(), per_mille);
    let (task, agent) = (Rc::clone(stage), agent.clone());
    stage.exec.later(lasts, move || {
        task.agents_losing.borrow_mut().remove(&agent);
    });
}

fn stop_agent(stage: &Rc<Stage>, agent: &AgentId, capacity: u32) {
    let Some(at) = current(stage, agent) else { return };
    stage.say(|| format!("{agent} is told to stop"));
    stage.shut_down(at, InFlight::Finish);
    let (task, agent) = (Rc::clone(stage), agent.clone());
    stage.exec.later(stage.exec.between(1_000, 9_000), move || {
        task.boot(&agent, capacity);
    });
}

/// The newest living instance.
pub(crate) fn current(stage: &Stage, agent: &AgentId) -> Option<usize> {
    let instances = stage.instances.borrow();
    (0..instances.len()).rev().find(|at| instances[*at].alive && instances[*at].agent == *agent)
}

/// A new instance; the old one is killed first, or goes on beside it.
fn replace(stage: &Rc<Stage>, agent: &AgentId, capacity: u32, kill: bool) {
    let mut after = 0;
    if kill {
        if let Some(at) = current(stage, agent) {
            stage.kill_instance(at);
            stage.count("agents killed");
        }
        after = stage.exec.between(200, 9_000);
    }
    let (task, agent) = (Rc::clone(stage), agent.clone());
    stage.exec.later(after, move || {
        task.boot(&agent, capacity);
    });
}
