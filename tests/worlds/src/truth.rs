//! What really happened in a world: only its judge may look at it.

use std::collections::{BTreeMap, BTreeSet};

use rollcall_core::{AgentId, ExecutionId, InstanceId};

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
