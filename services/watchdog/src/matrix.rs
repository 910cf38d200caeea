//! The rows of the judgement: what each situation is called and how it reads, and the table in
//! `docs/DECISIONS-MATRIX.md`, whose verdicts come from [`crate::decide::judge`] itself.

use std::fmt::Write as _;

use rollcall_core::{Timestamp, agent::Parting, execution::State, wire::Outcome};

use crate::{
    decide::{Judgement, Look, Verdict, judge},
    facts::{Asked, Channel, Edge, Facts, Limits, Listing, Promise, Standing, Waiting},
};

macro_rules! rows {
    ($($name:ident = $key:literal, $situation:literal, $evidence:literal;)+) => {
        /// A row of the decision matrix.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Row { $(#[doc = $situation] $name,)+ }

        impl Row {
            /// All rows, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// Its name in reports, `explain` and metrics.
            #[must_use]
            pub const fn key(self) -> &'static str {
                match self { $(Self::$name => $key,)+ }
            }

            /// The situation, for people.
            #[must_use]
            pub const fn situation(self) -> &'static str {
                match self { $(Self::$name => $situation,)+ }
            }

            /// The evidence that puts an execution into this row, for people.
            #[must_use]
            pub const fn evidence(self) -> &'static str {
                match self { $(Self::$name => $evidence,)+ }
            }
        }
    };
}

rows! {
    Ended = "ended", "it has ended",
        "a terminal event in the log";
    Queued = "queued", "it waits in a queue (its expiry is the dispatcher's)",
        "the log says queued: no slot, no agent";
    QueueExpired = "queue_expired", "its time in the queue was up",
        "the dispatcher's expired event in the log: nobody held it, nothing ran";
    InGrace = "in_grace", "dispatched a moment ago, not on its agent's list yet",
        "inside the dispatch grace absence is no evidence; the deadline still applies";
    Healthy = "healthy", "listed and in time",
        "the latest heartbeat of the instance lists it, the deadline is ahead, progress moves or nobody bounds it";
    Unheard = "unheard", "no list of its instance was received yet, its agent is not silent",
        "nothing heard since our sight began: that proves nothing";
    UnlistedOnce = "unlisted_once", "missing on one list",
        "one list beyond the grace without it: a second one in a row is needed";
    UnlistedAnswers = "unlisted_answers", "missing on two heartbeats, but its agent says it holds it",
        "the instance, asked directly, lists it: the newest word counts";
    Orphaned = "orphaned", "its agent is alive and does not know it",
        "two lists in a row beyond the grace without it, a canary came back through the bus, the instance, asked directly, does not list it (or takes no requests), no report waits; with external delivery its instance is asked to end it first, as for dispatch_lost";
    DispatchLost = "dispatch_lost", "dispatched, never started, its agent is alive and does not know it",
        "as orphaned, and the log holds no start; its instance, asked to end it, says that it does not run (or gives no answer), so a dispatch that is still under way begins nothing";
    TimedOut = "timed_out", "its deadline passed",
        "the deadline passed and no report waits: its agent is asked to end it, and says that it is dead, or that it is not running and not on its list, or reports it terminated, or lists it no more";
    TerminateRefused = "terminate_refused", "its deadline passed and its agent did not confirm the end",
        "still running, refused or no answer: the slot is kept, asked again with growing pauses";
    Stalled = "stalled", "its progress stood still for its stall timeout",
        "heartbeats before and after the stall timeout list the same progress: terminated, confirmed, recovered";
    AgentSilent = "agent_silent", "its agent is disconnected, not yet for long enough",
        "disconnected or in error by the log; lost_after has not passed, or our own view of its heartbeats is not silent to the threshold";
    SilentAnswers = "silent_answers", "its agent sends no heartbeats and answers when asked",
        "lost_after passed and the heartbeats are silent, but the instance, asked directly, lists it: alive";
    Suspended = "suspended", "too many agents fell silent at once",
        "the mass-failure breaker is open: silence condemns nobody, positive proof still does";
    RateLimited = "rate_limited", "its agent is lost, and many others' too",
        "agent-lost recoveries per second are limited: it has a place in the line";
    AgentLost = "agent_lost", "its agent is silent beyond lost_after",
        "silent by the log for lost_after, our own view silent to the threshold, a canary came back, the instance does not answer, no report waits, a place in the rate limit";
    SupersededVouched = "superseded_vouched", "its instance was superseded and still works on it",
        "the old instance's heartbeats or its own answer list it: its list vouches until it is gone or away";
    SupersededUnsure = "superseded_unsure", "its instance was superseded and is not confirmed away",
        "it does not answer, but its heartbeats are not silent yet; or it answered once without the execution";
    AgentRestarted = "agent_restarted", "its agent runs as a new instance and the old one is away",
        "no responders where it used to answer and a heartbeat overdue, or silent to the threshold (which counts for nothing while the breaker is open), or two lists without it; a canary came back, no report waits";
    GoneVouched = "gone_vouched", "its agent was forgotten and we still hear it",
        "its heartbeats reach us and list the execution, or it, or its registry over HTTP, says so when asked: alive until they fall silent";
    GoneUnsure = "gone_unsure", "its agent was forgotten and is not confirmed away",
        "nobody said goodbye, and it does not answer but was heard a moment ago (or could have been), or it answered once without the execution";
    AgentGone = "agent_gone", "its agent said goodbye or was forgotten",
        "its own goodbye in the log or in a heartbeat, no report waits; forgotten without one, it is asked: two answers or lists without it, or no answer and silent to the threshold (which counts for nothing while the breaker is open, and goes through the rate limit), or dismissed by an operator, no answer, and quiet for one and a half intervals; a canary came back";
    Cancelling = "cancelling", "somebody asked for its end, not confirmed yet",
        "the dispatcher terminates it again and again; every loss ends it as cancelled; the safety net is the watchdog's";
    CancelledLost = "cancelled_lost", "somebody asked for its end, and it was lost before that was confirmed",
        "any ground above, for work that is to be cancelled: it ends cancelled, whatever on_loss says";
    Withheld = "withheld", "there is a ground, and a final report waits on the bus or has yet to get there",
        "the last message on its report subject is a completed, failed or returned of this attempt that the dispatcher has yet to apply; or its agent, asked to end it, says that it is not running and lists it all the same";
    Blind = "blind", "we can't trust our own eyes",
        "own start, cut bus, dropped messages, stalled loop or clock jump: absence and silence are void, proof still counts";
    Stale = "stale", "nothing settled it within the safety net",
        "the recovery fell due stale_after ago and was deferred ever since (terminate never confirmed, report never applied, suspension, cancellation, our own sight lost again and again); an instance that lists it is never ended for silence";
}

