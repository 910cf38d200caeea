//! Operators: they ask a prober for something about an agent.

use std::rc::Rc;

use health_prober::decide::Wish;
use rollcall_core::AgentId;

use crate::{
    exec::{Owner, Promise, pause},
    prober::Prober,
    services::Body,
    stage::Stage,
};

/// An operator waits so long for an answer.
const PATIENCE_MS: u64 = 5_000;
/// Tries of an operator who insists.
const TRIES: u32 = 20;

/// What an operator wants.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Order {
    /// With a deadline so many milliseconds away.
    Drain(Option<u64>),
    Undrain,
    Forget,
}

fn some_prober(stage: &Stage) -> Option<(usize, Rc<Prober>)> {
    let places = stage.places.borrow();
    let running = places.iter().enumerate().filter(|(_, place)| !place.link.bus_cut);
    let probers: Vec<_> = running
        .filter_map(|(me, place)| match &place.body {
            Some(Body::Prober(prober)) => Some((me, Rc::clone(prober))),
            _ => None,
        })
        .collect();
    let last = (probers.len() as u64).checked_sub(1)?;
    probers.get(usize::try_from(stage.exec.between(0, last)).unwrap_or(0)).cloned()
}

async fn ask(stage: &Rc<Stage>, agent: &AgentId, order: Order) -> bool {
    let answer = Promise::new(&stage.exec);
    answer.keep_after(PATIENCE_MS, false);
    let Some((me, prober)) = some_prober(stage) else { return answer.await };
    let (agent, kept) = (agent.clone(), answer.clone());
    stage.exec.spawn(Owner::Service(me), async move {
        let reason = "an operator wants it".to_owned();
        let granted = match order {
            Order::Drain(deadline) => prober.drain(&agent, deadline).await,
            Order::Undrain => prober.wish(&agent, Wish::Undrain { reason }).await,
            Order::Forget => prober.wish(&agent, Wish::Forget { reason }).await,
        };
        kept.keep(granted);
    });
    answer.await
}

/// Asks once; what comes of it is seen in the log.
pub(crate) fn operate(stage: &Rc<Stage>, agent: &AgentId, order: Order) {
    stage.say(|| format!("an operator wants {order:?} of {agent}"));
    let (stage, agent) = (Rc::clone(stage), agent.clone());
    let exec = Rc::clone(&stage.exec);
    exec.spawn(Owner::World, async move {
        if ask(&stage, &agent, order).await {
            stage.count(match order {
                Order::Drain(_) => "drains granted",
                Order::Undrain => "drains taken back",
                Order::Forget => "agents forgotten",
            });
        }
    });
}

/// Asks until it is granted.
pub(crate) fn insist(stage: &Rc<Stage>, agent: &AgentId, order: Order) {
    let (stage, agent) = (Rc::clone(stage), agent.clone());
    let exec = Rc::clone(&stage.exec);
    exec.spawn(Owner::World, async move {
        for _ in 0..TRIES {
            if ask(&stage, &agent, order).await {
                return;
            }
            pause(&stage.exec, 500).await;
        }
    });
}
