//! Appends the life of a small made-up fleet to a log, for looking at the dashboard: `append_events NATS_URL [ROUNDS]`.
//! Only for a log of your own: what it appends never happened.

#[path = "../src/samples.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "shared with the tests; its constants are valid")]
mod samples;

use std::{collections::HashMap, time::Duration};

use anyhow::{Context, bail};
use rollcall_core::{
    Clock, Timestamp,
    agent::Status,
    event::{
        AgentEvent, Event, EventBody, ExecutionEvent, Marked, RecoveryAction, RecoveryReason,
        TerminateOutcome,
    },
    time::SystemClock,
};
use rollcall_nats::{Append, Bus, BusOptions, EventLog, ensure_streams};
use tokio_util::sync::CancellationToken;

/// Executions that lie in the past when it starts.
const PAST: u64 = 260;
/// Agents.
const AGENTS: u64 = 26;
/// Time between two rounds.
const ROUND: Duration = Duration::from_millis(300);

struct Writer {
    log: EventLog,
    last: HashMap<String, u64>,
}

impl Writer {
    async fn append(&mut self, mut event: Event, time: Timestamp) -> anyhow::Result<()> {
        event.time = time;
        match &mut event.body {
            EventBody::Agent(
                AgentEvent::Connected(c)
                | AgentEvent::Error(c)
                | AgentEvent::Disconnected(c)
                | AgentEvent::Draining(c),
            ) => c.since = time,
            EventBody::Execution(ExecutionEvent::Dispatched(d)) => {
                d.timeout_ms = 90_000;
                d.deadline = time.plus_ms(90_000);
            }
            _ => {}
        }
        let subject = match &event.body {
            EventBody::Agent(body) => samples::FLEET.agent_event(body.agent_id()),
            EventBody::Execution(body) => samples::FLEET.execution_event(body.execution_id()),
            EventBody::System(_) => samples::FLEET.system_event(&event.subject),
        };
        let last = match self.last.get(&subject) {
            Some(last) => *last,
            None => self.log.last(&subject).await?.map_or(0, |entry| entry.seq),
        };
        match self.log.append(&subject, &event.id.to_string(), event.encode().into(), last).await? {
            Append::Appended { seq } => self.last.insert(subject, seq),
            Append::Conflict { .. } => bail!("somebody else writes to {subject}"),
        };
        Ok(())
    }

    /// One execution, submitted at `time`, as far as `n` says it came.
    async fn life(&mut self, n: u64, time: Timestamp) -> anyhow::Result<()> {
        let id = format!("{:08x}-build-{n}", n.wrapping_mul(2_654_435_761) % 0xffff_ffff);
        let agent = format!("agent-{:02}", n * 7 % AGENTS);
        self.append(samples::submitted(&id, n.is_multiple_of(3).then_some(agent.as_str())), time).await?;
        if n % 17 == 3 {
            return Ok(());
        }
        self.append(samples::dispatched(&id, &agent, 1), time.plus_ms(4)).await?;
        if n % 11 == 1 {
            return Ok(());
        }
        self.append(samples::started(&id, &agent, 1), time.plus_ms(40)).await?;
        if n % 5 == 1 {
            return Ok(());
        }
        let end = time.plus_ms(900 + n * 37 % 20_000);
        if n % 7 != 2 {
            return self.append(samples::completed(&id, &agent, 1, false), end).await;
        }
        let mut event = samples::recovered(&id, &agent, 1);
        if let EventBody::Execution(ExecutionEvent::Recovered(recovered)) = &mut event.body {
            let all = RecoveryReason::ALL;
            recovered.reason = all[usize::try_from(n / 7)? % all.len()];
            recovered.detected_after_ms = 120 + n * 997 % 9_000;
            recovered.message = match recovered.reason {
                RecoveryReason::TimedOut => {
                    "it ran for 90 s and had 90 s; the agent confirmed its end".to_owned()
                }
                RecoveryReason::AgentLost => format!("{agent} has not been heard of for 61 s"),
                RecoveryReason::Orphaned => {
                    format!("{agent} beat twice since the dispatch and does not list it")
                }
                _ => format!("{agent} no longer holds it ({})", recovered.reason.as_str()),
            };
            if n.is_multiple_of(2) {
                recovered.action = RecoveryAction::Requeued;
                recovered.next_attempt = Some(2);
                recovered.terminate = TerminateOutcome::Confirmed;
            }
        }
        self.append(event, end).await
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().context("usage: append_events NATS_URL [ROUNDS]")?;
    let rounds: u64 = arguments.next().map_or(Ok(0), |text| text.parse())?;
    let options = BusOptions {
        url,
        prefix: "rollcall".into(),
        connection_name: "append-events".into(),
        ..BusOptions::default()
    };
    let bus = Bus::connect(options, CancellationToken::new()).await?;
    ensure_streams(&bus).await?;
    let mut writer = Writer { log: EventLog::new(&bus), last: HashMap::new() };
    let clock = SystemClock::new();
    let start = Timestamp::from_millis(clock.now().as_millis() - 1_800_000);
    for n in 0..AGENTS {
        let id = format!("agent-{n:02}");
        let at = start.plus_ms(n * 500);
        writer
            .append(samples::registered(&id, ["default", "gpu", "edge"][usize::try_from(n)? % 3]), at)
            .await?;
        writer.append(samples::status(&id, Status::Connected, None), at).await?;
        let status = match n {
            5 => Status::Error,
            11 => Status::Disconnected,
            17 => Status::Draining,
            _ => continue,
        };
        writer.append(samples::status(&id, status, Some(Status::Connected)), at.plus_ms(1_700_000)).await?;
    }
    let mark = Marked {
        agent_id: samples::agent_id("agent-09"),
        instance_id: None,
        reason: "lost 5 executions in 10 minutes".into(),
        count: Some(5),
        by: None,
    };
    writer
        .append(
            samples::event("agent-09", EventBody::Agent(AgentEvent::Quarantined(mark))),
            start.plus_ms(1_500_000),
        )
        .await?;
    for n in 0..PAST {
        writer.life(n, start.plus_ms(n * 6_600)).await?;
    }
    writer
        .append(
            samples::system("watchdog", serde_json::json!({"cause": "mass_silence", "silent": 9, "of": 26})),
            clock.now(),
        )
        .await?;
    println!("the past is in the log");
    for n in PAST..PAST + rounds {
        tokio::time::sleep(ROUND).await;
        writer.life(n, clock.now()).await?;
    }
    Ok(())
}
