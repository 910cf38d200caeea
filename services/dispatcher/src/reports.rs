//! Taking in reports: durable until what they cause is in the log.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use rollcall_core::{
    AgentId, ExecutionId,
    event::SystemEventKind,
    execution::{Execution, ReportFacts, Standing, State},
    subject::PayloadKind,
    wire::{Outcome, Report},
};
use rollcall_nats::Delivery;

use crate::{ledger::DecideError, shell::Dispatcher, state::Change};

/// How long a `terminated` or `cancelled` that nobody wrote into the log waits for whoever asked the agent for it
/// (the watchdog, which writes its verdict as soon as the agent has answered) before it counts as a failure.
pub(crate) const ASKED_FOR_GRACE: Duration = Duration::from_secs(3);
pub(crate) const ASKED_FOR_GRACE_MS: u64 = ASKED_FOR_GRACE.as_millis() as u64;
/// Pause between two looks at such a report.
const ASKED_FOR_PAUSE: Duration = Duration::from_millis(250);
/// Most deliveries in that time. No clock can hold a report up for longer.
const ASKED_FOR_DELIVERIES_MAX: u64 = (ASKED_FOR_GRACE.as_millis() / ASKED_FOR_PAUSE.as_millis()) as u64 + 1;
/// Pause before a report is taken up again whose effect could not be written.
const TAKE_UP_AGAIN: Duration = Duration::from_secs(1);

/// What becomes of a report.
enum Verdict {
    /// What it caused is in the log (or it caused nothing).
    Done(Option<Box<Change>>),
    /// Whoever asked for it may still speak.
    Later,
    /// It will never count; the alarm says why.
    Refused(String),
}

impl Dispatcher {
    /// Applies one report and settles its delivery.
    pub(crate) async fn take_report(self: &Arc<Self>, delivery: Delivery) {
        let verdict = match self.read_report(&delivery) {
            Ok((agent, execution, report)) => self.judge_report(&delivery, &agent, &execution, report).await,
            Err(why) => Ok(Verdict::Refused(why)),
        };
        let subject = delivery.subject().to_string();
        let settled = match verdict {
            Ok(Verdict::Done(change)) => {
                let settled = delivery.ack().await;
                if let Some(change) = change {
                    self.carry_out(&change).await;
                }
                settled
            }
            Ok(Verdict::Later) => delivery.nak(ASKED_FOR_PAUSE).await,
            Ok(Verdict::Refused(why)) => {
                metrics::counter!("rollcall_reports_refused_total").increment(1);
                self.refused_report(&subject, &why).await;
                delivery.term().await
            }
            Err(error) => {
                tracing::warn!(subject, %error, "report taken up again later");
                delivery.nak(TAKE_UP_AGAIN).await
            }
        };
        if let Err(error) = settled {
            // It comes again and is found to be a repetition.
            tracing::debug!(subject, %error, "delivery not settled");
        }
    }

    fn read_report(&self, delivery: &Delivery) -> Result<(AgentId, ExecutionId, Report), String> {
        let (agent, execution) =
            self.subjects.of_report(delivery.subject()).ok_or("not the subject of a report")?;
        let agent = AgentId::new(agent).map_err(|e| e.to_string())?;
        let execution = ExecutionId::new(execution).map_err(|e| e.to_string())?;
        let report = Report::read(&agent, &execution, delivery.payload()).map_err(|e| e.to_string())?;
        Ok((agent, execution, report))
    }

    async fn judge_report(
        self: &Arc<Self>,
        delivery: &Delivery,
        agent: &AgentId,
        id: &ExecutionId,
        report: Report,
    ) -> Result<Verdict, DecideError> {
        let known = match self.ledger.execution(id) {
            Some(known) => Some(known),
            None => self.ledger.fresh_execution(id).await?,
        };
        let Some(mut execution) = known else {
            return Ok(Verdict::Refused(format!("there is no execution {id}")));
        };
        let mut standing = execution.standing(agent, report.attempt, report.outcome);
        if !matches!(standing, Standing::Current) {
            // Anything but the ordinary case is judged on what the log says now.
            execution = self.ledger.fresh_execution(id).await?.unwrap_or(execution);
            standing = execution.standing(agent, report.attempt, report.outcome);
        }
        match standing {
            Standing::Duplicate => return Ok(Verdict::Done(None)),
            Standing::Refused(why) => return Ok(Verdict::Refused(why)),
            Standing::Current if self.may_be_asked_for(delivery, &execution, report.outcome) => {
                return Ok(Verdict::Later);
            }
            Standing::Current | Standing::LateCompletion | Standing::NoLongerCounts(_) => {}
        }
        let facts = self.facts(agent, id, report).await?;
        let mut nothing = false;
        let decided = self
            .ledger
            .decide(id, |e| {
                e.report(facts.clone()).ok_or_else(|| {
                    nothing = true;
                    rollcall_core::execution::Refusal::State(e.state.as_str())
                })
            })
            .await;
        match decided {
            Ok(change) => {
                metrics::counter!("rollcall_reports_total", "outcome" => facts.outcome.as_str()).increment(1);
                Ok(Verdict::Done(Some(Box::new(change))))
            }
            Err(DecideError::Refused(_)) if nothing => Ok(Verdict::Done(None)),
            Err(error) => Err(error),
        }
    }

