//! Where everything that wants the agent to end comes together.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::shutdown::{Latch, Phase, Plan, Signal, Trigger};

/// The plan, and who may change it.
#[derive(Debug)]
pub(crate) struct Control {
    plan: watch::Sender<Plan>,
    drain: Duration,
    latch: Latch,
}

impl Control {
    pub(crate) fn new(drain: Duration) -> Self {
        Self { plan: watch::Sender::new(Plan::default()), drain, latch: Latch::default() }
    }

    pub(crate) fn trigger(&self, trigger: &Trigger) {
        let mut phases = (Phase::Serve, Phase::Serve);
        self.plan.send_modify(|plan| {
            phases.0 = plan.phase;
            plan.apply(trigger, Instant::now(), self.drain);
            phases.1 = plan.phase;
        });
        // A goodbye comes with every heartbeat's reply until the agent is gone: only what changes something is news.
        if phases.0 != phases.1 {
            tracing::info!(trigger = %trigger, from = ?phases.0, to = ?phases.1, "told to end");
        }
    }

    /// True for the one caller that runs the shutdown routine.
    pub(crate) fn takes_routine(&self) -> bool {
        self.latch.first()
    }

    pub(crate) fn plan(&self) -> Plan {
        self.plan.borrow().clone()
    }

    /// Waits until the shutdown has to go at least so far.
    pub(crate) async fn reached(&self, phase: Phase) {
        // The sender is `self`, so the channel can't be closed meanwhile.
        let _ = self.plan.subscribe().wait_for(|plan| plan.phase >= phase).await;
    }

    /// Waits until the drain deadline is nearer than `until`.
    pub(crate) async fn nearer_than(&self, until: Instant) {
        let _ = self.plan.subscribe().wait_for(|plan| plan.drain_until.is_some_and(|at| at < until)).await;
    }
}

/// Ends an agent from outside.
#[derive(Debug, Clone)]
pub struct AgentHandle(pub(crate) Arc<Control>);

impl AgentHandle {
    /// Begins the shutdown, or hurries it, just as the trigger would by itself.
    pub fn trigger(&self, trigger: &Trigger) {
        self.0.trigger(trigger);
    }

    /// Begins the shutdown because the program wants to end; `reason` is a word for the heartbeats.
    pub fn shut_down(&self, reason: &str) {
        self.0.trigger(&Trigger::Program(reason.to_owned()));
    }

    /// Makes SIGTERM and SIGINT of this process triggers, for as long as the process lives.
    ///
    /// # Errors
    /// The system refuses to hand over signals.
    pub fn on_signals(&self) -> std::io::Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let control = Arc::clone(&self.0);
        tokio::spawn(async move {
            loop {
                let received = tokio::select! {
                    Some(()) = term.recv() => Signal::Term,
                    Some(()) = int.recv() => Signal::Int,
                    else => return,
                };
                control.trigger(&Trigger::Signal(received));
            }
        });
        Ok(())
    }
}
