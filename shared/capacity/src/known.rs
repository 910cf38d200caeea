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
pub(crate) struct KnownPools(Mutex<HashMap<String, Known>>);

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

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        // Every change of the map is a single step, so a panic elsewhere can't have left it half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