    /// Dead by its own word although the log knows nobody who wanted that: the watchdog may be about to say so.
    fn may_be_asked_for(&self, delivery: &Delivery, execution: &Execution, outcome: Outcome) -> bool {
        if !is_asked_for(execution, outcome) {
            return false;
        }
        let waited = self.ledger.now().as_millis() - delivery.time().timestamp_millis();
        is_in_grace(u64::try_from(waited).unwrap_or(0), delivery.delivered())
    }

    /// The same where an orchestrator says so of work with external delivery: waits until the watchdog has spoken, or has had the
    /// time to. It asks for the end of such work when it is out of time, or has stood still.
    pub(crate) async fn wait_for_who_asked(&self, known: &Execution, attempt: u32, outcome: Outcome) {
        let until = tokio::time::Instant::now() + ASKED_FOR_GRACE;
        let may_be_asked_for = |execution: &Execution| {
            let Some(held) = execution.holder().filter(|held| held.number == attempt) else { return false };
            let near_its_end = self.ledger.now().plus_ms(ASKED_FOR_GRACE_MS) >= held.deadline;
            is_asked_for(execution, outcome) && (near_its_end || execution.request.stall_timeout_ms.is_some())
        };
        // What is not in memory any more has ended.
        let mut latest = Some(known.clone());
        while latest.is_some_and(|execution| may_be_asked_for(&execution))
            && tokio::time::Instant::now() < until
        {
            tokio::time::sleep(ASKED_FOR_PAUSE).await;
            latest = self.ledger.execution(known.id());
        }
    }

    async fn facts(
        &self,
        agent: &AgentId,
        id: &ExecutionId,
        report: Report,
    ) -> Result<ReportFacts, DecideError> {
        let store = async |kind, raw: Option<Box<serde_json::value::RawValue>>| match raw {
            Some(raw) => {
                let bytes = Bytes::from(String::from(Box::<str>::from(raw)));
                self.store(id, kind, report.attempt, bytes).await.map(Some)
            }
            None => Ok(None),
        };
        let unavailable = |e: rollcall_nats::StoreError| {
            DecideError::Append(rollcall_nats::AppendError::Unavailable(e.to_string()))
        };
        let result = store(PayloadKind::Result, report.result).await.map_err(unavailable)?;
        let checkpoint = store(PayloadKind::Checkpoint, report.checkpoint).await.map_err(unavailable)?;
        Ok(ReportFacts {
            agent_id: agent.clone(),
            instance_id: report.instance_id,
            attempt: report.attempt,
            outcome: report.outcome,
            result,
            checkpoint,
            error: report.error,
        })
    }

    /// Raises the alarm about a refused report, at most one event a source and minute: whoever sends nonsense may
    /// not fill the log with it.
    async fn refused_report(&self, subject: &str, why: &str) {
        let source = self.subjects.of_report(subject).map_or(subject, |(agent, _)| agent).to_owned();
        if self.alarms.may_speak(&source, self.ledger.now()) {
            let shown: String = subject.chars().take(300).collect();
            tracing::warn!(subject = shown.escape_default().to_string(), why, "report refused");
            self.ledger
                .system(SystemEventKind::ReportRefused, serde_json::json!({"subject": shown, "cause": why}))
                .await;
        }
    }
}

/// Whether this is a word for somebody who asked for its end, and whom the log does not know yet.
fn is_asked_for(execution: &Execution, outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Terminated | Outcome::Cancelled) && execution.state != State::Cancelling
}

/// Whether a report that came `waited_ms` ago, and now for the `delivered`th time, waits for whoever asked for it.
fn is_in_grace(waited_ms: u64, delivered: u64) -> bool {
    u128::from(waited_ms) < ASKED_FOR_GRACE.as_millis() && delivered <= ASKED_FOR_DELIVERIES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asked_for_an_end_is_waited_for_by_the_clock_and_by_deliveries() {
        assert!(is_in_grace(0, 1) && is_in_grace(2_999, 13));
        assert!(!is_in_grace(3_000, 2));
        // A clock that stands still, or is behind the stream's, can't hold it up.
        assert!(!is_in_grace(0, 14));
    }
}
