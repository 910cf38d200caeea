//! Taking in reports: acknowledged last, when what they cause is in the log.

use std::rc::Rc;

use dispatcher::state::Change;
use rollcall_core::{
    execution::{Execution, Refusal, ReportFacts, Standing, State},
    wire::Outcome,
};

use super::{Dispatcher, Undecided};
use crate::{Defect, exec::pause, log::Report};

const ACK_WAIT_MS: u64 = 3_000;
pub(super) const ASKED_FOR_GRACE_MS: u64 = 3_000;
const ASKED_FOR_PAUSE_MS: u64 = 250;
const TAKE_UP_AGAIN_MS: u64 = 1_000;
const PULL_MS: u64 = 100;

enum Verdict {
    Done(Option<Box<Change>>),
    Later,
}

impl Dispatcher {
    pub(super) fn take_reports(self: &Rc<Self>) {
        let this = Rc::clone(self);
        self.spawn(async move {
            loop {
                pause(&this.stage.exec, PULL_MS).await;
                if this.stage.link(this.me).log_cut {
                    continue;
                }
                let now = this.stage.exec.now();
                let delivery = this.stage.reports.borrow_mut().deliver(now, ACK_WAIT_MS);
                if let Some((number, report, published_at)) = delivery {
                    let worker = Rc::clone(&this);
                    this.spawn(async move { worker.take_report(number, report, published_at).await });
                }
            }
        });
    }

    async fn take_report(self: Rc<Self>, number: u64, report: Report, published_at: u64) {
        self.step().await;
        let verdict = self.judge_report(number, &report, published_at).await;
        match verdict {
            Ok(Verdict::Done(change)) => {
                self.step().await;
                self.ack(number);
                if let Some(change) = change {
                    self.step().await;
                    self.carry_out(&change).await;
                }
            }
            Ok(Verdict::Later) => self.nak(number, ASKED_FOR_PAUSE_MS),
            Err(_) => self.nak(number, TAKE_UP_AGAIN_MS),
        }
    }

    /// Acknowledgements get lost too: then the report comes again.
    fn ack(&self, number: u64) {
        if !self.stage.link(self.me).log_cut && self.stage.way().is_some() {
            self.stage.reports.borrow_mut().ack(number);
        }
    }

    fn nak(&self, number: u64, after: u64) {
        let until = self.stage.exec.now() + after;
        self.stage.reports.borrow_mut().nak(number, until);
    }

    async fn judge_report(
        self: &Rc<Self>,
        number: u64,
        report: &Report,
        published_at: u64,
    ) -> Result<Verdict, Undecided> {
        let id = &report.execution;
        let known = match self.execution(id) {
            Some(known) => Some(known),
            None => self.fresh(id).await?,
        };
        let Some(mut execution) = known else { return Ok(Verdict::Done(None)) };
        let standing = |e: &Execution| {
            let facts = self.facts(e, report);
            e.standing(&facts.agent_id, facts.attempt, facts.outcome)
        };
        if !matches!(standing(&execution), Standing::Current) {
            execution = self.fresh(id).await?.unwrap_or(execution);
        }
        match standing(&execution) {
            Standing::Duplicate | Standing::Refused(_) => return Ok(Verdict::Done(None)),
            Standing::Current if self.may_be_asked_for(&execution, report.outcome, published_at) => {
                return Ok(Verdict::Later);
            }
            Standing::Current | Standing::LateCompletion | Standing::NoLongerCounts(_) => {}
        }
        if self.stage.has(Defect::AckBeforeAppend) {
            self.ack(number);
        }
        // The result is stored first.
        self.stage.leader(self.me).await.map_err(|_| Undecided::Away)?;
        let mut nothing = false;
        let decided = self
            .decide(id, |e| {
                e.report(self.facts(e, report)).ok_or_else(|| {
                    nothing = true;
                    Refusal::State(e.state.as_str())
                })
            })
            .await;
        match decided {
            Ok(change) => Ok(Verdict::Done(Some(Box::new(change)))),
            Err(Undecided::Refused) if nothing => Ok(Verdict::Done(None)),
            Err(error) => Err(error),
        }
    }

    /// `release`. True: it was answered, be it with a conflict.
    pub(crate) async fn release_verb(self: &Rc<Self>, report: &Report) -> bool {
        let id = &report.execution;
        if !self.ready.get() {
            return false;
        }
        let Ok(known) = self.fresh(id).await else { return false };
        let Some(known) = known.filter(Execution::is_external) else { return true };
        let Some(attempt) = known.attempt_numbered(report.attempt).cloned() else { return true };
        match known.standing(&attempt.agent_id, report.attempt, report.outcome) {
            Standing::Duplicate | Standing::Refused(_) => return true,
            _ => {}
        }
        // The result is stored first.
        if self.stage.leader(self.me).await.is_err() {
            return false;
        }
        let facts = ReportFacts {
            agent_id: attempt.agent_id,
            instance_id: attempt.instance_id,
            ..self.facts(&known, report)
        };
        self.wait_for_who_asked(&known, report).await;
        let refused = |e: &Execution| Refusal::State(e.state.as_str());
        match self.decide(id, |e| e.report(facts.clone()).ok_or_else(|| refused(e))).await {
            Ok(change) => {
                self.carry_out(&change).await;
                true
            }
            Err(Undecided::Refused) => true,
            Err(Undecided::Away) => false,
        }
    }

    /// The watchdog may have asked for its end and be about to write so.
    async fn wait_for_who_asked(self: &Rc<Self>, known: &Execution, report: &Report) {
        let began = self.stage.exec.now();
        let mut waits = true;
        while waits {
            let now = self.execution(&report.execution);
            let execution = now.as_ref().unwrap_or(known);
            let held = execution.holder().filter(|held| held.number == report.attempt);
            waits = self.may_be_asked_for(execution, report.outcome, began)
                && held.is_some_and(|held| self.now().plus_ms(ASKED_FOR_GRACE_MS) >= held.deadline);
            pause(&self.stage.exec, ASKED_FOR_PAUSE_MS).await;
        }
    }

    fn may_be_asked_for(&self, execution: &Execution, outcome: Outcome, published_at: u64) -> bool {
        matches!(outcome, Outcome::Terminated | Outcome::Cancelled)
            && execution.state != State::Cancelling
            && self.stage.exec.now() - published_at < ASKED_FOR_GRACE_MS
    }

    /// The report as the decision sees it. Without the fence whatever counts now is what it is taken to speak of.
    fn facts(&self, execution: &Execution, report: &Report) -> ReportFacts {
        let mut facts = ReportFacts {
            agent_id: report.agent.clone(),
            instance_id: report.instance.clone(),
            attempt: report.attempt,
            outcome: report.outcome,
            result: None,
            checkpoint: None,
            error: None,
        };
        if self.stage.has(Defect::NoAttemptFence)
            && let Some(held) = execution.holder()
        {
            facts.attempt = held.number;
            facts.agent_id = held.agent_id.clone();
        }
        facts
    }
}
