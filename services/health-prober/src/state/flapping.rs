//! What an agent's falls weigh together: each as much as another when it happens, and half as much with every half-life.
//!
//! The weight decides how long a mark of flapping lasts and how much it damps, not whether there is one: that is the
//! contract's count of falls (PROTOCOL.md 2). Who fell four times once is soon forgiven, who did so for an hour is not.

use rollcall_core::Timestamp;

use super::{Known, Troubles, remember};

/// Falls within [`FLAP_WINDOW_MS`] that make an agent flapping (PROTOCOL.md 2).
pub const FLAP_FALLS: usize = 4;
/// Five minutes (PROTOCOL.md 2).
pub const FLAP_WINDOW_MS: u64 = 300_000;
/// What one fall weighs when it happens. Weights are integers, so that every replica comes to the same.
pub const FALL: u32 = 1000;
/// The most that all falls weigh: whoever flaps for however long is settled four half-lives after the last one.
pub const MOST: u32 = 16 * FALL;
/// Half of the contract's five minutes: four falls that are all just within them weigh as much as a fresh one, and it is
/// below that weight that an agent is settled. So no agent is settled and at once found to flap again.
pub const HALF_LIFE_MS: u64 = 150_000;

/// A flapping agent needs at least this many times the successes: it is believed later.
pub const FLAPPING_DAMPING: u32 = 3;

/// The weight of falls.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Penalty {
    /// At [`Self::at`].
    weight: u32,
    /// The last fall.
    at: Timestamp,
}

impl Penalty {
    /// One more fall, at `at`; what there was is decayed from `from` on, if that is later than the fall before.
    fn fall(&mut self, at: Timestamp, from: Timestamp) {
        let weight = decayed(self.weight, at.since_ms(self.at.max(from)));
        *self = Self { weight: weight.saturating_add(FALL).min(MOST), at: self.at.max(at) };
    }

    /// The clock was set, from `before` to `now`; it decays from there on.
    pub(super) fn rebase(&mut self, set_at: Timestamp, before: Timestamp, now: Timestamp) {
        *self = Self { weight: self.after(before.since_ms(self.at.max(set_at))), at: self.at.min(now) };
    }

    /// The last fall.
    const fn at(&self) -> Timestamp {
        self.at
    }

    /// What it weighs at this age.
    fn after(&self, age_ms: u64) -> u32 {
        decayed(self.weight, age_ms)
    }

    /// The age from which on it weighs less than one fresh fall.
    fn light_after_ms(&self) -> u64 {
        let (mut low, mut high) = (0, 5 * HALF_LIFE_MS);
        while low < high {
            let age_ms = u64::midpoint(low, high);
            if self.after(age_ms) < FALL {
                high = age_ms;
            } else {
                low = age_ms + 1;
            }
        }
        low
    }
}

impl Troubles {
    /// One more fall.
    pub(super) fn fall(&mut self, at: Timestamp) {
        remember(&mut self.falls, at, FLAP_FALLS);
        self.penalty.fall(at, self.clock_set_at);
    }
}

impl Known {
    /// Falls within the window that ends now.
    #[must_use]
    pub fn falls(&self, now: Timestamp) -> usize {
        let all = self.troubles.as_deref().map_or(&[][..], |troubles| &troubles.falls);
        all.iter().filter(|at| self.age_ms(**at, now) < FLAP_WINDOW_MS).count()
    }

    /// What its falls weigh now, [`FALL`] for a fresh one.
    #[must_use]
    pub fn penalty(&self, now: Timestamp) -> u32 {
        let penalty = self.troubles.as_deref().map_or(Penalty::default(), |troubles| troubles.penalty);
        penalty.after(self.age_ms(penalty.at(), now))
    }

    /// It flaps no more: its falls weigh less than a fresh one, and the contract's rule does not hold either. (It would
    /// only after the clock was set: falls from before then weigh less than their number says.)
    #[must_use]
    pub fn is_steady(&self, now: Timestamp) -> bool {
        self.penalty(now) < FALL && self.falls(now) < FLAP_FALLS
    }

    /// From when on it flaps no more, if it does not fall again.
    #[must_use]
    pub fn steady_due(&self) -> Option<Timestamp> {
        let troubles = self.troubles.as_deref()?;
        let light = self.old_at(troubles.penalty.at(), troubles.penalty.light_after_ms());
        let oldest = troubles.falls.iter().min().filter(|_| troubles.falls.len() >= FLAP_FALLS);
        let few = oldest.map(|at| self.old_at(*at, FLAP_WINDOW_MS));
        few.max(Some(light))
    }

    /// How many times the ordinary successes it takes to be believed: more while it is marked as flapping.
    #[must_use]
    pub fn damping(&self, now: Timestamp) -> u32 {
        if self.agent.flapping { damping(self.penalty(now)) } else { 1 }
    }
}

/// Three times the successes, and once more for every four falls' weight beyond the first four's: six times at the most.
const fn damping(weight: u32) -> u32 {
    FLAPPING_DAMPING + weight.saturating_sub(4 * FALL) / (4 * FALL)
}

/// Halved with every half-life and on a straight line in between, rounded up: never less than the exponential and at most
/// a sixteenth more, the same on every machine.
fn decayed(weight: u32, age_ms: u64) -> u32 {
    let halvings = age_ms / HALF_LIFE_MS;
    if halvings >= u64::from(u32::BITS) {
        return 0;
    }
    let from = u64::from(weight).div_ceil(1 << halvings);
    let lost = from * (age_ms % HALF_LIFE_MS) / (2 * HALF_LIFE_MS);
    u32::try_from(from - lost).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_takes_three_to_six_times_the_successes_by_the_weight_of_its_falls() {
        assert_eq!([0, 4 * FALL, 8 * FALL - 1, 8 * FALL, 12 * FALL, MOST].map(damping), [3, 3, 3, 4, 5, 6]);
    }

    proptest! {
        #[test]
        fn it_decays_as_an_exponential_does(weight in 0..=MOST, age_ms in 0u64..20 * HALF_LIFE_MS, more_ms in 0u64..HALF_LIFE_MS) {
            let decays = |age_ms: u64| f64::from(weight) * (-(age_ms as f64) / HALF_LIFE_MS as f64).exp2();
            let (exact, found) = (decays(age_ms), f64::from(decayed(weight, age_ms)));
            prop_assert!(found >= exact - 1e-6 && found <= exact * 1.0625 + 2.0, "{found} for {exact}");
            prop_assert!(decayed(weight, age_ms + more_ms) <= decayed(weight, age_ms), "it never rises by itself");
        }

        #[test]
        fn it_is_light_from_then_on_and_not_before(falls in prop::collection::vec(0u64..400_000, 1..40)) {
            let mut penalty = Penalty::default();
            let mut at = Timestamp::from_millis(1_000_000);
            for after_ms in falls {
                at = at.plus_ms(after_ms);
                penalty.fall(at, Timestamp::default());
                let light = penalty.light_after_ms();
                prop_assert!(penalty.after(light) < FALL && penalty.after(light - 1) >= FALL);
                prop_assert!(light <= 4 * HALF_LIFE_MS + HALF_LIFE_MS / 100, "{light}");
            }
        }
    }
}
