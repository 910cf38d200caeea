//! What one instance of an agent says it holds: the latest of its lists and what is odd about it. Pure, and the
//! hottest path of the service: a list that says the same as the one before costs a comparison.

use std::collections::{HashMap, HashSet};

use rollcall_core::{
    ExecutionId, InstanceId, Timestamp,
    wire::{AgentState, Claim, Heartbeat, OwnedClaim},
};

use crate::{facts::Listing, zombie::Known};

/// An execution on the latest list.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Which.
    pub id: ExecutionId,
    /// The attempt it names.
    pub attempt: u32,
    /// The highest progress it named.
    pub progress: Option<f64>,
    /// When that was first heard, in our present sight.
    pub rose_at: Timestamp,
    /// The same, however often we had to begin anew since.
    pub stands_since: Timestamp,
    /// When a heartbeat named its progress, if the latest did (where heartbeats are no lists: the latest that named any);
    /// `None`: none since our sight began, or what is listed names none any more, as it has finished.
    pub named_at: Option<Timestamp>,
}

/// An execution that the instance holds by the log and does not list.
#[derive(Debug, Clone)]
pub struct Missing {
    /// Which.
    pub id: ExecutionId,
    /// The attempt that is missing.
    pub attempt: u32,
    /// When the first list without it came, beyond the grace.
    pub since: Timestamp,
    /// The same, however often we had to count anew since; `None`: none beyond the grace yet.
    pub first: Option<Timestamp>,
    /// Lists in a row without it, beyond the grace.
    pub times: u32,
}

/// An execution that it lists and does not hold by the log.
#[derive(Debug, Clone)]
pub struct Extra {
    /// Which.
    pub id: ExecutionId,
    /// The attempt it names.
    pub attempt: u32,
    /// What the log says.
    pub known: Known,
    /// Lists in a row that name it.
    pub times: u32,
    /// Asked to end so often.
    pub asked: u32,
    /// Not to be asked again before.
    pub next_ask_at: Option<Timestamp>,
}

/// What the log expects of the instance, for one list.
pub trait Expectation {
    /// Executions it holds by the log, with attempt and the end of the dispatch grace.
    fn held(&self) -> impl Iterator<Item = (&ExecutionId, u32, Timestamp)>;
    /// Whether it holds this attempt by the log.
    fn holds(&self, id: &ExecutionId, attempt: u32) -> bool;
    /// What the log knows about a claim that is not among them.
    fn known(&self, id: &ExecutionId, attempt: u32) -> Known;
}

/// The lists of one instance.
#[derive(Debug, Clone)]
pub struct Claims {
    /// Whose.
    pub instance: InstanceId,
    /// `seq` of the latest heartbeat.
    pub seq: u64,
    /// When it came; `None`: heard only through other channels since our sight began.
    pub last_at: Option<Timestamp>,
    /// When the latest list came; `None`: none since our sight began.
    pub listed_at: Option<Timestamp>,
    /// When the latest list came at all.
    last_list_at: Option<Timestamp>,
    /// The interval it named.
    pub interval_ms: Option<u64>,
    /// It said `gone`.
    pub said_gone: bool,
    /// It said what it holds before, over NATS.
    pub answered: bool,
    /// It answered a ping before.
    pub pinged: bool,
    /// It was asked for the first time, so that those mean something.
    pub greeted: bool,
    /// A list that comes sooner after the last one that counted vouches for what it names, and counts against nothing.
    pub spacing_ms: u64,
    /// When that came.
    counted_at: Option<Timestamp>,
    /// Its heartbeats are no lists and name progress only: what it holds its registry says.
    only_progress: bool,
    listed: Vec<Listed>,
    missing: Vec<Missing>,
    extra: Vec<Extra>,
    /// What the log expects has changed since the last list.
    stale: bool,
}

/// What a list brought to light.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Oddities {
    /// Missing in enough lists to be judged.
    pub missing: Vec<ExecutionId>,
    /// On the first list since our sight began with the progress that we knew from before.
    pub standing: Vec<ExecutionId>,
    /// Listed in so many lists although it is not theirs that none of them was under way when it ended.
    pub lasting_extras: Vec<(ExecutionId, u32)>,
    /// Some extra is listed often enough to be judged.
    pub extras_due: bool,
}

impl Claims {
    /// Nothing heard yet.
    #[must_use]
    pub fn new(instance: InstanceId) -> Self {
        Self {
            instance,
            seq: 0,
            last_at: None,
            listed_at: None,
            last_list_at: None,
            interval_ms: None,
            said_gone: false,
            answered: false,
            pinged: false,
            greeted: false,
            spacing_ms: 0,
            counted_at: None,
            only_progress: false,
            listed: Vec::new(),
            missing: Vec::new(),
            extra: Vec::new(),
            stale: true,
        }
    }

    /// What the log expects of it changed: the next list is compared in full.
    pub const fn expect_anew(&mut self) {
        self.stale = true;
    }

    /// It holds this no more by the log: what was counted of it is over, also if it is dispatched again.
    pub fn release(&mut self, id: &ExecutionId) {
        self.missing.retain(|missing| missing.id != *id);
        self.expect_anew();
    }

