//! Watching ourselves, and the small errands beside the judgements: sight, breaker, zombies, first greetings.

use std::{sync::Arc, time::Duration};

use rollcall_core::{
    AgentId, Clock as _, ExecutionId, InstanceId, Timestamp, event::SystemEventKind, execution::Execution,
};
use rollcall_nats::{
    Head, ReadError,
    canary::{BLIND_INTERVAL, CANARY_INTERVAL, CANARY_TIMEOUT},
    isolation,
};
use rollcall_service::{LoopHealth, clock::correction_ms};
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    ears, edge, follow,
    shared::Shared,
    sight::{STALL_VOID_MS, Void},
    zombie::{ClaimFacts, ClaimVerdict, Known, judge_claim, retry_pause_ms},
};

/// Zombies and greetings that are under way at once.
const ERRANDS_MAX: usize = 64;
/// Greetings that wait; more are forgotten: the instance is then known to answer only once it was asked otherwise.
const GREETINGS_MAX: usize = 100_000;
/// Time between two looks at the breaker while it is open.
const BREAKER_INTERVAL: Duration = Duration::from_millis(500);

static ERRANDS: Semaphore = Semaphore::const_new(ERRANDS_MAX);

/// Watches connection, drops, stalls and clock, and opens the eyes again, until shutdown.
pub async fn watch_self(
    shared: Arc<Shared>,
    mut seen: watch::Receiver<u64>,
    mut loop_health: watch::Receiver<LoopHealth>,
    stop: CancellationToken,
) {
    let mut link = shared.bus.link();
    let mut drops = shared.bus.slow_consumer_drops();
    let mut epoch = link.borrow_and_update().epoch;
    let mut last_health = *loop_health.borrow_and_update();
    shared.with(|world, _| world.sight.set_connected(true));
    let mut saw = false;
    let mut next_at = Instant::now();
    loop {
        let (blind, trouble) =
            shared.with(|world, _| (world.sight.since().is_none(), world.sight.trouble().as_str()));
        metrics::gauge!("rollcall_watchdog_sees").set(if blind { 0.0 } else { 1.0 });
        if blind && saw {
            tracing::warn!(why = trouble, "evidence is void until a message of our own comes back");
            next_at = Instant::now();
        }
        saw = !blind;
        // Whatever else happens is noticed while a canary is on its way, above all what it would be late to tell.
        let look = async {
            tokio::time::sleep_until(next_at).await;
            if blind {
                open_eyes(&shared, &mut seen).await;
                BLIND_INTERVAL
            } else {
                prove(&shared, &mut seen).await;
                CANARY_INTERVAL
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            changed = link.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = *link.borrow_and_update();
                shared.with(|world, _| {
                    world.sight.set_connected(now.connected);
                    if now.epoch != epoch {
                        world.void(Void::BusCut);
                    }
                });
                epoch = now.epoch;
            }
            // Something else than us made us blind.
            () = shared.blinded.notified() => {}
            Ok(()) = drops.changed() => shared.with(|world, _| world.void(Void::Dropped)),
            Ok(()) = loop_health.changed() => {
                let health = *loop_health.borrow_and_update();
                suspect_loop(&shared, &last_health, &health);
                last_health = health;
            }
            pause = look => next_at = Instant::now() + pause,
        }
    }
}

fn suspect_loop(shared: &Shared, before: &LoopHealth, now: &LoopHealth) {
    // Of several stalls between two looks only the last and the longest ever are known: then the longest counts.
    let longest = if now.stalls - before.stalls > 1 { Some(now.worst_stall) } else { None };
    let lasted = longest.or_else(|| now.last_stall.filter(|_| now.stalls > before.stalls).map(|s| s.lasted));
    let stalled = lasted.is_some_and(|lasted| lasted >= Duration::from_millis(STALL_VOID_MS));
    let jumped = now.jumps > before.jumps;
    shared.with(|world, _| {
        if stalled {
            world.void(Void::Stalled);
        }
        if jumped {
            world.void(Void::ClockJump);
        }
    });
}

