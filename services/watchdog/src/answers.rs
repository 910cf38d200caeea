//! What registries answered a moment ago: however many executions of an agent are in trouble, it is asked once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rollcall_control::{Control, Registries, RegistryError, RegistryList};
use rollcall_core::AgentId;
use tokio::time::Instant;

/// The last answer of one agent; whoever asks while a call is under way waits for that one.
type Place = Arc<tokio::sync::Mutex<Option<Kept>>>;

#[derive(Debug)]
struct Kept {
    came_at: Instant,
    control: Control,
    answer: Result<RegistryList, RegistryError>,
}

/// The last answers, by agent.
#[derive(Debug, Default)]
pub struct Answers(Mutex<HashMap<AgentId, Place>>);

impl Answers {
    fn place(&self, agent: &AgentId) -> Place {
        // Changed by single calls: a panic can't have left it half changed.
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(places.entry(agent.clone()).or_default())
    }

    /// An answer that came at `not_before` or later; asks for one if there is none. `news` is told of one that is new.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub async fn get(
        &self,
        registries: &Registries,
        (agent, control): (&AgentId, &Control),
        not_before: Instant,
        timeout: Duration,
        news: impl FnOnce(&RegistryList),
    ) -> Result<RegistryList, RegistryError> {
        let place = self.place(agent);
        let mut kept = place.lock().await;
        if let Some(kept) = kept.as_ref().filter(|k| k.came_at >= not_before && k.control == *control) {
            return kept.answer.clone();
        }
        let answer = registries.running(control, timeout).await;
        if let Ok(list) = &answer {
            news(list);
        }
        *kept = Some(Kept { came_at: Instant::now(), control: control.clone(), answer: answer.clone() });
        answer
    }
}