/// The limits of the samples: the defaults of PROTOCOL.md 8.
pub const SAMPLE_LIMITS: Limits = Limits {
    dispatch_grace_ms: 60_000,
    lost_after_ms: 60_000,
    stale_after_ms: 7_200_000,
    terminate_grace_ms: 5_000,
    failure_threshold: 3,
    interval_ms: 5_000,
};

const DISPATCHED: i64 = 1_000_000_000;
const MINUTE: i64 = 60_000;

const fn at(ms_after_dispatch: i64) -> Timestamp {
    Timestamp::from_millis(DISPATCHED + ms_after_dispatch)
}

/// A healthy execution ten minutes into its fifteen, and that instant.
#[must_use]
pub fn healthy_sample() -> (Facts, Timestamp) {
    let now = at(10 * MINUTE);
    let facts = Facts {
        state: State::Running,
        started: true,
        accepted: true,
        dispatched_at: at(0),
        deadline: at(15 * MINUTE),
        cancelled_at: None,
        stall_timeout_ms: None,
        lost_after_ms: None,
        standing: Standing::Alive,
        channel: Channel {
            last_at: Some(at(10 * MINUTE - 1_000)),
            interval_ms: 5_000,
            said_gone: false,
            answered: true,
            driven: false,
            spacing_ms: 0,
        },
        listing: Listing::Listed {
            at: at(10 * MINUTE - 1_000),
            rose_at: Some(at(9 * MINUTE)),
            stands_since: Some(at(9 * MINUTE)),
            named_at: Some(at(10 * MINUTE - 1_000)),
        },
        vouched_at: Some(at(10 * MINUTE - 1_000)),
        sight_since: Some(at(-MINUTE)),
        suspended: false,
        asked: Asked::No,
        asked_for: None,
        waiting: Waiting::Unasked,
        edge: Edge::Unasked,
        promise: Promise::Unasked,
        canary: false,
        turn_at: None,
    };
    (facts, now)
}

