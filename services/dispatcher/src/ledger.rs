//! The log and its fold together: read, decide, append, fold. Every decision of the dispatcher goes through here.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use rollcall_core::{
    AgentId, Clock, ExecutionId, Timestamp,
    agent::Agent,
    event::{Event, EventBody, ExecutionEvent, SystemEvent, SystemEventKind},
    execution::{Execution, Refusal},
    subject::{EventSubject, Subjects},
    time::SystemClock,
    wire::ApiError,
};
use rollcall_nats::{Append, AppendError, Entry, EventLog, ReadError};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use crate::state::{Change, Logged, Projection};

/// Tries of one decision against a log that moves under it. Each lost try means that somebody else's event
/// landed, and an execution has few of them.
const DECISION_TRIES_MAX: u32 = 16;

/// Who wrote an event of ours, whichever replica it was.
const SOURCE_PREFIX: &str = "/rollcall/dispatcher/";

/// Why a decision came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum DecideError {
    /// There is no such execution.
    #[error("there is no execution {0}")]
    NotFound(ExecutionId),
    /// It is not in a state for that.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The log can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The log can't be written.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// Somebody else was faster, again and again.
    #[error("execution {0} changed {DECISION_TRIES_MAX} times while this was decided")]
    Contended(ExecutionId),
}

impl From<DecideError> for ApiError {
    fn from(error: DecideError) -> Self {
        use rollcall_core::wire::ErrorCode;
        match error {
            DecideError::NotFound(_) => Self::new(ErrorCode::NotFound, error.to_string()),
            DecideError::Refused(_) => Self::new(ErrorCode::Conflict, error.to_string()),
            DecideError::Append(AppendError::TooLarge { .. }) => {
                Self::new(ErrorCode::TooLarge, error.to_string())
            }
            DecideError::Read(_) | DecideError::Append(_) | DecideError::Contended(_) => {
                Self::unavailable(error.to_string())
            }
        }
    }
}

/// What an entry of the log turned out to be.
#[derive(Debug)]
pub(crate) enum Ingested {
    /// News of an agent.
    Agent(AgentId),
    /// An event of an execution whose beginning is not in memory.
    Unknown(ExecutionId),
    /// No valid event for its subject, or one that can't follow; why.
    Invalid(String),
    /// Folded, or of no interest.
    Nothing,
}

/// Whether somebody other than a dispatcher wrote it. What a dispatcher writes, that one carries out.
fn is_foreign(event: &Event) -> bool {
    !event.source.starts_with(SOURCE_PREFIX)
}

/// The log, folded.
pub(crate) struct Ledger {
    log: EventLog,
    subjects: Subjects,
    source: String,
    clock: Arc<SystemClock>,
    projection: Mutex<Projection>,
    position: watch::Sender<u64>,
    live: AtomicBool,
    foreign: mpsc::UnboundedSender<Vec<Change>>,
}

/// The changes that others made to executions, each once: those of one execution that were met together, in their order.
pub(crate) type ForeignChanges = mpsc::UnboundedReceiver<Vec<Change>>;

impl Ledger {
    /// An empty fold of `log`; `instance` names this process in the events it writes. What others change comes out of the
    /// receiver once the ledger is live.
    #[must_use]
    pub(crate) fn new(
        log: EventLog,
        subjects: Subjects,
        instance: &str,
        clock: Arc<SystemClock>,
    ) -> (Self, ForeignChanges) {
        let (foreign, changes) = mpsc::unbounded_channel();
        let ledger = Self {
            log,
            subjects,
            source: format!("{SOURCE_PREFIX}{instance}"),
            clock,
            projection: Mutex::default(),
            position: watch::Sender::new(0),
            live: AtomicBool::new(false),
            foreign,
        };
        (ledger, changes)
    }

    /// From here on changes of others are handed out; what was in the log before, the start-up reconcile sees to.
    /// `true`: it was live before.
    pub(crate) fn go_live(&self) -> bool {
        self.live.swap(true, Ordering::AcqRel)
    }

    /// Whether the fold has caught up with the log once.
    #[must_use]
    pub(crate) fn is_live(&self) -> bool {
        self.live.load(Ordering::Acquire)
    }

    /// Passes on what others changed. Whoever takes the fold past such a change does this, be it the tail or a read that
    /// is ahead of it: nobody will meet it again.
    fn hand_out(&self, changes: Vec<Change>) {
        if !changes.is_empty() && self.is_live() {
            // Nobody listens any more: the process ends, and the next one reconciles.
            let _ = self.foreign.send(changes);
        }
    }

    /// The log itself.
    #[must_use]
    pub(crate) const fn log(&self) -> &EventLog {
        &self.log
    }

    /// The present instant.
    #[must_use]
    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// How far the log was folded.
    #[must_use]
    pub(crate) fn position(&self) -> u64 {
        *self.position.borrow()
    }

