//! The operations that only look, on pooled connections.

use super::operation::{self, Arg};
use super::{RedisCapacity, Reply, unavailable};
use crate::types::exact;
use crate::{
    AgentSetting, AgentView, Epoch, Meta, PAGE, PoolState, PoolView, Result, ScanCursor, ScanPage,
    Unconfirmed, keys,
};

/// What is asked of the `meta` key.
const META_FIELDS: [&str; 5] = ["epoch", "state", "log_seq", "version", "since_ms"];

impl RedisCapacity {
    pub(super) async fn do_inspect(&self, pool: &str, agent: &str, limit: usize) -> Result<AgentView> {
        let mut view = AgentView::default();
        let mut from = 0;
        loop {
            let page = PAGE.min(limit - from);
            let args = [Arg::Text(agent), Arg::Number(from as u64), Arg::Number(page as u64)];
            let (_, mut reply) = self.view(&operation::INSPECT, pool, &args).await?;
            view.setting = setting(&mut reply)?;
            view.held_back = reply.text()? == "1";
            view.held_count = reply.count()?;
            let held = reply.held()?;
            view.queue_len = reply.count()?;
            let queue = reply.queued(from as u64)?;
            let last = held.len() < page && queue.len() < page;
            view.held.extend(held);
            view.queue.extend(queue);
            from += page;
            if last || from >= limit {
                return Ok(view);
            }
        }
    }

    pub(super) async fn do_inspect_pool(&self, pool: &str, limit: usize) -> Result<PoolView> {
        let mut view = PoolView::default();
        let mut from = 0;
        loop {
            let page = PAGE.min(limit - from);
            let args = [Arg::Number(from as u64), Arg::Number(page as u64)];
            let (_, mut reply) = self.view(&operation::INSPECT_POOL, pool, &args).await?;
            view.free_agents = reply.count()?;
            view.queue_len = reply.count()?;
            let queue = reply.queued(from as u64)?;
            let last = queue.len() < page;
            view.queue.extend(queue);
            from += page;
            if last || from >= limit {
                return Ok(view);
            }
        }
    }

    pub(super) async fn do_scan(&self, pool: &str, from: Option<ScanCursor>) -> Result<ScanPage> {
        let args = [Arg::Number(from.unwrap_or_default().0), Arg::Number(PAGE as u64)];
        let (_, mut reply) = self.view(&operation::SCAN, pool, &args).await?;
        let next = reply.text()?;
        let next: u64 = next.parse().map_err(|_| reply.wrong(format!("cursor {next:?}")))?;
        let mut list = reply.list()?;
        let mut holds = Vec::new();
        while !list.is_empty() {
            let hold = list.hold()?;
            holds.extend(list.placed(hold)?);
        }
        Ok(ScanPage { holds, next: (next != 0).then_some(ScanCursor(next)) })
    }

    pub(super) async fn do_unconfirmed(
        &self,
        pool: &str,
        before_ms: u64,
        limit: usize,
    ) -> Result<Vec<Unconfirmed>> {
        let before_ms = exact("before_ms", before_ms)?;
        let args = [Arg::Number(before_ms), Arg::Number(limit.min(PAGE) as u64)];
        let (epoch, mut reply) = self.view(&operation::UNCONFIRMED, pool, &args).await?;
        let mut list = reply.list()?;
        let mut unconfirmed = Vec::new();
        while !list.is_empty() {
            let (hold, since_ms) = (list.hold()?, list.score()?);
            if let Some(placed) = list.placed(hold)? {
                unconfirmed.push(Unconfirmed { placed, since_ms, epoch: epoch.clone() });
            }
        }
        Ok(unconfirmed)
    }

    pub(super) async fn do_waiting_with_free(&self, pool: &str) -> Result<Vec<String>> {
        let mut agents = Vec::new();
        let mut from = 0;
        loop {
            let args = [Arg::Number(from), Arg::Number(PAGE as u64)];
            let (_, mut reply) = self.view(&operation::WAITING_WITH_FREE, pool, &args).await?;
            let looked_at = reply.count()?;
            let mut list = reply.list()?;
            while !list.is_empty() {
                agents.push(list.text()?);
            }
            from += looked_at;
            if looked_at < PAGE as u64 {
                agents.sort_unstable();
                agents.dedup();
                return Ok(agents);
            }
        }
    }

    pub(super) async fn do_agents(&self, pool: &str) -> Result<Vec<String>> {
        let mut agents: Vec<String> = Vec::new();
        loop {
            let after = agents.last().cloned().unwrap_or_default();
            let args = [Arg::Text(&after), Arg::Number(PAGE as u64)];
            let (_, mut reply) = self.view(&operation::AGENTS, pool, &args).await?;
            let mut list = reply.list()?;
            let before = agents.len();
            while !list.is_empty() {
                agents.push(list.text()?);
            }
            if agents.len() - before < PAGE {
                return Ok(agents);
            }
        }
    }

    pub(super) async fn read_meta(&self, pool: &str) -> Result<Option<Meta>> {
        let mut command = redis::cmd("HMGET");
        command.arg(keys::meta(&self.0.prefix, pool)).arg(&META_FIELDS);
        let value = self.command(&command).await?;
        let fields: Vec<Option<String>> =
            redis::from_redis_value(value).map_err(|error| unavailable(error.into()))?;
        let [Some(epoch), Some(state), Some(log_seq), Some(version), Some(since_ms)] = fields.as_slice()
        else {
            return Ok(None);
        };
        let number = |text: &String| {
            text.parse::<u64>().map_err(|_| crate::Error::Reply {
                operation: "meta",
                what: format!("{text:?} is no number"),
            })
        };
        Ok(Some(Meta {
            epoch: Epoch::read(epoch),
            state: if state == "ready" { PoolState::Ready } else { PoolState::Rebuilding },
            log_seq: number(log_seq)?,
            version: number(version)?,
            since_ms: number(since_ms)?,
        }))
    }

    pub(super) async fn read_pools(&self) -> Result<Vec<String>> {
        let mut command = redis::cmd("SMEMBERS");
        command.arg(keys::pools(&self.0.prefix));
        let value = self.command(&command).await?;
        let mut pools: Vec<String> =
            redis::from_redis_value(value).map_err(|error| unavailable(error.into()))?;
        pools.sort_unstable();
        Ok(pools)
    }
}

/// `capacity, open, setting sequence, external only`, all empty for an agent without a setting.
fn setting(reply: &mut Reply) -> Result<Option<AgentSetting>> {
    let (capacity, open, setting_seq) = (reply.text()?, reply.text()?, reply.text()?);
    let external_only = reply.text()? == "1";
    if capacity.is_empty() {
        return Ok(None);
    }
    match (capacity.parse(), setting_seq.parse()) {
        (Ok(capacity), Ok(setting_seq)) => {
            Ok(Some(AgentSetting { capacity, open: open == "1", setting_seq, external_only }))
        }
        _ => Err(reply.wrong(format!("setting {capacity:?}, {setting_seq:?}"))),
    }
}
