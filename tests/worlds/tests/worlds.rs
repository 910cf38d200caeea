//! Thousands of worlds, and the proof that they would notice.

use std::{collections::BTreeMap, ops::Range, time::Instant};

use worlds::{Defect, Setup, Violation, run};

/// Worlds of an ordinary run; `ROLLCALL_WORLDS` asks for more (or fewer), `ROLLCALL_WORLDS_FROM` for others.
const WORLDS: u64 = 2_000;
/// Threads that share them.
const THREADS: u64 = 2;
/// The worlds in which each defect has to be found, and which have to be faultless without it.
const TEETH: Range<u64> = 0..250;

/// What has to happen somewhere in an ordinary run, or it proves nothing about it.
const SEEN: [&str; 28] = [
    "messages lost",
    "messages overtaken",
    "messages came twice",
    "services crashed",
    "services cut off from the bus",
    "services cut off from the log",
    "agents killed",
    "agents cut off",
    "fleets cut off",
    "capacity wiped",
    "clocks jumped",
    "external work begun",
    "external work released",
    "orchestrators died",
    "slots lost before an agent was asked again",
    "capacity moved back",
    "clocks corrected",
    "services stood still",
    "machines slept",
    "services lost heartbeats",
    "gaps believed by a prober",
    "gaps believed by a watchdog",
    "drains granted",
    "drains taken back",
    "drains enforced",
    "agents forgotten",
    "capacity changed",
    "capacity below what runs",
];

const DEFECTS: [Defect; 15] = [
    Defect::ExternalAsked,
    Defect::UnansweredIsUnasked,
    Defect::SilenceRefuses,
    Defect::EndUnconfirmed,
    Defect::NoCas,
    Defect::AckBeforeAppend,
    Defect::NoAttemptFence,
    Defect::VoidCountedAsAbsent,
    Defect::ReleaseWithoutCheck,
    Defect::NoTombstone,
    Defect::AskUnconfirmed,
    Defect::StallIgnored,
    Defect::DrainIgnored,
    Defect::LoweredIgnored,
    Defect::RestoredBelieved,
];

fn setup(seed: u64, defect: Option<Defect>) -> Setup {
    Setup { seed, defect, trace: false, digest: false }
}

