//! When to look at which execution again: one ordered structure. An execution that is not due costs nothing.

use std::collections::{BTreeSet, HashMap};

use rollcall_core::{ExecutionId, Timestamp};

/// At most one instant per execution.
#[derive(Debug, Default)]
pub struct Due {
    order: BTreeSet<(Timestamp, ExecutionId)>,
    at: HashMap<ExecutionId, Timestamp>,
}

impl Due {
    /// Looks at it at `at`, whatever was planned.
    pub fn set(&mut self, id: &ExecutionId, at: Timestamp) {
        if let Some(old) = self.at.insert(id.clone(), at) {
            if old == at {
                return;
            }
            self.order.remove(&(old, id.clone()));
        }
        self.order.insert((at, id.clone()));
    }

    /// Plans nothing for it.
    pub fn remove(&mut self, id: &ExecutionId) {
        if let Some(old) = self.at.remove(id) {
            self.order.remove(&(old, id.clone()));
        }
    }

    /// When the next one is due.
    #[must_use]
    pub fn next(&self) -> Option<Timestamp> {
        self.order.first().map(|(at, _)| *at)
    }

    /// When this one is due.
    #[must_use]
    pub fn of(&self, id: &ExecutionId) -> Option<Timestamp> {
        self.at.get(id).copied()
    }

    /// Takes the first that is due at `now`.
    pub fn pop(&mut self, now: Timestamp) -> Option<ExecutionId> {
        if self.next()? > now {
            return None;
        }
        let (_, id) = self.order.pop_first()?;
        self.at.remove(&id);
        Some(id)
    }

    /// The first that are due at `now`, at most `limit`, left where they are.
    pub fn ripe(&self, now: Timestamp, limit: usize) -> impl Iterator<Item = &ExecutionId> {
        self.order.iter().take_while(move |(at, _)| *at <= now).take(limit).map(|(_, id)| id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> ExecutionId {
        ExecutionId::new(text).unwrap()
    }

    #[test]
    fn one_entry_each_in_order_of_time() {
        let t = Timestamp::from_millis;
        let mut due = Due::default();
        due.set(&id("a"), t(30));
        due.set(&id("b"), t(10));
        due.set(&id("a"), t(20));
        assert_eq!((due.next(), due.of(&id("a"))), (Some(t(10)), Some(t(20))));
        assert_eq!(due.pop(t(9)), None);
        assert_eq!(due.pop(t(30)), Some(id("b")));
        assert_eq!(due.pop(t(30)), Some(id("a")));
        assert_eq!(due.pop(t(99)), None);
        due.set(&id("c"), t(5));
        due.remove(&id("c"));
        assert_eq!((due.next(), due.pop(t(99))), (None, None));
    }
}