    /// All that was counted is void: lists count from the next one on. What it said last is kept for people, and for
    /// how long that holds for the safety net.
    pub fn void(&mut self) {
        self.last_at = None;
        self.listed_at = None;
        self.counted_at = None;
        for listed in &mut self.listed {
            listed.named_at = None;
        }
        for missing in &mut self.missing {
            missing.times = 0;
        }
        for extra in &mut self.extra {
            extra.times = 0;
        }
        self.stale = true;
    }

    /// The clock was set: nothing waits for a time of the old one, nor counts from one that has yet to come.
    pub fn rebase(&mut self, now: Timestamp) {
        self.last_list_at = self.last_list_at.map(|at| at.min(now));
        for listed in &mut self.listed {
            listed.stands_since = listed.stands_since.min(now);
        }
        for missing in &mut self.missing {
            missing.first = missing.first.map(|at| at.min(now));
        }
        for extra in &mut self.extra {
            extra.next_ask_at = extra.next_ask_at.map(|at| at.min(now));
        }
    }

    /// Notes that a heartbeat came. False: a replay (its `seq` is not above the last), it counts for nothing.
    pub fn beat(&mut self, beat: &Heartbeat<'_>, now: Timestamp) -> bool {
        if beat.seq <= self.seq && self.seq != 0 {
            return false;
        }
        self.seq = beat.seq;
        self.last_at = Some(now);
        self.interval_ms = beat.interval_ms;
        self.said_gone |= beat.state == AgentState::Gone;
        true
    }