/// While we see: the proof that we still do, and that what we know of the log is not old.
async fn prove(shared: &Shared, seen: &mut watch::Receiver<u64>) {
    if !shared.bus.is_connected() {
        return;
    }
    let (head, back) = tokio::join!(tokio::time::timeout(CANARY_TIMEOUT, head(shared)), ears::canary(shared));
    if !back {
        return shared.with(|world, _| world.void(Void::CanaryLost));
    }
    // A log that does not answer now takes no verdict either.
    if let Ok(Ok(head)) = head
        && !is_read(seen, head.last_seq).await
    {
        shared.with(|world, _| world.void(Void::TailLag));
    }
}

/// While blind: the log read to its present end, and a canary that was sent after the trouble.
async fn open_eyes(shared: &Shared, seen: &mut watch::Receiver<u64>) {
    let (epoch, caught_up) = shared.with(|world, _| (world.sight.epoch(), world.sight.caught_up()));
    if !caught_up || !shared.bus.is_connected() {
        return;
    }
    let Ok(head) = head(shared).await else { return };
    if !is_read(seen, head.last_seq).await || !ears::canary(shared).await {
        return;
    }
    shared.with(|world, now| {
        if world.proven(epoch, now) {
            tracing::info!(after = world.sight.trouble().as_str(), "we see: every clock starts again");
        }
    });
}

/// The end of the log. Its server's time comes with it: our clock follows.
async fn head(shared: &Shared) -> Result<Head, ReadError> {
    let head = shared.log.head(&shared.clock).await?;
    if let Some(by_ms) = correction_ms(&head, false) {
        shared.shift_clock(by_ms);
    }
    Ok(head)
}

/// Whether the log is followed up to here, or is within the time of a canary.
async fn is_read(seen: &mut watch::Receiver<u64>, last_seq: u64) -> bool {
    let read = tokio::time::timeout(CANARY_TIMEOUT, seen.wait_for(|seen| *seen >= last_seq)).await;
    read.is_ok_and(|read| read.is_ok())
}

/// Suspends and resumes silence-based recovery, until shutdown.
pub async fn watch_breaker(shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(BREAKER_INTERVAL) => {}
        }
        let (seeing, tripped, logged, count, expected, backlog_ms) = shared.with(|world, now| {
            if world.sight.caught_up() {
                world.check_breaker(now);
            }
            let (count, backlog_ms) = (world.silence(now), world.rate_backlog_ms(now));
            let seeing = world.sight.since().is_some();
            (seeing, world.is_tripped(), world.log_suspended, count, world.system_seq, backlog_ms)
        });
        metrics::gauge!("rollcall_recovery_suspended").set(if tripped || logged { 1.0 } else { 0.0 });
        metrics::gauge!("rollcall_recovery_backlog_seconds")
            .set(Duration::from_millis(backlog_ms).as_secs_f64());
        if !seeing || tripped == logged {
            continue;
        }
        let data = serde_json::json!({
            "cause": "too many agents fell silent within the window",
            "silent": count.silent,
            "of": count.of,
            "window_ms": crate::config::ms(shared.settings.breaker_window),
        });
        let kind =
            if tripped { SystemEventKind::RecoverySuspended } else { SystemEventKind::RecoveryResumed };
        // What is not in the log now is said again with the next look, if it still holds.
        let _ = shared.say(kind, data, expected).await;
    }
}

