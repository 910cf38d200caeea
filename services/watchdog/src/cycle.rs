//! The cycle: calls the registries, judges again all that is in trouble, and says how things stand. Timely verdicts do
//! not wait for it; it costs what is in trouble and what has a registry, not what runs.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use rollcall_control::CALLS_MAX;
use rollcall_core::{AgentId, ExecutionId, InstanceId, agent::Status, event::SystemEventKind};
use tokio_util::sync::CancellationToken;

use crate::{
    config::ms,
    edge::{self, Answer},
    report::{CycleReport, Registry},
    shared::Shared,
    state::AgentEntry,
};

/// Errors that a `recovery_failing` event names.
const ERRORS_NAMED_MAX: usize = 10;

/// Runs a cycle per interval until shutdown; one that is late is skipped.
pub async fn run_cycles(shared: Arc<Shared>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(shared.settings.cycle_interval.max(Duration::from_millis(1)));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        if shared.with(|world, _| world.sight.caught_up()) {
            // Another one runs on somebody's request: that is this one.
            let _ = run_cycle(&shared, false).await;
        }
    }
}

/// Runs one cycle. `None`: one is running.
pub async fn run_cycle(shared: &Shared, dry_run: bool) -> Option<CycleReport> {
    let _turn = shared.ledger.try_begin()?;
    let started_at = shared.now();
    let began = tokio::time::Instant::now();
    // A dry run asks nobody: an answer would count as a list.
    let registries = if dry_run { Registry::default() } else { call_registries(shared).await };
    if !dry_run {
        settle_troubles(shared);
    }
    let mut report = shared.with(|world, now| CycleReport::of(world, now, dry_run));
    let (counters, decided_on) = shared.with(|world, _| (world.counters.clone(), world.system_seq));
    report.cycle = shared.ledger.next_number();
    report.started_at = started_at;
    report.took_ms = ms(began.elapsed());
    report.registries = registries;
    report.since_last = shared.ledger.since_last(&counters, !dry_run);
    if dry_run {
        return Some(report);
    }
    show(&report);
    shared.ledger.keep(report.clone());
    if shared.ledger.begins_to_fail(&report.since_last) {
        let errors: Vec<&String> =
            report.executions.iter().filter_map(|e| e.last_error.as_ref()).take(ERRORS_NAMED_MAX).collect();
        let data = serde_json::json!({
            "recovered": report.since_last.recovered,
            "failed": report.since_last.failed,
            "errors": errors,
        });
        if !shared.say(SystemEventKind::RecoveryFailing, data, decided_on).await {
            shared.ledger.unsaid();
        }
    }
    Some(report)
}

async fn call_registries(shared: &Shared) -> Registry {
    let agents: Vec<(AgentId, InstanceId)> = shared.with(|world, _| {
        // Who is gone and holds nothing is asked nothing any more.
        let concerns = |entry: &&AgentEntry| {
            entry.agent.control().is_some()
                && (entry.agent.status != Some(Status::Gone) || !entry.held.is_empty())
        };
        let driven = world.agents.values().filter(concerns);
        driven
            .filter_map(|entry| {
                let instance = entry.agent.instance_id.clone()?;
                Some((entry.agent.id.clone(), instance))
            })
            .collect()
    });
    let asked = agents.len();
    let unreachable = stream::iter(agents)
        .map(|(agent, instance)| async move {
            match edge::look_anew(shared, &agent, &instance).await {
                Answer::Void | Answer::NoResponders => 1,
                Answer::None(reason) => {
                    tracing::debug!(agent_id = %agent, reason, "registry skipped in this cycle");
                    1
                }
                Answer::Holds(_) | Answer::HoldsAnyAttempt(_) => 0,
            }
        })
        .buffer_unordered(CALLS_MAX)
        .fold(0, |sum, one| async move { sum + one })
        .await;
    Registry { asked, unreachable }
}

fn settle_troubles(shared: &Shared) {
    shared.with(|world, now| {
        world.drop_past_grace(now);
        let ids: Vec<ExecutionId> = world.troubles.keys().cloned().collect();
        for id in ids {
            // What is planned stays planned: a look before its time would only ask the same again.
            if world.due.of(&id).is_none() {
                world.settle(&id, now);
            }
        }
    });
}

fn show(report: &CycleReport) {
    // Counts of executions and agents are far below 2^52.
    #[allow(clippy::cast_precision_loss)]
    let set = |name: &'static str, value: usize| metrics::gauge!(name).set(value as f64);
    set("rollcall_executions_open", report.open);
    set("rollcall_executions_troubled", report.rows.values().sum());
    set("rollcall_executions_deferred", report.categories.deferred);
    set("rollcall_executions_withheld", report.categories.withheld);
    set("rollcall_registries_unreachable", report.registries.unreachable);
    tracing::debug!(cycle = report.cycle, open = report.open, took_ms = report.took_ms, "cycle");
}
