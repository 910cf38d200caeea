//! The operations that change something, on the hot connections.

use super::operation::{self, Arg, Operation};
use super::{Path, RedisCapacity, Reply};
use crate::types::exact;
use crate::{
    Admission, AgentSetting, Ask, Confirmation, Epoch, Filled, Grant, GrantedSlot, Hold, Outcome, PAGE,
    PROMOTE_BATCH, Queue, Removed, Requeue, Requeued, Result, Settled, Stamp,
};

const BATCH: Arg<'static> = Arg::Number(PROMOTE_BATCH as u64);

/// A moment for a script; none is an empty text.
fn moment(what: &'static str, at_ms: Option<u64>) -> Result<Arg<'static>> {
    at_ms.map_or(Ok(Arg::Text("")), |at| Ok(Arg::Number(exact(what, at)?)))
}

impl RedisCapacity {
    async fn change(
        &self,
        operation: &Operation,
        pool: &str,
        stamp: Stamp,
        args: &[Arg<'_>],
    ) -> Result<(Epoch, Reply)> {
        self.run(Path::Hot, operation, pool, stamp, args).await
    }

    pub(super) async fn do_admit_to_agent(
        &self,
        pool: &str,
        agent: &str,
        hold: &Hold,
        ask: Ask,
        stamp: Stamp,
    ) -> Result<Admission> {
        let member = hold.member();
        let args = [
            Arg::Text(agent),
            Arg::Text(&member),
            Arg::Number(ask.priority.get().into()),
            Arg::Number(ask.queue_depth.into()),
            BATCH,
        ];
        let (epoch, reply) = self.change(&operation::ADMIT_TO_AGENT, pool, stamp, &args).await?;
        admission(hold, epoch, reply)
    }

    pub(super) async fn do_admit_to_pool(
        &self,
        pool: &str,
        hold: &Hold,
        ask: Ask,
        stamp: Stamp,
    ) -> Result<Admission> {
        let member = hold.member();
        let args = [
            Arg::Text(&member),
            Arg::Number(ask.priority.get().into()),
            Arg::Number(ask.queue_depth.into()),
            BATCH,
            Arg::Number(ask.external.into()),
        ];
        let (epoch, reply) = self.change(&operation::ADMIT_TO_POOL, pool, stamp, &args).await?;
        admission(hold, epoch, reply)
    }

    pub(super) async fn do_confirm(&self, pool: &str, grant: &Grant, stamp: Stamp) -> Result<Confirmation> {
        let member = grant.hold.member();
        let args = [Arg::Text(&grant.agent), Arg::Text(&member), Arg::Text(grant.epoch.as_str())];
        let (_, mut reply) = self.change(&operation::CONFIRM, pool, stamp, &args).await?;
        match reply.text()?.as_str() {
            "confirmed" => Ok(Confirmation::Confirmed { reclaimed: false }),
            "crowded" => Ok(Confirmation::Crowded),
            "reclaimed" => Ok(Confirmation::Confirmed { reclaimed: true }),
            "lost" => Ok(Confirmation::Lost),
            other => Err(reply.wrong(format!("outcome {other:?}"))),
        }
    }

    pub(super) async fn do_confirm_queued(&self, pool: &str, hold: &Hold, stamp: Stamp) -> Result<bool> {
        let member = hold.member();
        let (_, mut reply) =
            self.change(&operation::CONFIRM_QUEUED, pool, stamp, &[Arg::Text(&member)]).await?;
        reply.flag()
    }

    pub(super) async fn do_settle(&self, pool: &str, hold: &Hold, stamp: Stamp) -> Result<Settled> {
        self.settled_by(&operation::SETTLE, pool, hold, stamp).await
    }

    pub(super) async fn do_reclaim(&self, pool: &str, hold: &Hold, stamp: Stamp) -> Result<Settled> {
        self.settled_by(&operation::RECLAIM, pool, hold, stamp).await
    }

    async fn settled_by(
        &self,
        operation: &Operation,
        pool: &str,
        hold: &Hold,
        stamp: Stamp,
    ) -> Result<Settled> {
        let member = hold.member();
        let (epoch, mut reply) = self.change(operation, pool, stamp, &[Arg::Text(&member)]).await?;
        Ok(Settled { released: reply.flag()?, dequeued: reply.flag()?, promoted: reply.grants(&epoch)? })
    }

    pub(super) async fn do_requeue(&self, pool: &str, requeue: &Requeue, stamp: Stamp) -> Result<Requeued> {
        let (old, new) = (requeue.old.member(), requeue.new.member());
        let queue = match &requeue.queue {
            Queue::Agent(agent) => agent.as_str(),
            Queue::Pool | Queue::External => "",
        };
        let args = [
            Arg::Text(&old),
            Arg::Text(&new),
            Arg::Text(queue),
            Arg::Number(requeue.priority.get().into()),
            Arg::Text(requeue.hold_back.as_deref().unwrap_or_default()),
            Arg::Number((requeue.queue == Queue::External).into()),
            moment("granted_at_ms", requeue.granted_at_ms)?,
            moment("granted_by_ms", requeue.granted_by_ms)?,
        ];
        let (epoch, mut reply) = self.change(&operation::REQUEUE, pool, stamp, &args).await?;
        Ok(Requeued {
            released: reply.flag()?,
            dequeued: reply.flag()?,
            queued: reply.flag()?,
            promoted: reply.grants(&epoch)?,
        })
    }

    pub(super) async fn do_adopt(
        &self,
        pool: &str,
        agent: &str,
        hold: &Hold,
        granted_at_ms: u64,
        stamp: Stamp,
    ) -> Result<bool> {
        let granted_at_ms = exact("granted_at_ms", granted_at_ms)?;
        let member = hold.member();
        let args = [Arg::Text(agent), Arg::Text(&member), Arg::Number(granted_at_ms)];
        let (_, mut reply) = self.change(&operation::ADOPT, pool, stamp, &args).await?;
        reply.flag()
    }

    pub(super) async fn do_relocate(
        &self,
        pool: &str,
        found: &GrantedSlot,
        agent: &str,
        since_ms: u64,
        stamp: Stamp,
    ) -> Result<bool> {
        let member = found.hold.member();
        let args = [
            Arg::Text(&found.agent),
            Arg::Text(&member),
            Arg::Number(exact("granted_at_ms", found.granted_at_ms)?),
            Arg::Text(agent),
            Arg::Number(exact("since_ms", since_ms)?),
        ];
        let (_, mut reply) = self.change(&operation::RELOCATE, pool, stamp, &args).await?;
        reply.flag()
    }

    pub(super) async fn do_set_agent(
        &self,
        pool: &str,
        agent: &str,
        setting: AgentSetting,
        stamp: Stamp,
    ) -> Result<Filled> {
        let args = [
            Arg::Text(agent),
            Arg::Number(setting.capacity.into()),
            Arg::Number(setting.open.into()),
            Arg::Number(exact("setting_seq", setting.setting_seq)?),
            BATCH,
            Arg::Number(setting.external_only.into()),
        ];
        let (epoch, reply) = self.change(&operation::SET_AGENT, pool, stamp, &args).await?;
        filled(&epoch, reply)
    }

    pub(super) async fn do_reopen(&self, pool: &str, agent: &str, stamp: Stamp) -> Result<Filled> {
        let (epoch, reply) = self.change(&operation::REOPEN, pool, stamp, &[Arg::Text(agent), BATCH]).await?;
        filled(&epoch, reply)
    }

    pub(super) async fn do_promote(&self, pool: &str, agent: &str, stamp: Stamp) -> Result<Filled> {
        let (epoch, reply) =
            self.change(&operation::PROMOTE, pool, stamp, &[Arg::Text(agent), BATCH]).await?;
        filled(&epoch, reply)
    }

    pub(super) async fn do_remove_agent(
        &self,
        pool: &str,
        agent: &str,
        setting_seq: u64,
        stamp: Stamp,
    ) -> Result<Removed> {
        let args =
            [Arg::Text(agent), Arg::Number(exact("setting_seq", setting_seq)?), Arg::Number(PAGE as u64)];
        let (_, mut reply) = self.change(&operation::REMOVE_AGENT, pool, stamp, &args).await?;
        Ok(Removed {
            applied: reply.flag()?,
            queued: reply.queued(0)?,
            held: reply.held()?,
            more: reply.flag()?,
        })
    }
}

fn admission(hold: &Hold, epoch: Epoch, mut reply: Reply) -> Result<Admission> {
    let kind = reply.text()?;
    let (outcome, already) = match kind.as_str() {
        "granted" => {
            let grant = Grant { hold: hold.clone(), agent: reply.text()?, epoch: epoch.clone() };
            let already = reply.int()?;
            (Outcome::Granted { grant, already: already != 0 }, already)
        }
        "queued" => {
            let position = reply.count()?;
            let already = reply.int()?;
            (Outcome::Queued { position, already: already != 0 }, already)
        }
        "full" => {
            reply.text()?;
            (Outcome::Full, reply.int()?)
        }
        other => return Err(reply.wrong(format!("outcome {other:?}"))),
    };
    Ok(Admission { outcome, as_asked: already != 2, promoted: reply.grants(&epoch)? })
}

fn filled(epoch: &Epoch, mut reply: Reply) -> Result<Filled> {
    Ok(Filled { applied: reply.flag()?, promoted: reply.grants(epoch)?, more: reply.flag()? })
}