fn silent_sample() -> (Facts, Timestamp) {
    let (mut facts, now) = healthy_sample();
    facts.standing = Standing::Silent { since: at(8 * MINUTE) };
    facts.channel.last_at = Some(at(8 * MINUTE - 5_000));
    facts.listing =
        Listing::Listed { at: at(8 * MINUTE - 5_000), rose_at: None, stands_since: None, named_at: None };
    facts.vouched_at = Some(at(8 * MINUTE - 5_000));
    facts.canary = true;
    facts.edge = Edge::NoResponders;
    facts.waiting = Waiting::Nothing;
    (facts, now)
}

fn unlisted_sample(times: u32) -> (Facts, Timestamp) {
    let (mut facts, now) = healthy_sample();
    facts.listing =
        Listing::Unlisted { since: at(10 * MINUTE - 6_000), first: at(10 * MINUTE - 6_000), times };
    facts.canary = true;
    facts.edge = Edge::ListsNot { times: 1 };
    facts.waiting = Waiting::Nothing;
    (facts, now)
}

fn superseded_sample() -> (Facts, Timestamp) {
    let (mut facts, now) = healthy_sample();
    facts.standing = Standing::Superseded { since: at(10 * MINUTE - 500) };
    facts.channel.last_at = Some(at(10 * MINUTE - 8_000));
    facts.listing = Listing::Unknown;
    facts.canary = true;
    facts.edge = Edge::NoResponders;
    facts.waiting = Waiting::Nothing;
    (facts, now)
}

/// Facts that are judged to be in `row`, and the instant of the judgement.
#[must_use]
pub fn sample(row: Row) -> (Facts, Timestamp) {
    let (mut facts, mut now) = match row {
        Row::AgentLost | Row::RateLimited | Row::Suspended | Row::SilentAnswers | Row::Blind => {
            silent_sample()
        }
        Row::Orphaned | Row::DispatchLost | Row::UnlistedAnswers | Row::Withheld => unlisted_sample(2),
        Row::UnlistedOnce => unlisted_sample(1),
        Row::AgentRestarted | Row::SupersededUnsure | Row::SupersededVouched | Row::GoneUnsure => {
            superseded_sample()
        }
        _ => healthy_sample(),
    };
    match row {
        Row::Ended => facts.state = State::Completed,
        Row::Queued => facts.state = State::Queued,
        Row::QueueExpired => facts.state = State::Expired,
        Row::InGrace => {
            now = at(30_000);
            facts.channel.last_at = Some(at(29_000));
            facts.listing = Listing::Unlisted { since: at(5_000), first: at(5_000), times: 0 };
        }
        Row::Healthy | Row::UnlistedOnce | Row::Orphaned | Row::AgentLost | Row::AgentRestarted => {}
        Row::Unheard => facts.listing = Listing::Unknown,
        Row::UnlistedAnswers | Row::SilentAnswers => facts.edge = Edge::Lists,
        Row::DispatchLost => {
            (facts.state, facts.started, facts.accepted) = (State::Dispatching, false, false);
            facts.promise = Promise::NotRunning;
        }
        Row::TimedOut | Row::TerminateRefused => {
            now = at(15 * MINUTE + 40);
            facts.waiting = Waiting::Nothing;
            facts.asked = Asked::Confirmed;
            if row == Row::TerminateRefused {
                facts.asked = Asked::Unconfirmed { next_at: at(15 * MINUTE + 1_000) };
            }
        }
        Row::Stalled => {
            facts.stall_timeout_ms = Some(30_000);
            facts.waiting = Waiting::Nothing;
            facts.asked = Asked::Confirmed;
        }
        Row::AgentSilent => facts.standing = Standing::Silent { since: at(10 * MINUTE - 2_000) },
        Row::Suspended => facts.suspended = true,
        Row::RateLimited => facts.turn_at = Some(at(10 * MINUTE + 300)),
        Row::SupersededVouched => facts.edge = Edge::Lists,
        Row::SupersededUnsure => facts.edge = Edge::NoAnswer,
        Row::GoneVouched => facts.standing = Standing::Gone { since: at(9 * MINUTE), by: Parting::Forgotten },
        Row::GoneUnsure => {
            facts.standing = Standing::Gone { since: at(9 * MINUTE), by: Parting::Forgotten };
            facts.edge = Edge::NoAnswer;
        }
        Row::AgentGone | Row::CancelledLost => {
            facts.standing = Standing::Gone { since: at(10 * MINUTE - 1_000), by: Parting::Goodbye };
            facts.channel.said_gone = true;
            facts.waiting = Waiting::Nothing;
            if row == Row::CancelledLost {
                (facts.state, facts.cancelled_at) = (State::Cancelling, Some(at(9 * MINUTE)));
            }
        }
        Row::Cancelling => {
            (facts.state, facts.cancelled_at) = (State::Cancelling, Some(at(9 * MINUTE)));
        }
        Row::Withheld => facts.waiting = Waiting::Withholds(Outcome::Completed),
        Row::Blind => facts.sight_since = None,
        Row::Stale => {
            now = at(15 * MINUTE + 7_200_000);
            facts.waiting = Waiting::Nothing;
            facts.asked = Asked::Unconfirmed { next_at: at(15 * MINUTE + 7_200_000) };
        }
    }
    if row == Row::AgentLost {
        facts.turn_at = Some(now);
    }
    (facts, now)
}