    /// Notes the progress that a heartbeat names of what a registry lists.
    pub fn hear_progress(&mut self, claims: &[Claim<'_>], now: Timestamp) {
        self.only_progress = true;
        let named: HashMap<(&str, u32), f64> =
            claims.iter().filter_map(|c| Some(((c.id.as_ref(), c.attempt), c.progress?))).collect();
        for listed in &mut self.listed {
            if let Some(progress) = named.get(&(listed.id.as_str(), listed.attempt)) {
                listed.rise(Some(*progress), now);
                listed.named_at = Some(now);
            }
        }
    }

    /// Its heartbeats are its lists, whatever was before.
    pub const fn hear_lists(&mut self) {
        self.only_progress = false;
        self.spacing_ms = 0;
    }

    /// Whether a list says the same as the last one, and nothing about it is odd: then only progress moves.
    pub fn list_again(&mut self, claims: &[Claim<'_>], now: Timestamp) -> bool {
        let same = !self.stale
            && self.missing.is_empty()
            && self.extra.is_empty()
            && self.listed.len() == claims.len()
            && self.listed_at.is_some()
            && self.listed.iter().zip(claims).all(|(l, c)| l.attempt == c.attempt && l.id.as_str() == c.id);
        if same {
            (self.listed_at, self.last_list_at) = (Some(now), Some(now));
            for (listed, claim) in self.listed.iter_mut().zip(claims) {
                listed.rise(claim.progress, now);
                listed.named_at = claim.progress.map(|_| now);
            }
        }
        same
    }

    /// Compares a list with what the log expects.
    pub fn list(&mut self, claims: &[OwnedClaim], expect: &impl Expectation, now: Timestamp) -> Oddities {
        let (first, only_progress) = (self.listed_at.is_none(), self.only_progress);
        self.stale = false;
        (self.listed_at, self.last_list_at) = (Some(now), Some(now));
        let mut before: HashMap<(ExecutionId, u32), Listed> =
            self.listed.drain(..).map(|l| ((l.id.clone(), l.attempt), l)).collect();
        let mut odd = Oddities::default();
        for claim in claims {
            let old = before.remove(&(claim.id.clone(), claim.attempt));
            let mut listed = match old {
                Some(old) if !first => old,
                // What was seen before our sight began does not count as standing still.
                Some(old) => Listed { rose_at: now, ..old },
                None => Listed {
                    id: claim.id.clone(),
                    attempt: claim.attempt,
                    progress: claim.progress,
                    rose_at: now,
                    stands_since: now,
                    named_at: None,
                },
            };
            listed.rise(claim.progress, now);
            if !only_progress {
                listed.named_at = claim.progress.map(|_| now);
            }
            if first && listed.stands_since < now {
                odd.standing.push(claim.id.clone());
            }
            self.listed.push(listed);
        }
        let counts = self.counted_at.is_none_or(|at| now.since_ms(at) >= self.spacing_ms);
        if counts {
            self.counted_at = Some(now);
        }
        self.count_missing(expect, counts, now, &mut odd);
        self.count_extra(expect, counts, now, &mut odd);
        odd
    }

    fn lists(&self, id: &ExecutionId, attempt: u32) -> Option<&Listed> {
        self.listed.iter().find(|l| l.attempt == attempt && l.id == *id)
    }

    fn count_missing(&mut self, expect: &impl Expectation, counts: bool, now: Timestamp, odd: &mut Oddities) {
        let mut before = std::mem::take(&mut self.missing);
        let named: HashSet<(&str, u32)> = self.listed.iter().map(|l| (l.id.as_str(), l.attempt)).collect();
        let mut still: Vec<Missing> = Vec::new();
        for (id, attempt, grace_until) in expect.held() {
            if named.contains(&(id.as_str(), attempt)) {
                continue;
            }
            let old = before.iter().position(|m| m.id == *id && m.attempt == attempt);
            let mut missing = match old {
                Some(at) => before.swap_remove(at),
                None => Missing { id: id.clone(), attempt, since: now, first: None, times: 0 },
            };
            // Inside the grace absence is no evidence; the count begins with the first list beyond it.
            if now < grace_until {
                // Dispatched again meanwhile: what was counted then is over.
                (missing.times, missing.first) = (0, None);
            } else if counts {
                if missing.times == 0 {
                    missing.since = now;
                }
                let first = *missing.first.get_or_insert(now);
                missing.times = missing.times.saturating_add(1);
                // One that was counted before is judged at once: the safety net may have come meanwhile.
                if missing.times >= crate::facts::UNLISTED_TIMES || first < missing.since {
                    odd.missing.push(id.clone());
                }
            }
            still.push(missing);
        }
        self.missing = still;
    }

    fn count_extra(&mut self, expect: &impl Expectation, counts: bool, now: Timestamp, odd: &mut Oddities) {
        let mut before = std::mem::take(&mut self.extra);
        for listed in &self.listed {
            if expect.holds(&listed.id, listed.attempt) {
                continue;
            }
            let old = before.iter().position(|e| e.attempt == listed.attempt && e.id == listed.id);
            let mut extra = match old {
                Some(at) => before.swap_remove(at),
                None => Extra {
                    id: listed.id.clone(),
                    attempt: listed.attempt,
                    known: Known::Unread,
                    times: 0,
                    asked: 0,
                    next_ask_at: None,
                },
            };
            match expect.known(&listed.id, listed.attempt) {
                // What was read from the log stays until memory knows better.
                Known::Unread => {}
                known if known != extra.known => {
                    // Lists from before it was known not to be theirs are no lists after its end.
                    extra.known = known;
                    extra.times = 0;
                }
                _ => {}
            }
            extra.times = extra.times.saturating_add(u32::from(counts));
            if counts && extra.known == Known::NotTheirs && extra.times == crate::zombie::ZOMBIE_TIMES {
                odd.lasting_extras.push((listed.id.clone(), listed.attempt));
            }
            let facts = crate::zombie::ClaimFacts {
                known: extra.known,
                times: extra.times,
                next_ask_at: extra.next_ask_at,
            };
            odd.extras_due |= crate::zombie::judge_claim(facts, now) != crate::zombie::ClaimVerdict::Leave;
            self.extra.push(extra);
        }
    }

    /// Whether it lists this attempt.
    #[must_use]
    pub fn listing(&self, id: &ExecutionId, attempt: u32) -> Listing {
        let Some(at) = self.listed_at else { return Listing::Unknown };
        if let Some(listed) = self.lists(id, attempt) {
            let known = |at| listed.progress.map(|_| at);
            let (rose_at, stands_since) = (known(listed.rose_at), known(listed.stands_since));
            return Listing::Listed { at, rose_at, stands_since, named_at: listed.named_at };
        }
        match self.missing.iter().find(|m| m.attempt == attempt && m.id == *id) {
            Some(Missing { since, first, times, .. }) => {
                Listing::Unlisted { since: *since, first: first.unwrap_or(*since), times: *times }
            }
            // Dispatched after the latest list: that list says nothing about it.
            None => Listing::Unknown,
        }
    }

    /// Until when its lists named this attempt, as far as we know.
    #[must_use]
    pub fn vouched_at(&self, id: &ExecutionId, attempt: u32) -> Option<Timestamp> {
        if self.lists(id, attempt).is_some() {
            return self.last_list_at;
        }
        self.missing.iter().find(|m| m.attempt == attempt && m.id == *id).map(|m| m.first.unwrap_or(m.since))
    }

    /// Whether its latest list names anything.
    #[must_use]
    pub fn lists_something(&self) -> bool {
        !self.listed.is_empty()
    }

    /// The progress it named for this attempt.
    #[must_use]
    pub fn progress(&self, id: &ExecutionId, attempt: u32) -> Option<f64> {
        self.lists(id, attempt).and_then(|l| l.progress)
    }

    /// The claims that are not theirs.
    #[must_use]
    pub fn extras(&self) -> &[Extra] {
        &self.extra
    }

    /// The same, to note what was learned or done.
    pub fn extras_mut(&mut self) -> &mut [Extra] {
        &mut self.extra
    }

    /// Whether nothing about it needs a full comparison.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.missing.is_empty() && self.extra.is_empty()
    }
}

impl Listed {
    fn rise(&mut self, progress: Option<f64>, now: Timestamp) {
        let Some(new) = progress else { return };
        if self.progress.is_none_or(|old| new > old) {
            self.progress = Some(new);
            (self.rose_at, self.stands_since) = (now, now);
        }
    }
}

#[cfg(test)]
mod tests;
