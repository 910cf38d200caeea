//! What the tasks of the service share: the world behind a lock that is never held across an await, and the bus.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use rollcall_core::{
    AgentId, Clock, Prefix, Timestamp,
    event::{Event, EventBody, SystemEvent, SystemEventKind},
    subject::Subjects,
    time::SystemClock,
};
use rollcall_nats::{Append, AppendError, Bus, EventLog, Reports};
use rollcall_service::{Context, Settings};
use tokio::sync::Notify;

use rollcall_control::{Registries, RegistryError};

use crate::{answers::Answers, ears::Ears, report::Ledger, state::World};

/// Shared by all tasks.
pub struct Shared {
    world: Mutex<World>,
    /// The scheduler waits on it.
    pub wake: Notify,
    /// The sentry waits on it.
    pub blinded: Notify,
    /// The connection.
    pub bus: Bus,
    /// The event log.
    pub log: EventLog,
    /// The report stream.
    pub reports: Reports,
    /// The subject table.
    pub subjects: Subjects,
    /// The time.
    pub clock: Arc<SystemClock>,
    /// `source` of our events.
    pub source: String,
    /// The settings.
    pub settings: Arc<Settings>,
    /// Heartbeats and canary.
    pub ears: Ears,
    /// Registries over HTTP.
    pub registries: Registries,
    /// What they answered a moment ago.
    pub answers: Answers,
    /// What was said last about registries that may not be asked.
    unasked: Mutex<HashMap<AgentId, String>>,
    /// Cycles and their reports.
    pub ledger: Ledger,
}

impl Shared {
    /// Everything, before any task runs.
    pub fn new(bus: &Bus, context: &Context, prefix: Prefix) -> Arc<Self> {
        let settings = Arc::clone(&context.settings);
        Arc::new(Self {
            world: Mutex::new(World::new(settings.as_ref().into())),
            wake: Notify::new(),
            blinded: Notify::new(),
            bus: bus.clone(),
            log: EventLog::new(bus),
            reports: Reports::new(bus),
            subjects: Subjects::new(prefix),
            clock: Arc::clone(&context.clock),
            source: context.event_source(),
            ears: Ears::default(),
            registries: Registries::new(&settings.allow_cidrs),
            answers: Answers::default(),
            unasked: Mutex::default(),
            ledger: Ledger::default(),
            settings,
        })
    }

    /// The present instant.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Looks at or changes the world; wakes the scheduler if something became due, and the sentry if we went blind.
    pub fn with<R>(&self, act: impl FnOnce(&mut World, Timestamp) -> R) -> R {
        // A panic inside leaves single values behind, no broken structure: the world goes on.
        let mut world = self.world.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&mut world, self.clock.now());
        let (woken, blinded) = (std::mem::take(&mut world.woken), std::mem::take(&mut world.blinded));
        drop(world);
        if woken {
            self.wake.notify_one();
        }
        if blinded {
            self.blinded.notify_one();
        }
        result
    }

    /// Moves the clock. Whatever was measured or planned with it begins anew, before anybody looks at it again.
    pub fn shift_clock(&self, by_ms: i64) {
        self.with(|world, _| {
            self.clock.shift(by_ms);
            world.rebase(self.clock.now());
        });
    }

    /// Appends one event and folds it in at once.
    ///
    /// # Errors
    /// See [`AppendError`].
    pub async fn append(
        &self,
        subject: &str,
        about: &str,
        body: EventBody,
        expected: u64,
        now: Timestamp,
    ) -> Result<Append, AppendError> {
        let id = uuid::Uuid::now_v7();
        let event = Event { id, source: self.source.clone(), subject: about.to_owned(), time: now, body };
        let bytes = Bytes::from(event.encode());
        let appended = self.log.append(subject, &id.to_string(), bytes.clone(), expected).await?;
        if let Append::Appended { seq } = appended {
            let applied = self.with(|world, now| world.apply(&self.subjects, subject, seq, &bytes, now));
            if let Err(error) = applied {
                tracing::error!(%error, subject, seq, "our own event does not fit what we know");
            }
        }
        Ok(appended)
    }

    /// Says once that a registry may not be asked, and again when that has another cause: until it may, nobody knows what
    /// its agent runs.
    pub fn warn_of_registry(&self, agent: &AgentId, error: &RegistryError) {
        let why = error.to_string();
        // Single values: a panic can't have left it half changed.
        let mut said = self.unasked.lock().unwrap_or_else(PoisonError::into_inner);
        if said.get(agent) != Some(&why) {
            tracing::warn!(agent_id = %agent, why, "nobody knows what it runs: only its deadlines bound its work");
            said.insert(agent.clone(), why);
        }
    }

    /// Appends an event about this service, decided when `expected` was the last one. A conflict means that another
    /// replica spoke first. Whether it is in the log.
    pub async fn say(&self, kind: SystemEventKind, data: serde_json::Value, expected: u64) -> bool {
        let now = self.now();
        let subject = self.subjects.system_event(crate::SERVICE);
        let body = SystemEvent { kind, data };
        match self.append(&subject, crate::SERVICE, body.into(), expected, now).await {
            Ok(Append::Appended { .. }) => {
                tracing::warn!(event = kind.as_str(), "system event");
                return true;
            }
            Ok(Append::Conflict { .. }) => {
                tracing::debug!(event = kind.as_str(), "another replica spoke first");
            }
            Err(error) => tracing::warn!(event = kind.as_str(), %error, "system event not appended"),
        }
        false
    }
}