    fn lock(&self) -> MutexGuard<'_, Projection> {
        // Folding never leaves a half-made change behind, so what a panicking reader saw is whole.
        self.projection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the fold.
    pub(crate) fn read<R>(&self, read: impl FnOnce(&Projection) -> R) -> R {
        read(&self.lock())
    }

    /// An execution as far as it was folded.
    #[must_use]
    pub(crate) fn execution(&self, id: &ExecutionId) -> Option<Execution> {
        self.read(|p| p.execution(id).cloned())
    }

    /// An agent as far as it was folded.
    #[must_use]
    pub(crate) fn agent(&self, id: &AgentId) -> Option<Agent> {
        self.read(|p| p.agent(id).cloned())
    }

    /// Says that the log is folded as far as this. Whoever waits for that takes the fold at its word, so what an entry was
    /// [found](Ingested::Unknown) to need is read before.
    pub(crate) fn passed(&self, seq: u64) {
        self.position.send_if_modified(|position| {
            let moved = seq > *position;
            *position = seq.max(*position);
            moved
        });
    }

    /// Folds an entry that the tail delivered. It has not [`passed`](Self::passed) before everything that comes of it is done.
    pub(crate) fn ingest(&self, entry: &Entry) -> Ingested {
        let event = match self.decode(entry) {
            Ok(event) => event,
            Err(why) => return Ingested::Invalid(why),
        };
        match &event.body {
            EventBody::Execution(body) => {
                let mut projection = self.lock();
                let known = projection.execution(body.execution_id()).is_some();
                match projection.apply_execution(entry.seq, body, event.time) {
                    Ok(Some(change)) => {
                        if is_foreign(&event) {
                            self.hand_out(vec![change]);
                        }
                        Ingested::Nothing
                    }
                    Ok(None) if !known => Ingested::Unknown(body.execution_id().clone()),
                    Ok(None) => Ingested::Nothing,
                    Err(misfit) => Ingested::Invalid(misfit.to_string()),
                }
            }
            EventBody::Agent(body) => {
                if self.lock().apply_agent(entry.seq, body, event.time) {
                    Ingested::Agent(body.agent_id().clone())
                } else {
                    Ingested::Nothing
                }
            }
            EventBody::System(_) => Ingested::Nothing,
        }
    }

    /// An entry as the event that its subject allows.
    fn decode(&self, entry: &Entry) -> Result<Event, String> {
        let event = Event::decode(&entry.bytes).map_err(|e| e.to_string())?;
        let subject = self.subjects.of_event(&entry.subject).ok_or("not a subject of the log")?;
        let (token, named) = match (&subject, &event.body) {
            (EventSubject::Execution(id), EventBody::Execution(body)) => {
                (id.as_str(), body.execution_id().as_str())
            }
            (EventSubject::Agent(id), EventBody::Agent(body)) => (id.as_str(), body.agent_id().as_str()),
            (EventSubject::System(name), EventBody::System(_)) => (name.as_str(), name.as_str()),
            _ => return Err(format!("a {} event on another family's subject", event.body.short_type())),
        };
        if token != named || (!matches!(subject, EventSubject::System(_)) && event.subject != token) {
            return Err(format!("a {} event about something else than its subject", event.body.short_type()));
        }
        Ok(event)
    }

    fn event(&self, subject: &str, body: EventBody) -> Event {
        Event {
            id: Uuid::now_v7(),
            source: self.source.clone(),
            subject: subject.to_owned(),
            time: self.clock.now(),
            body,
        }
    }

    /// The execution with everything that was in the log when this was called.
    pub(crate) async fn fresh_execution(&self, id: &ExecutionId) -> Result<Option<Execution>, ReadError> {
        let subject = self.subjects.execution_event(id);
        let Some(last) = self.log.last(&subject).await? else { return Ok(None) };
        if let Some(known) = self.execution(id).filter(|e| e.seq >= last.seq) {
            return Ok(Some(known));
        }
        self.load_execution(id, self.position()).await
    }

    /// The execution from its history in the log. `delivered`: how far the tail had delivered the log before this was
    /// called, without the entry that made it necessary.
    pub(crate) async fn load_execution(
        &self,
        id: &ExecutionId,
        delivered: u64,
    ) -> Result<Option<Execution>, ReadError> {
        let entries = self.log.history(&self.subjects.execution_event(id)).await?;
        let events: Vec<(u64, Event)> =
            entries.iter().filter_map(|entry| Some((entry.seq, self.decode(entry).ok()?))).collect();
        let history = events.iter().filter_map(|(seq, event)| match &event.body {
            EventBody::Execution(body) => {
                Some(Logged { seq: *seq, event: body, time: event.time, foreign: is_foreign(event) })
            }
            _ => None,
        });
        let last = entries.last().map_or(0, |entry| entry.seq);
        let (folded, changes) = self.lock().catch_up(history, last, delivered);
        self.hand_out(changes);
        Ok(folded)
    }

