//! What really happened in a world: only its judge may look at it.

use std::collections::{BTreeMap, BTreeSet};

use rollcall_core::{AgentId, ExecutionId, InstanceId};

use crate::log::Report;

/// Work as it really ran on an instance.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub agent: AgentId,
    pub instance: InstanceId,
    pub execution: ExecutionId,
    pub attempt: u32,
    pub began_at: u64,
    /// When it was put to the agent, which led to this.
    pub asked_at: u64,
    pub ended: Option<(u64, End)>,
}

/// How work came to an end where it ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It is over, or was ended, and its instance knows that.
    Over,
    /// Its instance has lost it, which no agent should: it may begin it anew.
    Forgotten,
    /// With its process.
    Killed,
}

/// What really happened, for the judge.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    /// When heartbeats that listed this attempt got on the bus and were lost to nobody by chance.
    pub listed: BTreeMap<(InstanceId, ExecutionId, u32), Vec<u64>>,
    /// The same of all its heartbeats, whatever they listed.
    pub beaten: BTreeMap<InstanceId, Vec<u64>>,
    /// Which services stood still, from when until when.
    pub stood: Vec<(usize, u64, u64)>,
    /// Which services lost heartbeats without knowing it, from when until when.
    pub losing: Vec<(usize, u64, u64)>,
    /// Which agents were cut off, from when until when.
    pub cut: Vec<(AgentId, u64, u64)>,
    /// Everything that ran, in the order in which it began.
    pub runs: Vec<Run>,
    /// When capacity went back to an older state.
    pub moved_back: Vec<u64>,
    /// When it was lost.
    pub wiped: Vec<u64>,
    /// When attempts with external delivery had their slot confirmed before they were granted, and after that.
    pub granted: BTreeMap<(ExecutionId, u32), (u64, Option<u64>)>,
    /// What orchestrators released, and somebody answered.
    pub released: Vec<Report>,
    /// When the instance stopped holding it.
    pub dropped: BTreeMap<(InstanceId, ExecutionId, u32), u64>,
    /// When the work itself ended there, reported or not.
    pub over: BTreeMap<(InstanceId, ExecutionId, u32), u64>,
    /// Since when it stands still there.
    pub stuck: BTreeMap<(InstanceId, ExecutionId, u32), u64>,
    /// Everything that agents reported, whether it arrived or not.
    pub reported: BTreeSet<(AgentId, ExecutionId, u32, &'static str)>,
    /// What was put to agents and when, repetitions too.
    pub asked: Vec<(u64, AgentId, ExecutionId, u32)>,
    /// Executions whose submission was answered well.
    pub accepted: BTreeSet<ExecutionId>,
    /// Executions that were seen in a slot, and waiting by the log, for longer than any launch takes.
    pub stranded: BTreeSet<ExecutionId>,
}

impl Truth {
    /// What runs there, if it does, runs no more.
    pub(crate) fn ran(&mut self, instance: &InstanceId, id: &ExecutionId, attempt: u32, now: u64, end: End) {
        let runs = |run: &&mut Run| {
            run.ended.is_none() && run.instance == *instance && run.execution == *id && run.attempt == attempt
        };
        if let Some(run) = self.runs.iter_mut().rev().find(runs) {
            run.ended = Some((now, end));
        }
    }
}
