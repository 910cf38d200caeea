//! Holes in the sequence numbers of heartbeats. Pure, and on the hottest path of the fleet.
//!
//! A client library drops messages silently when a buffer is full and reports only some of the drops, but every
//! heartbeat carries a `seq`. A hole alone proves little: `seq` rises by *at least* 1, so an agent may skip, and one
//! whose own link was cut leaves a hole as well. So a hole counts only
//! - of an agent whose heartbeats came one by one before it ([`STEADY_STEPS`]), and
//! - between two heartbeats that we heard with the same ears (the caller names the one before only then), and
//! - once per agent and [`WINDOW_MS`], whatever instances it goes through.
//!
//! Only holes of many agents at once ([`AGENTS_MIN`], one in [`AGENTS_SHARE`]) say that it was us. No single agent can
//! make them, and those that several make on purpose are believed once per [`PAUSE_MS`].

use crate::Timestamp;

/// Heartbeats in a row that came one by one before a hole of that agent counts: who skips now and then never gets
/// there. After a hole, with another instance and after we were deaf it is earned again.
pub const STEADY_STEPS: u8 = 8;
/// Holes of one loss are counted together for so long: two default intervals. Agents with longer intervals show theirs
/// over several windows, but in each window only those are counted that were heard in it.
pub const WINDOW_MS: u64 = 10_000;
/// So many agents at least. What one host with two agents does to them says nothing about us.
pub const AGENTS_MIN: u32 = 3;
/// One in so many of the agents heard in this window, or in the one before if those were more.
pub const AGENTS_SHARE: u32 = 10;
/// Not believed again for so long, or a few agents could put off every verdict for ever. Five minutes: longer than the
/// slowest agent takes to be silent to the default threshold (3.5 intervals of 60 s) and lost (60 s).
pub const PAUSE_MS: u64 = 300_000;

/// What is remembered of one agent, in three bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Steps {
    /// Heartbeats in a row that came one by one, at most [`STEADY_STEPS`].
    steady: u8,
    /// The window it was last heard in, 0: none yet. It comes round after 255 windows: then an agent that was silent
    /// for exactly that long is one too few among those heard.
    window: u8,
    /// A hole of it was counted in that window.
    holed: bool,
}

impl Steps {
    /// What came before it was heard with other ears.
    pub const fn forget(&mut self) {
        self.steady = 0;
    }
}

/// The holes of a fleet.
#[derive(Debug, Clone, Default)]
pub struct Gaps {
    window: u8,
    began: Timestamp,
    /// Agents heard in this window.
    heard: u32,
    /// Of those, with a hole.
    holed: u32,
    /// Agents heard in the window before. `None`: there was none, so it is not known what few or many is.
    heard_before: Option<u32>,
    /// Not believed before.
    believed_from: Timestamp,
    suspicious: bool,
}

impl Gaps {
    /// One heartbeat that counts. `before`: the sequence number of the one before it, of the same instance, if we heard
    /// that one and could hear all the time since. True: there is a hole that counts.
    pub fn hear(&mut self, steps: &mut Steps, before: Option<u64>, seq: u64, now: Timestamp) -> bool {
        if now.since_ms(self.began) >= WINDOW_MS {
            self.turn(now);
        }
        if steps.window != self.window {
            steps.window = self.window;
            steps.holed = false;
            self.heard = self.heard.saturating_add(1);
        }
        let Some(before) = before else {
            steps.forget();
            return false;
        };
        if seq == before.saturating_add(1) {
            steps.steady = steps.steady.saturating_add(1).min(STEADY_STEPS);
            return false;
        }
        if std::mem::take(&mut steps.steady) < STEADY_STEPS {
            return false;
        }
        if !std::mem::replace(&mut steps.holed, true) {
            self.holed = self.holed.saturating_add(1);
            self.suspect(now);
        }
        true
    }

    fn suspect(&mut self, now: Timestamp) {
        let Some(heard_before) = self.heard_before else { return };
        let of = self.heard.max(heard_before);
        if self.holed >= AGENTS_MIN
            && self.holed.saturating_mul(AGENTS_SHARE) >= of
            && now >= self.believed_from
        {
            self.suspicious = true;
            self.believed_from = now.plus_ms(PAUSE_MS);
        }
    }

    fn turn(&mut self, now: Timestamp) {
        if self.heard > 0 {
            self.heard_before = Some(self.heard);
        }
        self.window = self.window.checked_add(1).unwrap_or(1);
        self.began = now;
        self.heard = 0;
        self.holed = 0;
    }

    /// Whether so many agents have holes that it must have been us. True once per suspicion.
    pub const fn take_suspicion(&mut self) -> bool {
        std::mem::replace(&mut self.suspicious, false)
    }

    /// Evidence is void for whatever reason, or the clock was set: what was counted is forgotten.
    pub fn restart(&mut self, now: Timestamp) {
        let most = self.heard_before.max(Some(self.heard).filter(|heard| *heard > 0));
        self.turn(now);
        self.heard_before = most;
        self.suspicious = false;
        self.believed_from = self.believed_from.min(now.plus_ms(PAUSE_MS));
    }
}

#[cfg(test)]
mod tests;