    /// The agent with everything that was in the log when this was called.
    pub(crate) async fn fresh_agent(&self, id: &AgentId) -> Result<Option<Agent>, ReadError> {
        let subject = self.subjects.agent_event(id);
        let Some(last) = self.log.last(&subject).await? else { return Ok(None) };
        if let Some(known) = self.agent(id).filter(|a| a.seq >= last.seq) {
            return Ok(Some(known));
        }
        let mut agent = Agent::unknown(id.clone());
        for entry in self.log.history(&subject).await? {
            if let Ok(Event { body: EventBody::Agent(body), time, .. }) = self.decode(&entry) {
                agent.evolve(entry.seq, &body, time);
            }
        }
        Ok(Some(agent).filter(Agent::is_known))
    }

    /// Waits until everything that is in the log now is folded.
    pub(crate) async fn current(&self) -> Result<u64, ReadError> {
        let last = self.log.last_seq().await?;
        let mut position = self.position.subscribe();
        // The sender lives as long as this ledger, so waiting only ends with the position.
        let _ = position.wait_for(|position| *position >= last).await;
        Ok(last)
    }

    /// Appends the first event of an execution. `None`: there is one with this id already.
    pub(crate) async fn submit(&self, event: ExecutionEvent) -> Result<Option<Execution>, AppendError> {
        let ExecutionEvent::Submitted(request) = &event else {
            return Err(AppendError::Other("the first event of an execution is submitted".to_owned()));
        };
        let id = request.execution_id.clone();
        let request = request.clone();
        let event = self.event(id.as_str(), event.into());
        match self.append(&self.subjects.execution_event(&id), &event, 0).await? {
            Append::Appended { seq } => {
                let execution = Execution::submitted(request, seq, event.time);
                self.lock().insert(execution.clone());
                Ok(Some(execution))
            }
            Append::Conflict { .. } => Ok(None),
        }
    }

    async fn append(&self, subject: &str, event: &Event, expected: u64) -> Result<Append, AppendError> {
        let bytes = Bytes::from(event.encode());
        let started = std::time::Instant::now();
        let result = self.log.append(subject, &event.id.to_string(), bytes, expected).await;
        metrics::histogram!("rollcall_append_seconds").record(started.elapsed());
        result
    }

    /// Decides on an execution and appends the decision; decides again when somebody was faster.
    pub(crate) async fn decide(
        &self,
        id: &ExecutionId,
        mut decision: impl FnMut(&Execution) -> Result<ExecutionEvent, Refusal> + Send,
    ) -> Result<Change, DecideError> {
        let mut known = self.execution(id);
        for tries in 0..DECISION_TRIES_MAX {
            let execution = match known.take() {
                Some(execution) => execution,
                None => {
                    let loaded = self.load_execution(id, self.position()).await?;
                    loaded.ok_or_else(|| DecideError::NotFound(id.clone()))?
                }
            };
            let decided = match decision(&execution) {
                Ok(event) => event,
                // Refused on what may be old knowledge: look again before saying no.
                Err(_) if tries == 0 => match self.fresh_execution(id).await? {
                    Some(fresh) if fresh.seq > execution.seq => {
                        known = Some(fresh);
                        continue;
                    }
                    _ => {
                        return Err(decision(&execution)
                            .err()
                            .map_or_else(|| DecideError::Contended(id.clone()), DecideError::Refused));
                    }
                },
                Err(refusal) => return Err(refusal.into()),
            };
            let event = self.event(id.as_str(), decided.into());
            let appended = self.append(&self.subjects.execution_event(id), &event, execution.seq).await?;
            let Append::Appended { seq } = appended else { continue };
            let EventBody::Execution(body) = &event.body else { continue };
            let mut after = execution.clone();
            if let Err(misfit) = after.evolve(seq, body, event.time) {
                tracing::error!(execution_id = %id, %misfit, "decided an event that does not fit");
            }
            self.lock().insert(after.clone());
            return Ok(Change { before: Some(execution), after });
        }
        Err(DecideError::Contended(id.clone()))
    }

    /// Says something about the service itself. Failing to is logged and not more: no decision hangs on it.
    pub(crate) async fn system(&self, kind: SystemEventKind, payload: serde_json::Value) {
        let subject = self.subjects.system_event("dispatcher");
        for _ in 0..DECISION_TRIES_MAX {
            let event = self.event("dispatcher", SystemEvent { kind, data: payload.clone() }.into());
            let appended = match self.log.last(&subject).await {
                Ok(last) => {
                    self.append(&subject, &event, last.map_or(0, |l| l.seq)).await.map_err(|e| e.to_string())
                }
                Err(error) => Err(error.to_string()),
            };
            match appended {
                Ok(Append::Appended { .. }) => return,
                Ok(Append::Conflict { .. }) => {}
                Err(error) => {
                    tracing::warn!(kind = kind.as_str(), %payload, error, "could not record a system event");
                    return;
                }
            }
        }
        tracing::warn!(kind = kind.as_str(), %payload, "could not record a system event: too much contention");
    }
}

#[cfg(test)]
mod tests;