/// What failed, and the one command that shows it again.
fn replay_line(seed: u64, violation: &Violation) -> String {
    format!(
        "seed {seed} broke invariant {}: {}\nreplay it with: ROLLCALL_SEED={seed} cargo test -p worlds replay -- --nocapture",
        violation.invariant, violation.what
    )
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn every_world_keeps_the_invariants() {
    let count = number("ROLLCALL_WORLDS").unwrap_or(WORLDS);
    let from = number("ROLLCALL_WORLDS_FROM").unwrap_or(0);
    let began = Instant::now();
    let share = |thread: u64| {
        let mut failures = Vec::new();
        let (mut done, mut recovered) = (0, 0);
        let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
        for seed in (from + thread..from + count).step_by(usize::try_from(THREADS).unwrap()) {
            done += 1;
            match run(setup(seed, None)) {
                Ok(summary) => {
                    recovered += summary.recovered;
                    summary
                        .seen
                        .into_iter()
                        .for_each(|(what, times)| *seen.entry(what).or_default() += times);
                }
                Err(violation) => failures.push(replay_line(seed, &violation)),
            }
        }
        (done, recovered, seen, failures)
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || share(thread))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let done: u64 = results.iter().map(|(done, ..)| done).sum();
    let recovered: usize = results.iter().map(|(_, recovered, ..)| recovered).sum();
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    for (what, times) in results.iter().flat_map(|(_, _, seen, _)| seen) {
        *seen.entry(what).or_default() += times;
    }
    let failures: Vec<String> = results.into_iter().flat_map(|(.., failures)| failures).collect();
    println!("{done} worlds with {recovered} recoveries in {:?}: {seen:?}", began.elapsed());
    assert_eq!(done, count);
    assert!(failures.is_empty(), "{} worlds failed:\n{}", failures.len(), failures.join("\n"));
    for what in SEEN {
        // Rare ones need a crowd.
        assert!(done < WORLDS || seen.contains_key(what), "{what}: never");
    }
    assert!(recovered as u64 > done, "worlds in which nothing is ever lost prove little: {recovered}");
}

/// Shows one world: `ROLLCALL_SEED=123 cargo test -p worlds replay -- --nocapture`; with `ROLLCALL_DEFECT=NoCas` (or
/// another) a defective one.
#[test]
fn replay() {
    let Some(seed) = number("ROLLCALL_SEED") else { return };
    let defect = std::env::var("ROLLCALL_DEFECT").ok().map(|name| {
        *DEFECTS.iter().find(|defect| format!("{defect:?}") == name).expect("ROLLCALL_DEFECT names a defect")
    });
    match run(Setup { seed, defect, trace: true, digest: false }) {
        Ok(summary) => println!("{summary:?}"),
        Err(violation) => panic!("{}", replay_line(seed, &violation)),
    }
}

#[test]
fn the_same_seed_is_the_same_world() {
    for seed in 0..20 {
        let whole = Setup { digest: true, ..setup(seed, None) };
        assert_eq!(run(whole), run(whole), "seed {seed}");
    }
}

/// Some world finds the defect, by one of the invariants that it breaks, and none of those up to there breaks without it.
fn is_caught(defect: Defect, invariants: &[u8]) {
    found(defect, |violation| invariants.contains(&violation.invariant));
}

/// The same, and what the judge says has these words in it: there are several looks at one invariant.
fn says_so(defect: Defect, invariant: u8, words: &str) {
    found(defect, |violation| violation.invariant == invariant && violation.what.contains(words));
}

fn found(defect: Defect, is_it: impl Fn(&Violation) -> bool) {
    for seed in TEETH {
        if let Err(violation) = run(setup(seed, None)) {
            panic!("without any defect: {}", replay_line(seed, &violation));
        }
        if let Err(violation) = run(setup(seed, Some(defect)))
            && is_it(&violation)
        {
            println!(
                "{defect:?} is caught by seed {seed}: invariant {}: {}",
                violation.invariant, violation.what
            );
            return;
        }
    }
    panic!("{defect:?} is not caught by any of the seeds {TEETH:?}");
}

#[test]
fn appending_without_compare_and_set_is_caught() {
    is_caught(Defect::NoCas, &[2, 3]);
}

#[test]
fn acknowledging_before_appending_is_caught() {
    is_caught(Defect::AckBeforeAppend, &[5]);
}

#[test]
fn a_missing_attempt_fence_is_caught() {
    is_caught(Defect::NoAttemptFence, &[5]);
}

#[test]
fn counting_void_as_absent_is_caught() {
    is_caught(Defect::VoidCountedAsAbsent, &[6]);
}

#[test]
fn asking_without_a_confirmed_slot_is_caught() {
    is_caught(Defect::AskUnconfirmed, &[1]);
}

#[test]
fn releasing_what_one_does_not_hold_is_caught() {
    is_caught(Defect::ReleaseWithoutCheck, &[1, 4]);
}

#[test]
fn starting_what_was_ended_before_it_came_is_caught() {
    is_caught(Defect::NoTombstone, &[7]);
}

#[test]
fn ignoring_that_one_stood_still_is_caught() {
    is_caught(Defect::StallIgnored, &[6]);
}

#[test]
fn giving_work_to_who_is_drained_is_caught() {
    is_caught(Defect::DrainIgnored, &[1]);
}

#[test]
fn ignoring_that_an_agent_holds_less_is_caught() {
    is_caught(Defect::LoweredIgnored, &[1]);
}

#[test]
fn believing_capacity_that_went_back_is_caught() {
    is_caught(Defect::RestoredBelieved, &[1, 4]);
}

#[test]
fn taking_silence_for_a_refusal_is_caught() {
    says_so(Defect::SilenceRefuses, 1, "ran twice");
}

#[test]
fn taking_for_dead_what_still_runs_is_caught() {
    says_so(Defect::EndUnconfirmed, 1, "begins");
}

#[test]
fn saying_of_what_was_asked_that_it_was_not_is_caught() {
    says_so(Defect::UnansweredIsUnasked, 1, "had begun");
}

#[test]
fn asking_an_agent_to_take_what_is_external_is_caught() {
    says_so(Defect::ExternalAsked, 1, "which is external");
}

#[test]
fn granting_it_to_an_orchestrator_once_more_is_caught() {
    says_so(Defect::NoCas, 1, "granted twice");
}
