//! Who is what, and what comes next: everything that chance decides, from one seed. Pure.

use std::{collections::BTreeMap, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use rollcall_core::ids::AgentId;

use super::kind::{Kind, Rate, Stage};

/// Slots of each simulated agent.
pub(crate) const CAPACITY: u32 = 2;
/// Losses held against one agent that the plan allows: one below what quarantines it (PROTOCOL.md 5: 5 in 10 minutes).
pub(crate) const LOSSES_MAX: u32 = 4;
/// Agents of a kind for each share of submissions of that kind: an agent that was struck is out for a while.
const AGENTS_PER_SHARE: f64 = 2.5;
/// Share of submissions that are put back into the queue when they are lost.
const REQUEUE_SHARE: f64 = 0.3;
/// Time limit of work that is to run into it.
const SHORT_TIMEOUT_MS: std::ops::Range<u64> = 3_000..8_000;
/// Time limit of all other work: far beyond the run.
const LONG_TIMEOUT_MS: u64 = 3_600_000;
/// How long the progress of stalling work may stand still.
const STALL_TIMEOUT_MS: std::ops::Range<u64> = 4_000..8_000;
/// How long work takes, when it has time.
const WORK_MS: std::ops::Range<u64> = 500..8_000;
/// How long work takes whose first attempt was to run into its time limit: a later one must not.
const SHORT_WORK_MS: std::ops::Range<u64> = 100..1_000;

/// One agent to be played.
#[derive(Debug, Clone)]
pub(crate) struct PlannedAgent {
    pub(crate) id: AgentId,
    pub(crate) kind: Kind,
    pub(crate) seed: u64,
}

/// One execution to be handed in.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PlannedWork {
    pub(crate) agent: usize,
    pub(crate) kind: Kind,
    pub(crate) requeue: bool,
    pub(crate) timeout_ms: u64,
    pub(crate) stall_timeout_ms: Option<u64>,
    pub(crate) work: Duration,
}

/// Decides everything.
#[derive(Debug)]
pub(crate) struct Plan {
    random: StdRng,
    shares: BTreeMap<Kind, f64>,
    agents: Vec<PlannedAgent>,
    by_kind: BTreeMap<Kind, Vec<usize>>,
    losses: Vec<u32>,
    /// Kinds that were not played yet: each comes once before chance decides.
    first_round: Vec<Kind>,
}

impl Plan {
    /// A fleet of `count` agents named after `tag`.
    pub(crate) fn new(count: usize, tag: &str, seed: u64, rates: &[Rate]) -> Result<Self, String> {
        let mut shares: BTreeMap<Kind, f64> = Kind::ALL
            .iter()
            .map(|kind| (*kind, kind.default_share()))
            .filter(|(_, share)| *share > 0.0)
            .collect();
        for rate in rates {
            shares.insert(rate.kind, rate.share);
        }
        shares.retain(|_, share| *share > 0.0);
        let faulty: f64 = shares.values().sum();
        if faulty > 1.0 {
            return Err(format!("the rates sum up to {faulty:.3}, more than 1"));
        }
        let mut random = StdRng::seed_from_u64(seed);
        let kinds = kinds_of_agents(count, &shares)?;
        let mut agents = Vec::with_capacity(count);
        let mut by_kind: BTreeMap<Kind, Vec<usize>> = BTreeMap::new();
        for (index, kind) in kinds.into_iter().enumerate() {
            let id = AgentId::new(&format!("sim-{tag}-{index}")).map_err(|error| error.to_string())?;
            by_kind.entry(kind).or_default().push(index);
            agents.push(PlannedAgent { id, kind, seed: random.random() });
        }
        let first_round = shares.keys().copied().collect();
        Ok(Self { random, shares, losses: vec![0; agents.len()], agents, by_kind, first_round })
    }

    pub(crate) fn agents(&self) -> &[PlannedAgent] {
        &self.agents
    }

    /// What is handed in next. `is_free`: whether an agent is there and has nothing ahead of it.
    pub(crate) fn next(&mut self, is_free: impl Fn(usize) -> bool) -> PlannedWork {
        let wanted = match self.first_round.last() {
            Some(kind) => *kind,
            None => self.any_kind(),
        };
        let (kind, agent) = match self.agent_for(wanted, &is_free) {
            Some(agent) => (wanted, agent),
            None => (Kind::Normal, self.steady(&is_free)),
        };
        self.first_round.retain(|left| *left != kind);
        if kind.is_held_against_agent() {
            self.losses[agent] += 1;
        }
        let is_short = matches!(kind, Kind::Hung | Kind::RefusingTerminate | Kind::LateReporting);
        PlannedWork {
            agent,
            kind,
            // A late completion is accepted only while no later attempt was dispatched.
            requeue: kind != Kind::LateReporting && self.random.random_bool(REQUEUE_SHARE),
            timeout_ms: if is_short { self.random.random_range(SHORT_TIMEOUT_MS) } else { LONG_TIMEOUT_MS },
            stall_timeout_ms: (kind == Kind::Stalling).then(|| self.random.random_range(STALL_TIMEOUT_MS)),
            work: Duration::from_millis(self.random.random_range(if is_short {
                SHORT_WORK_MS
            } else {
                WORK_MS
            })),
        }
    }

