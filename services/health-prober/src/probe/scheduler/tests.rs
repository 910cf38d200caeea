use super::*;

const INTERVAL: Duration = Duration::from_secs(30);

fn at(base: Instant, ms: u64) -> Instant {
    base + Duration::from_millis(ms)
}

#[test]
fn probes_keep_their_phase_and_leave_out_late_ticks() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL);
    let generation = plan.watch(1, "h", 0.0, base);
    assert_eq!(plan.begin(base), [(1, generation)]);
    assert_eq!(plan.begin(at(base, 100_000)), [], "never two of one endpoint at once");
    // It took three and a half intervals: the ticks in between are gone, the phase stays.
    plan.ended(1, generation, "h", Ended::Well, at(base, 105_000));
    assert_eq!(plan.next_due(), Some(at(base, 120_000)));
}

#[test]
fn what_fails_is_probed_sooner_and_what_is_down_later() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL);
    let generation = plan.watch(1, "h", 0.0, base);
    let mut now = base;
    let mut gaps = Vec::new();
    for _ in 0..7 {
        now = plan.next_due().unwrap();
        plan.begin(now);
        plan.ended(1, generation, "h", Ended::Badly, now);
        gaps.push(plan.next_due().unwrap().duration_since(now).as_millis());
    }
    assert_eq!(gaps, [7500, 7500, 30_000, 60_000, 120_000, 120_000, 120_000]);
    // Something else says that it is back.
    plan.suspect(1, at(now, 5000));
    assert_eq!(plan.begin(at(now, 5000)), [(1, generation)]);
    plan.ended(1, generation, "h", Ended::Well, at(now, 5001));
    let gap = plan.next_due().unwrap().duration_since(at(now, 5001));
    assert!(gap <= INTERVAL + GAP_MIN, "{gap:?}");
}

#[test]
fn a_probe_that_was_brought_forward_is_not_made_again_at_its_old_time() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL);
    let generation = plan.watch(1, "h", 1.0, base);
    plan.suspect(1, base);
    assert_eq!(plan.begin(base), [(1, generation)]);
    plan.ended(1, generation, "h", Ended::Badly, at(base, 10));
    assert_eq!(plan.begin(at(base, 1000)), [], "its old time");
    assert_eq!(plan.begin(at(base, 7500)), [(1, generation)]);
}

#[test]
fn suspects_go_first() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL);
    for index in 0..10 {
        plan.watch(index, "h", 0.0, base);
    }
    plan.watch(77, "h", 1.0, base);
    plan.suspect(77, base);
    assert_eq!(plan.begin(base)[0].0, 77);
}

#[test]
fn a_host_that_hangs_delays_nobody_else() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL);
    let hanging = u32::try_from(PROBES_MAX * 2).unwrap();
    for index in 0..hanging {
        plan.watch(index, "hangs", 0.0, base);
    }
    for index in hanging..hanging + 100 {
        plan.watch(index, "well", 0.0, base);
    }
    let begun = plan.begin(at(base, 60_000));
    assert_eq!(begun.iter().filter(|(index, _)| *index < hanging).count(), PROBES_PER_HOST_MAX);
    assert_eq!(begun.iter().filter(|(index, _)| *index >= hanging).count(), 100);
    // One place comes free: one that waited for this host gets it.
    let (index, generation) = begun[0];
    plan.ended(index, generation, "hangs", Ended::Badly, at(base, 63_000));
    assert_eq!(plan.begin(at(base, 63_000)).len(), 1);
}

#[test]
fn ten_thousand_endpoints_of_which_a_thousand_hang_are_swept_within_one_interval() {
    // Virtual time: a good probe takes 2 ms, a hanging one its timeout of 3 s; all on two hundred hosts.
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL);
    for index in 0..10_000_u32 {
        let jitter = f64::from(index % 997) / 997.0;
        plan.watch(index, &format!("h{}", index % 200), jitter, base);
    }
    let mut running: BinaryHeap<Reverse<(Instant, Index, u64)>> = BinaryHeap::new();
    let (mut now, mut done) = (base, std::collections::HashSet::new());
    while done.len() < 10_000 {
        for (index, generation) in plan.begin(now) {
            let takes = if index % 10 == 0 { 3000 } else { 2 };
            running.push(Reverse((at(now, takes), index, generation)));
        }
        assert!(running.len() <= PROBES_MAX);
        let ends = running.peek().map(|Reverse((end, ..))| *end);
        now = [ends, plan.next_due()].into_iter().flatten().min().unwrap().max(now);
        while let Some(Reverse((end, index, generation))) = running.peek().copied() {
            if end > now {
                break;
            }
            running.pop();
            let ended = if index % 10 == 0 { Ended::Badly } else { Ended::Well };
            plan.ended(index, generation, &format!("h{}", index % 200), ended, now);
            done.insert(index);
        }
    }
    assert!(now.duration_since(base) < INTERVAL, "{:?}", now.duration_since(base));
}

#[test]
fn a_replaced_watch_ignores_what_the_old_one_brings() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL);
    let old = plan.watch(1, "a", 0.0, base);
    assert_eq!(plan.begin(base), [(1, old)]);
    let new = plan.watch(1, "b", 0.0, base);
    assert_eq!(plan.begin(at(base, 1)), [(1, new)]);
    plan.ended(1, old, "a", Ended::Badly, at(base, 2));
    plan.ended(1, new, "b", Ended::Well, at(base, 3));
    assert_eq!(plan.next_due(), Some(base + INTERVAL));
    plan.unwatch(1);
    assert!(plan.is_empty());
    assert_eq!(plan.begin(at(base, 120_000)), []);
}
