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
    /// It answered a request before.
    pub answered: bool,
    /// It was asked for the first time, so that `answered` means something.
    pub greeted: bool,
    /// A list that comes sooner after the last one that counted vouches for what it names, and counts against nothing.
    pub spacing_ms: u64,
    /// When that came.
    counted_at: Option<Timestamp>,
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
            greeted: false,
            spacing_ms: 0,
            counted_at: None,
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
            }
        }
        same
    }

    /// Compares a list with what the log expects.
    pub fn list(&mut self, claims: &[OwnedClaim], expect: &impl Expectation, now: Timestamp) -> Oddities {
        let first = self.listed_at.is_none();
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
                },
            };
            listed.rise(claim.progress, now);
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
            return Listing::Listed { at, rose_at, stands_since };
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
mod tests {
    use super::*;

    struct Log(Vec<(ExecutionId, u32, Timestamp)>);

    impl Expectation for Log {
        fn held(&self) -> impl Iterator<Item = (&ExecutionId, u32, Timestamp)> {
            self.0.iter().map(|(id, attempt, grace)| (id, *attempt, *grace))
        }
        fn holds(&self, id: &ExecutionId, attempt: u32) -> bool {
            self.0.iter().any(|held| held.0 == *id && held.1 == attempt)
        }
        fn known(&self, _: &ExecutionId, _: u32) -> Known {
            Known::NotTheirs
        }
    }

    fn id(text: &str) -> ExecutionId {
        ExecutionId::new(text).unwrap()
    }

    fn t(ms: i64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    fn claim(name: &str, progress: f64) -> OwnedClaim {
        OwnedClaim { id: id(name), attempt: 1, progress: Some(progress) }
    }

    fn listed(at: i64, rose_at: i64, stands_since: i64) -> Listing {
        let (rose_at, stands_since) = (Some(t(rose_at)), Some(t(stands_since)));
        Listing::Listed { at: t(at), rose_at, stands_since }
    }

    fn claims() -> Claims {
        Claims::new(InstanceId::new("i").unwrap())
    }

    #[test]
    fn absence_counts_from_the_first_list_beyond_the_grace_and_starts_again_when_it_is_listed() {
        let log = Log(vec![(id("x"), 1, t(100))]);
        let mut claims = claims();
        assert_eq!(claims.list(&[], &log, t(50)).missing, []);
        assert_eq!(claims.listing(&id("x"), 1), Listing::Unlisted { since: t(50), first: t(50), times: 0 });
        assert_eq!(claims.list(&[], &log, t(110)).missing, []);
        assert_eq!(claims.list(&[claim("x", 1.0)], &log, t(120)).missing, []);
        assert_eq!(claims.list(&[], &log, t(130)).missing, []);
        assert_eq!(claims.list(&[], &log, t(140)).missing, [id("x")]);
        assert_eq!(claims.listing(&id("x"), 1), Listing::Unlisted { since: t(130), first: t(130), times: 2 });
        claims.void();
        assert_eq!(claims.listing(&id("x"), 1), Listing::Unknown);
        assert_eq!(claims.list(&[], &log, t(150)).missing, [id("x")], "to be looked at");
        let anew = Listing::Unlisted { since: t(150), first: t(130), times: 1 };
        assert_eq!(claims.listing(&id("x"), 1), anew, "what was counted before is void");
    }

    #[test]
    fn lists_that_come_too_soon_vouch_and_count_against_nothing() {
        let log = Log(vec![(id("x"), 1, t(0))]);
        let mut claims = claims();
        claims.spacing_ms = 100;
        assert_eq!(claims.list(&[claim("z", 1.0)], &log, t(10)).missing, []);
        let odd = claims.list(&[claim("z", 1.0)], &log, t(109));
        assert_eq!((odd.missing, odd.extras_due), (vec![], false));
        assert_eq!(claims.listing(&id("x"), 1), Listing::Unlisted { since: t(10), first: t(10), times: 1 });
        let odd = claims.list(&[claim("z", 1.0)], &log, t(110));
        assert_eq!((odd.missing, odd.extras_due), (vec![id("x")], true));
        // One that names it ends the row, however soon it comes.
        claims.list(&[claim("x", 1.0)], &log, t(120));
        assert!(matches!(claims.listing(&id("x"), 1), Listing::Listed { .. }));
        assert_eq!(claims.list(&[], &log, t(130)).missing, []);
        assert_eq!(claims.listing(&id("x"), 1), Listing::Unlisted { since: t(130), first: t(130), times: 0 });
        assert_eq!(claims.list(&[], &log, t(210)).missing, []);
        assert_eq!(claims.list(&[], &log, t(310)).missing, [id("x")]);
        // What is void was not counted either.
        claims.void();
        claims.list(&[], &log, t(311));
        let anew = Listing::Unlisted { since: t(311), first: t(210), times: 1 };
        assert_eq!(claims.listing(&id("x"), 1), anew);
    }

    #[test]
    fn progress_only_rises_and_another_attempt_is_another_thing() {
        let log = Log(vec![(id("x"), 1, t(0))]);
        let mut claims = claims();
        claims.list(&[claim("x", 5.0)], &log, t(10));
        claims.list(&[claim("x", 4.0)], &log, t(20));
        assert_eq!(claims.listing(&id("x"), 1), listed(20, 10, 10));
        claims.list(&[claim("x", 6.0)], &log, t(30));
        assert_eq!(claims.listing(&id("x"), 1), listed(30, 30, 30));
        assert_eq!(claims.listing(&id("x"), 2), Listing::Unknown);
        claims.void();
        claims.list(&[claim("x", 6.0)], &log, t(90));
        assert_eq!(claims.listing(&id("x"), 1), listed(90, 90, 30));
        claims.void();
        claims.list(&[claim("x", 7.0)], &log, t(95));
        assert_eq!(claims.listing(&id("x"), 1), listed(95, 95, 95));
    }

    #[test]
    fn what_is_not_theirs_is_counted_until_it_is_no_longer_listed() {
        let log = Log(vec![]);
        let mut claims = claims();
        let odd = claims.list(&[claim("z", 1.0)], &log, t(10));
        assert_eq!((odd.lasting_extras, odd.extras_due), (vec![], false));
        let odd = claims.list(&[claim("z", 1.0)], &log, t(20));
        assert_eq!((odd.lasting_extras, odd.extras_due), (vec![(id("z"), 1)], true));
        claims.list(&[], &log, t(30));
        assert!(claims.is_plain());
    }

    #[test]
    fn a_replayed_heartbeat_counts_for_nothing() {
        let read = |seq| {
            format!(r#"{{"instance_id":"i","seq":{seq},"state":"ready","capacity":1,"executions":[]}}"#)
        };
        let mut claims = claims();
        let (five, four) = (read(5), read(4));
        assert!(claims.beat(&Heartbeat::read("a", five.as_bytes()).unwrap(), t(1)));
        assert!(!claims.beat(&Heartbeat::read("a", five.as_bytes()).unwrap(), t(2)));
        assert!(!claims.beat(&Heartbeat::read("a", four.as_bytes()).unwrap(), t(3)));
        assert_eq!(claims.last_at, Some(t(1)));
    }
}