/// Starts what the world wants done beside the judgements.
pub async fn errands(shared: &Arc<Shared>, tasks: &TaskTracker) {
    let (zombies, greetings) = shared.with(|world, _| {
        let excess = world.greetings_due.len().saturating_sub(GREETINGS_MAX);
        world.greetings_due.drain(..excess);
        let free = ERRANDS.available_permits().min(world.greetings_due.len());
        let greetings: Vec<_> = world.greetings_due.drain(..free).collect();
        let free = ERRANDS.available_permits().saturating_sub(greetings.len());
        (world.take_zombies(free), greetings)
    });
    for (agent, instance) in greetings {
        let shared = Arc::clone(shared);
        tasks.spawn(async move {
            let Ok(_permit) = ERRANDS.acquire().await else { return };
            edge::look(&shared, &agent, &instance).await;
            // More may wait for the place that is free now.
            shared.wake.notify_one();
        });
    }
    for (agent, instance) in zombies {
        let shared = Arc::clone(shared);
        tasks.spawn(async move {
            let Ok(_permit) = ERRANDS.acquire().await else { return };
            if let Err(panic) = isolation::catch(lay_to_rest(&shared, &agent, &instance)).await {
                tracing::error!(agent_id = %agent, panic, "looking into its list failed");
            }
            shared.with(|world, _| world.zombies_done(&(agent, instance)));
            // More may wait for the place that is free now.
            shared.wake.notify_one();
        });
    }
}

/// Looks into the claims of an instance that are not theirs.
async fn lay_to_rest(shared: &Shared, agent: &AgentId, instance: &InstanceId) {
    let extras = shared.with(|world, now| {
        let Some(claims) = world.agents.get(agent).and_then(|e| e.claims_of(instance.as_str())) else {
            return Vec::new();
        };
        let judged = claims.extras().iter().map(|e| {
            let facts = ClaimFacts { known: e.known, times: e.times, next_ask_at: e.next_ask_at };
            (e.id.clone(), e.attempt, judge_claim(facts, now))
        });
        judged.filter(|(_, _, verdict)| *verdict != ClaimVerdict::Leave).collect::<Vec<_>>()
    });
    for (id, attempt, verdict) in extras {
        // The log's own word, from its leader, before anything is ended.
        let Ok(known) = follow::refresh(shared, &id).await else { return };
        let theirs = shared.with(|world, _| {
            // Over HTTP the end is asked for by id alone: it would be the end of whatever attempt it holds by now.
            let any = world.agents.get(agent).is_some_and(|entry| entry.agent.control().is_some());
            let held = world.executions.get(&id).and_then(Execution::holder);
            held.is_some_and(|h| {
                h.agent_id == *agent && (any || h.instance_id == *instance && h.number == attempt)
            })
        });
        let known = if known.is_none() { Known::Nothing } else { Known::NotTheirs };
        if known == Known::Nothing || theirs || verdict == ClaimVerdict::Read {
            note_extra(shared, agent, instance, &id, attempt, known, None);
            continue;
        }
        metrics::counter!("rollcall_zombies_total").increment(1);
        tracing::warn!(execution_id = %id, attempt, agent_id = %agent, instance_id = %instance,
            "zombie: listed after it ended or went elsewhere, asking to end it");
        shared.with(|world, _| world.counters.zombies += 1);
        // Before it is asked: the lists that come meanwhile don't ask again.
        note_extra(shared, agent, instance, &id, attempt, known, Some(shared.clock.now()));
        let ending = edge::terminate(shared, agent, instance, &id, attempt, "zombie").await;
        if let Some(why) = ending.trouble() {
            tracing::warn!(execution_id = %id, agent_id = %agent, why, "the zombie's end is not confirmed");
        }
    }
}

fn note_extra(
    shared: &Shared,
    agent: &AgentId,
    instance: &InstanceId,
    id: &ExecutionId,
    attempt: u32,
    known: Known,
    asked_at: Option<Timestamp>,
) {
    shared.with(|world, _| {
        let claims = world.agents.get_mut(agent).and_then(|e| e.claims_mut(instance.as_str()));
        let extra =
            claims.and_then(|c| c.extras_mut().iter_mut().find(|e| e.id == *id && e.attempt == attempt));
        if let Some(extra) = extra {
            if extra.known != known {
                // Only lists from now on come after what was just read.
                extra.known = known;
                extra.times = 0;
            }
            if let Some(at) = asked_at {
                extra.next_ask_at = Some(at.plus_ms(retry_pause_ms(extra.asked)));
                extra.asked = extra.asked.saturating_add(1);
            }
        }
    });
}
