//! What a handle has seen of each pool: by this it notices data that went backwards.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Epoch, Error, Result};

/// An epoch, and the highest version seen in it.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) epoch: Epoch,
    pub(crate) version: u64,
}

#[derive(Debug, Default)]
pub(crate) struct KnownPools {
    seen: Mutex<HashMap<String, Known>>,
    reflected: Mutex<HashMap<String, u64>>,
}

impl KnownPools {
    pub(crate) fn get(&self, pool: &str) -> Option<Known> {
        self.lock().get(pool).cloned()
    }

    /// Remembers what an answer showed. An answer that was overtaken by later ones changes nothing.
    pub(crate) fn note(&self, pool: &str, epoch: &Epoch, version: u64) {
        let mut pools = self.lock();
        match pools.get_mut(pool) {
            Some(known) if known.epoch > *epoch => {}
            Some(known) if known.epoch == *epoch => known.version = known.version.max(version),
            Some(known) => *known = Known { epoch: epoch.clone(), version },
            None => {
                pools.insert(pool.to_owned(), Known { epoch: epoch.clone(), version });
            }
        }
    }

    /// Another epoch is there than the known one: a later one is adopted, an earlier one means that the data went backwards.
    pub(crate) fn meet(&self, pool: &str, there: &Epoch) -> Result<()> {
        if self.get(pool).is_some_and(|known| known.epoch > *there) {
            return Err(Error::MovedBack { pool: pool.to_owned() });
        }
        tracing::info!(pool, epoch = %there, "capacity was rebuilt; following");
        self.note(pool, there, 0);
        Ok(())
    }

    /// The log sequence that the pool has reflected for sure; 0: nothing is known.
    pub(crate) fn reflected(&self, pool: &str) -> u64 {
        locked(&self.reflected).get(pool).copied().unwrap_or(0)
    }

    pub(crate) fn expect(&self, pool: &str, log_seq: u64) {
        let mut reflected = locked(&self.reflected);
        match reflected.get_mut(pool) {
            Some(known) => *known = log_seq.max(*known),
            None => _ = reflected.insert(pool.to_owned(), log_seq),
        }
    }

    pub(crate) fn expect_nothing(&self) {
        locked(&self.reflected).clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        locked(&self.seen)
    }
}

fn locked<T>(map: &Mutex<HashMap<String, T>>) -> MutexGuard<'_, HashMap<String, T>> {
    // Every change of the maps is a single step, so a panic elsewhere can't have left it half done.
    map.lock().unwrap_or_else(PoisonError::into_inner)
}
