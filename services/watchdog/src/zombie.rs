//! Lists that name an execution which the log does not give to that instance: ended, another agent's, another
//! attempt's. Pure.

use rollcall_core::Timestamp;

/// Listed in so many heartbeats after its end it is a zombie (PROTOCOL.md 5, rule 3).
pub const ZOMBIE_TIMES: u32 = 2;
/// First pause before a zombie that is still listed is asked to end again; it doubles.
pub const ZOMBIE_RETRY_MIN_MS: u64 = 5_000;
/// Longest such pause.
pub const ZOMBIE_RETRY_MAX_MS: u64 = 300_000;

/// What the log says about a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It is not in memory, and nobody read the log yet.
    Unread,
    /// The log has never heard of it.
    Nothing,
    /// It ended, or another instance or attempt holds it, or it waits.
    NotTheirs,
}

/// One claim that is not expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClaimFacts {
    /// What the log says.
    pub known: Known,
    /// Heartbeats in a row that listed it after it stopped being theirs.
    pub times: u32,
    /// Asked to end already; not again before.
    pub next_ask_at: Option<Timestamp>,
}

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimVerdict {
    /// Nothing now.
    Leave,
    /// Read the log's word on it.
    Read,
    /// Ask the agent to end it.
    Terminate,
}

/// Judges one claim.
#[must_use]
pub const fn judge_claim(facts: ClaimFacts, now: Timestamp) -> ClaimVerdict {
    match facts.known {
        Known::Nothing => ClaimVerdict::Leave,
        _ if facts.times < ZOMBIE_TIMES => ClaimVerdict::Leave,
        Known::Unread => ClaimVerdict::Read,
        Known::NotTheirs => match facts.next_ask_at {
            Some(at) if now.as_millis() < at.as_millis() => ClaimVerdict::Leave,
            _ => ClaimVerdict::Terminate,
        },
    }
}

/// The pause after the `asked`th request to end a zombie.
#[must_use]
pub fn retry_pause_ms(asked: u32) -> u64 {
    let doubled = ZOMBIE_RETRY_MIN_MS.saturating_mul(1 << asked.min(16));
    doubled.min(ZOMBIE_RETRY_MAX_MS)
}

/// A row of the second table.
#[derive(Debug)]
pub struct ZombieRow {
    /// Its name.
    pub key: &'static str,
    /// The situation, for people.
    pub situation: &'static str,
    /// The evidence, for people.
    pub evidence: &'static str,
    /// Facts of that kind.
    pub sample: ClaimFacts,
}

impl ZombieRow {
    /// What the judgement says of the sample.
    #[must_use]
    pub fn verdict(&self) -> &'static str {
        match judge_claim(self.sample, Timestamp::from_millis(1_000)) {
            ClaimVerdict::Leave => "leave it",
            ClaimVerdict::Read => "read the log, then decide",
            ClaimVerdict::Terminate => {
                "terminate (`zombie`), count it; a `completed` of it that wins is kept"
            }
        }
    }
}

const fn facts(known: Known, times: u32) -> ClaimFacts {
    ClaimFacts { known, times, next_ask_at: None }
}

/// The rows.
pub const ROWS: &[ZombieRow] = &[
    ZombieRow {
        key: "claimed_once",
        situation: "listed right after its end",
        evidence: "one heartbeat: it may have been under way when it ended",
        sample: facts(Known::NotTheirs, 1),
    },
    ZombieRow {
        key: "zombie",
        situation: "an ended execution, another agent's, or another attempt's goes on",
        evidence: "two heartbeats in a row after its end list it, and the log, read from its leader, confirms the end",
        sample: facts(Known::NotTheirs, 2),
    },
    ZombieRow {
        key: "zombie_asked",
        situation: "a zombie that was asked to end a moment ago",
        evidence: "asked again with growing pauses as long as it is listed",
        sample: ClaimFacts {
            known: Known::NotTheirs,
            times: 3,
            next_ask_at: Some(Timestamp::from_millis(2_000)),
        },
    },
    ZombieRow {
        key: "claim_unread",
        situation: "an execution that is not in memory",
        evidence: "it ended long ago or never was: the log knows",
        sample: facts(Known::Unread, 2),
    },
    ZombieRow {
        key: "claim_foreign",
        situation: "an execution that the log has never heard of",
        evidence: "not work of this fleet: nobody here may end it",
        sample: facts(Known::Nothing, 9),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_read_as_they_are_judged() {
        let verdicts: Vec<_> = ROWS.iter().map(|row| (row.key, row.verdict())).collect();
        assert_eq!(verdicts[0], ("claimed_once", "leave it"));
        assert!(verdicts[1].1.starts_with("terminate"));
        assert_eq!(verdicts[2], ("zombie_asked", "leave it"));
        assert_eq!(verdicts[3], ("claim_unread", "read the log, then decide"));
        assert_eq!(verdicts[4], ("claim_foreign", "leave it"));
    }

    #[test]
    fn pauses_are_bounded() {
        assert_eq!(retry_pause_ms(0), ZOMBIE_RETRY_MIN_MS);
        assert_eq!(retry_pause_ms(u32::MAX), ZOMBIE_RETRY_MAX_MS);
    }
}
