//! Thousands of worlds, and the proof that they would notice.

use worlds::{Defect, Setup, Violation, run};

const ALL: [Defect;5] = [Defect::NoCas, Defect::AckBeforeAppend, Defect::NoAttemptFence, Defect::VoidCountedAsAbsent, Defect::ReleaseWithoutCheck];
fn replay_line(seed: u64, violation: &Violation) -> String {
    format!(
        "seed {seed} broke invariant {}: {}\nreplay: ROLLCALL_SEED={seed} cargo test -p worlds replay -- --nocapture",
        violation.invariant, violation.what
    )
}

#[test]
fn probe_teeth() {
    for d in [
        Defect::NoCas,
        Defect::AckBeforeAppend,
        Defect::NoAttemptFence,
        Defect::VoidCountedAsAbsent,
        Defect::ReleaseWithoutCheck,
    ] {
        let start = std::time::Instant::now();
        let mut caught = 0;
        for seed in 0..200 {
            if let Err(v) = run(Setup { seed, defect: Some(d), trace: false }) {
                caught += 1;
                if caught < 8 {
                    println!("{d:?} {seed} {v:?}");
                }
            }
        }
        println!("{d:?} caught {caught} {:?}", start.elapsed());
    }
}
#[test]
fn replay() {
    let Some(seed) = std::env::var("ROLLCALL_SEED").ok().and_then(|s| s.parse().ok()) else { return };
    let defect = std::env::var("ROLLCALL_DEFECT").ok().map(|name| {
        *ALL.iter().find(|d| format!("{d:?}") == name).expect("ROLLCALL_DEFECT names a defect")
    });
    if let Err(violation) = run(Setup { seed, defect, trace: true }) {
        panic!("{}", replay_line(seed, &violation));
    }
}
#[test]
fn probe_more() {
    let start = std::time::Instant::now();
    let mut bad = 0;
    for seed in 2000..3500 {
        if let Err(v) = run(Setup { seed, defect: None, trace: false }) {
            bad += 1; println!("{}", replay_line(seed, &v)) }
    }
    println!("bad {bad} {:?}", start.elapsed());
}