    fn any_kind(&mut self) -> Kind {
        let mut at = self.random.random_range(0.0..1.0);
        for (kind, share) in &self.shares {
            if at < *share {
                return *kind;
            }
            at -= share;
        }
        Kind::Normal
    }

    fn agent_for(&mut self, kind: Kind, is_free: &impl Fn(usize) -> bool) -> Option<usize> {
        let of_kind = if kind.stage() == Stage::Agent { kind } else { Kind::Normal };
        let able: Vec<usize> = self
            .by_kind
            .get(&of_kind)?
            .iter()
            .copied()
            .filter(|agent| is_free(*agent))
            .filter(|agent| !kind.is_held_against_agent() || self.losses[*agent] < LOSSES_MAX)
            .collect();
        (!able.is_empty()).then(|| able[self.random.random_range(0..able.len())])
    }

    /// Any steady agent, a free one if there is one.
    fn steady(&mut self, is_free: &impl Fn(usize) -> bool) -> usize {
        match self.agent_for(Kind::Normal, is_free) {
            Some(agent) => agent,
            None => {
                let steady = &self.by_kind[&Kind::Normal];
                steady[self.random.random_range(0..steady.len())]
            }
        }
    }
}

/// How many agents of which kind: at least one of each, and steady ones for the most part.
fn kinds_of_agents(count: usize, shares: &BTreeMap<Kind, f64>) -> Result<Vec<Kind>, String> {
    let mut kinds = Vec::with_capacity(count);
    for (kind, share) in shares.iter().filter(|(kind, _)| kind.stage() == Stage::Agent) {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a count of agents"
        )]
        let wanted = (count as f64 * share * AGENTS_PER_SHARE).round() as usize;
        kinds.extend(std::iter::repeat_n(*kind, wanted.max(1)));
    }
    // Fewer than half may fall silent at once, or the mass-failure breaker rightly holds the recoveries back.
    if kinds.len() * 2 > count {
        return Err(format!(
            "{count} agents are too few for these rates: {} of them would be faulty, at most half may be",
            kinds.len()
        ));
    }
    kinds.resize(count, Kind::Normal);
    Ok(kinds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(seed: u64) -> Plan {
        Plan::new(100, "t", seed, &[]).unwrap()
    }

    fn works(plan: &mut Plan, count: usize) -> Vec<PlannedWork> {
        (0..count).map(|_| plan.next(|_| true)).collect()
    }

    #[test]
    fn the_same_seed_plans_the_same() {
        assert_eq!(works(&mut plan(7), 200), works(&mut plan(7), 200));
        assert_ne!(works(&mut plan(7), 200), works(&mut plan(8), 200));
    }

    #[test]
    fn every_kind_is_played_and_where_it_belongs() {
        let mut plan = plan(1);
        let works = works(&mut plan, 2_000);
        for kind in Kind::ALL {
            assert!(works.iter().any(|work| work.kind == kind), "{kind}");
        }
        for work in &works {
            let on = plan.agents()[work.agent].kind;
            assert_eq!(on, if work.kind.stage() == Stage::Agent { work.kind } else { Kind::Normal });
        }
    }

    #[test]
    fn no_agent_is_struck_so_often_that_it_is_quarantined() {
        let mut plan = plan(3);
        let mut held = vec![0; 100];
        for work in works(&mut plan, 20_000) {
            if work.kind.is_held_against_agent() {
                held[work.agent] += 1;
            }
        }
        assert_eq!(held.iter().max(), Some(&LOSSES_MAX));
    }

    #[test]
    fn a_second_attempt_has_the_time_it_needs() {
        for work in works(&mut plan(5), 5_000) {
            assert!(work.work * 2 < Duration::from_millis(work.timeout_ms), "{work:?}");
        }
    }

    #[test]
    fn who_is_busy_gets_nothing_and_rates_are_obeyed() {
        let rates = ["silent=0", "hung=0.5"].map(|rate| rate.parse().unwrap());
        let mut plan = Plan::new(100, "t", 1, &rates).unwrap();
        assert!(plan.agents().iter().all(|agent| agent.kind != Kind::Silent));
        let free = |agent| agent % 2 == 0;
        let works: Vec<_> = (0..1000).map(|_| plan.next(free)).collect();
        assert!(works.iter().all(|work| free(work.agent)));
        let hung = works.iter().filter(|work| work.kind == Kind::Hung).count();
        assert!((400..600).contains(&hung), "{hung}");
        assert!(Plan::new(100, "t", 1, &["hung=0.9".parse().unwrap()]).is_err(), "over 1 in sum");
        assert!(Plan::new(5, "t", 1, &[]).is_err(), "too few for one of each");
    }
}
