//! What came out of a run, for people and for programs.

use serde_json::{Value, json};

use super::{
    kind::Kind,
    truth::{Deviation, Tally, Truth},
};
use crate::{
    failure::Failure,
    output::{Format, Output, Shown, Tone, plain},
};

/// What the run itself counted, besides the truth.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counters {
    pub(crate) agents: usize,
    pub(crate) seed: u64,
    pub(crate) seconds: f64,
    pub(crate) submitted: u64,
    pub(crate) refused: u64,
    pub(crate) heartbeats: u64,
    pub(crate) dispatches: u64,
    pub(crate) unreadable: u64,
}

/// Writes the summary.
pub(crate) fn write(truth: &Truth, counters: &Counters, output: Output) -> Result<(), Failure> {
    match output.format {
        Format::Json | Format::Jsonl => output.line(&as_json(truth, counters).to_string()),
        Format::Table => {
            let header = [
                "FAULT",
                "PLAYED",
                "INJECTED",
                "RECOVERED",
                "EXPECTED",
                "NOTICED P50",
                "P99",
                "MAX",
                "DETECTED P99",
            ];
            output.table(&header, truth.tallies.iter().map(|(kind, tally)| row(*kind, tally)))?;
            output.line("")?;
            output.line(&format!(
                "{} agents, seed {}, {:.0} s: {} submitted ({} refused), {} completed ({} late), {} lost on their way to a \
                 fallen agent; {} heartbeats, {} dispatches",
                counters.agents, counters.seed, counters.seconds, counters.submitted, counters.refused, truth.completed,
                truth.late_completions, truth.lost_in_dispatch, counters.heartbeats, counters.dispatches
            ))?;
            if truth.is_as_it_should_be() {
                return output.line("Every fault was recovered once, for its reason, and nothing else was.");
            }
            let counts: Vec<_> = Deviation::ALL
                .iter()
                .filter_map(|deviation| {
                    let count = count(truth, *deviation);
                    (count > 0).then(|| format!("{} {count}", deviation.as_str()))
                })
                .collect();
            output.line(&format!("NOT as it should be: {}", counts.join(", ")))?;
            truth.words.iter().try_for_each(|words| output.line(&format!("  {words}")))
        }
    }
}

fn count(truth: &Truth, deviation: Deviation) -> u64 {
    truth.counts.get(&deviation).copied().unwrap_or(0)
}

fn row(kind: Kind, tally: &Tally) -> Vec<Shown> {
    let expected = kind.expected();
    let noticed = Spread::of(&tally.noticed_ms);
    let shown = |value: Option<u64>| plain(value.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms")));
    let tone = if tally.injected == tally.recovered { Tone::Plain } else { Tone::Bad };
    vec![
        plain(kind.as_str()),
        plain(tally.played.to_string()),
        plain(if expected.is_some() { tally.injected.to_string() } else { "-".to_owned() }),
        if expected.is_some() { (tally.recovered.to_string(), tone) } else { plain("-") },
        plain(expected.map_or("-", |reason| reason.as_str())),
        shown(noticed.map(|s| s.p50)),
        shown(noticed.map(|s| s.p99)),
        shown(noticed.map(|s| s.max)),
        shown(Spread::of(&tally.detected_ms).map(|s| s.p99)),
    ]
}

fn as_json(truth: &Truth, counters: &Counters) -> Value {
    let faults: serde_json::Map<String, Value> = truth
        .tallies
        .iter()
        .map(|(kind, tally)| {
            let value = json!({
                "played": tally.played,
                "injected": tally.injected,
                "recovered": tally.recovered,
                "expected": kind.expected(),
                "noticed_ms": Spread::of(&tally.noticed_ms).map(Spread::json),
                "detected_after_ms": Spread::of(&tally.detected_ms).map(Spread::json),
            });
            (kind.as_str().to_owned(), value)
        })
        .collect();
    let deviations: serde_json::Map<String, Value> = Deviation::ALL
        .iter()
        .map(|deviation| (deviation.as_str().to_owned(), count(truth, *deviation).into()))
        .collect();
    json!({
        "ok": truth.is_as_it_should_be(),
        "agents": counters.agents,
        "seed": counters.seed,
        "seconds": counters.seconds,
        "submitted": counters.submitted,
        "refused": counters.refused,
        "completed": truth.completed,
        "late_completions": truth.late_completions,
        "lost_in_dispatch": truth.lost_in_dispatch,
        "heartbeats": counters.heartbeats,
        "dispatches": counters.dispatches,
        "unreadable_entries": counters.unreadable,
        "faults": faults,
        "deviations": deviations,
        "words": truth.words,
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Spread {
    p50: u64,
    p99: u64,
    max: u64,
}

impl Spread {
    /// Nearest rank; `None` of nothing.
    fn of(values: &[u64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_unstable();
        let rank = |percent: usize| (sorted.len() * percent).div_ceil(100).max(1) - 1;
        Some(Self { max: *sorted.last()?, p50: sorted[rank(50)], p99: sorted[rank(99)] })
    }

    fn json(self) -> Value {
        json!({"p50": self.p50, "p99": self.p99, "max": self.max})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks() {
        let values: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(Spread::of(&values), Some(Spread { p50: 50, p99: 99, max: 100 }));
        assert_eq!(Spread::of(&[7]), Some(Spread { p50: 7, p99: 7, max: 7 }));
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn json_says_whether_it_is_ok_and_names_every_deviation() {
        let mut truth = Truth::default();
        let value = as_json(&truth, &Counters::default());
        assert_eq!(value["ok"], true);
        assert_eq!(value["deviations"].as_object().unwrap().len(), Deviation::ALL.len());
        truth.counts.insert(Deviation::Doubled, 2);
        assert_eq!(as_json(&truth, &Counters::default())["ok"], false);
    }
}