/// A verdict in words, for tables, `explain` and dry runs.
#[must_use]
pub fn verdict_in_words(judgement: &Judgement, now: Timestamp) -> String {
    match judgement.verdict {
        Verdict::Leave => "leave it".to_owned(),
        Verdict::WaitUntil(until) => format!("leave it; look again in {}", duration(until.since_ms(now))),
        Verdict::Postpone(until) => {
            format!("leave it until silence counts again, at most {} from now", duration(until.since_ms(now)))
        }
        Verdict::Look(Look::Canary) => "prove that we see, then decide".to_owned(),
        Verdict::Look(Look::Instance) => "ask its instance, then decide".to_owned(),
        Verdict::Look(Look::Promise(_)) => {
            "have its instance promise not to begin it, then decide".to_owned()
        }
        Verdict::Look(Look::Report) => "look for a waiting report, then decide".to_owned(),
        Verdict::Look(Look::Turn) => "take a place in the rate limit, then recover it".to_owned(),
        Verdict::Terminate(reason) => format!("ask its agent to end it ({}), then decide", reason.as_str()),
        Verdict::Recover(finding) if judgement.row == Row::CancelledLost => {
            format!("end it as cancelled, confirmed by {}", finding.reason.as_str())
        }
        Verdict::Recover(finding) => {
            let terminate = serde_json::to_value(finding.terminate).unwrap_or_default();
            format!(
                "recover it: {}, terminate {}",
                finding.reason.as_str(),
                terminate.as_str().unwrap_or("?")
            )
        }
    }
}

fn duration(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{ms} ms"),
        10_000..600_000 => format!("{} s", ms / 1000),
        _ => format!("{} min", ms / 60_000),
    }
}

/// The whole of `docs/DECISIONS-MATRIX.md`.
#[must_use]
pub fn document() -> String {
    let mut text = String::from(
        "# What the watchdog decides, and on what evidence\n\n\
         Written by `watchdog matrix`; a test compares this file with the code. The verdicts are what the judgement\n\
         itself says of a sample of each row, with the default settings: work dispatched with 15 minutes, looked at\n\
         after 10. How to read `explain` and what to do for each reason is in OPERATIONS.md.\n\n\
         Grounds are tried in this order: gone or restarted agent, silence, absence, deadline, progress. One that is\n\
         not ripe only says when to look again, and leaves the rest to the others. Before anything is recovered the\n\
         report subject is looked at, the execution is judged once more on what is known then, and the append carries\n\
         the sequence that the judgement was made on: if anything happened since, the log refuses it.\n\n\
         | row | situation | evidence | verdict |\n|---|---|---|---|\n",
    );
    for row in Row::ALL {
        let (facts, now) = sample(*row);
        let judgement = judge(&facts, &SAMPLE_LIMITS, now);
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} |",
            row.key(),
            row.situation(),
            row.evidence(),
            verdict_in_words(&judgement, now)
        );
    }
    text.push_str(
        "\n## Lists that name what they should not\n\n| row | situation | evidence | verdict |\n|---|---|---|---|\n",
    );
    for row in crate::zombie::ROWS {
        let _ =
            writeln!(text, "| `{}` | {} | {} | {} |", row.key, row.situation, row.evidence, row.verdict());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_a_sample_that_is_judged_to_be_in_it() {
        for row in Row::ALL {
            let (facts, now) = sample(*row);
            let judgement = judge(&facts, &SAMPLE_LIMITS, now);
            assert_eq!(judgement.row, *row, "{judgement:?}");
        }
    }

    #[test]
    fn the_page_in_the_docs_is_the_one_that_the_code_prints() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/DECISIONS-MATRIX.md");
        let page = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            page == document(),
            "docs/DECISIONS-MATRIX.md is old: cargo run -p watchdog -- matrix > {path:?}"
        );
    }
}
