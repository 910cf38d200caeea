use rollcall_control::Trust;
use rollcall_core::{AgentId, InstanceId, wire::Endpoint};

use super::*;
use crate::probe::{Target, scheduler::Scheduler};

const INTERVAL: Duration = Duration::from_secs(30);

fn at(base: Instant, ms: u64) -> Instant {
    base + Duration::from_millis(ms)
}

#[test]
fn probes_keep_their_phase_and_leave_out_late_ticks() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    let generation = plan.watch(1, "h", 0.0, base);
    assert_eq!(plan.begin(base), [(1, generation)]);
    assert_eq!(plan.begin(at(base, 100_000)), [], "never two of one endpoint at once");
    // It took three and a half intervals: the ticks in between are gone, the phase stays.
    plan.ended(1, generation, Ended::Well, at(base, 105_000));
    assert_eq!(plan.next_due(), Some(at(base, 120_000)));
}

#[test]
fn what_fails_is_probed_sooner_and_what_is_down_later() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    let generation = plan.watch(1, "h", 0.0, base);
    let mut now = base;
    let mut gaps = Vec::new();
    for _ in 0..7 {
        now = plan.next_due().unwrap();
        plan.begin(now);
        plan.ended(1, generation, Ended::Badly, now);
        gaps.push(plan.next_due().unwrap().duration_since(now).as_millis());
    }
    assert_eq!(gaps, [7500, 7500, 30_000, 60_000, 120_000, 120_000, 120_000]);
    // Something else says that it is back.
    plan.suspect(1, at(now, 5000));
    assert_eq!(plan.begin(at(now, 5000)), [(1, generation)]);
    plan.ended(1, generation, Ended::Well, at(now, 5001));
    let gap = plan.next_due().unwrap().duration_since(at(now, 5001));
    assert!(gap <= INTERVAL + GAP_MIN, "{gap:?}");
}

#[test]
fn a_probe_that_was_brought_forward_is_not_made_again_at_its_old_time() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    let generation = plan.watch(1, "h", 1.0, base);
    plan.suspect(1, base);
    assert_eq!(plan.begin(base), [(1, generation)]);
    plan.ended(1, generation, Ended::Badly, at(base, 10));
    assert_eq!(plan.begin(at(base, 1000)), [], "its old time");
    assert_eq!(plan.begin(at(base, 7500)), [(1, generation)]);
}

#[test]
fn the_first_probes_of_a_large_fleet_do_not_all_begin_at_once_and_the_next_are_spread_over_the_interval() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    let fleet = 5000;
    for index in 0..fleet {
        plan.watch(index, &format!("h{index}"), f64::from(index * 7 % 1000) / 1000.0, base);
    }
    let (mut first, mut second) = (vec![0_u32; 30], vec![0_u32; 60]);
    let mut seen = HashMap::new();
    while let Some(now) = plan.next_due().filter(|at| *at < base + INTERVAL * 2) {
        for (index, generation) in plan.begin(now) {
            let seconds = usize::try_from(now.duration_since(base).as_secs()).unwrap();
            match seen.insert(index, now) {
                None => first[seconds] += 1,
                Some(before) => {
                    second[seconds] += 1;
                    assert!(
                        now.duration_since(before) <= INTERVAL + GAP_MIN,
                        "{index}: {:?}",
                        now.duration_since(before)
                    );
                }
            }
            plan.ended(index, generation, Ended::Well, now);
        }
    }
    assert_eq!(first.iter().sum::<u32>(), fleet);
    assert!(first.iter().all(|count| *count <= 550), "{first:?}");
    // After the first interval there are as many in each second as in any other.
    assert!(second[30..].iter().all(|count| count.abs_diff(fleet / 30) <= 10), "{second:?}");
}

#[test]
fn what_is_watched_gets_a_phase_of_its_own() {
    let scheduler = Scheduler::new(INTERVAL, Bounds::FULL);
    for index in 0..100 {
        let endpoint = Endpoint { kind: "tcp".to_owned(), url: format!("tcp://h{index}:1") };
        let (agent_id, instance_id) = (AgentId::new("a").unwrap(), InstanceId::new("i").unwrap());
        scheduler.watch(index, Target { agent_id, instance_id, endpoint, trust: Trust::Agent });
    }
    let shared = scheduler.lock();
    let phases = || shared.plan.slots.values().map(|slot| slot.phase);
    let spread = phases().max().unwrap().duration_since(phases().min().unwrap());
    assert!(spread > INTERVAL / 2, "all of them within {spread:?}");
}

#[test]
fn suspects_go_first() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    for index in 0..10 {
        plan.watch(index, "h", 0.0, base);
    }
    plan.watch(77, "h", 1.0, base);
    let later = at(base, 100);
    plan.suspect(77, later);
    let begun: Vec<Index> = plan.begin(later).into_iter().map(|(index, _)| index).collect();
    assert_eq!(begun, [77, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn suspects_go_first_also_where_they_wait_for_their_host_already() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    let per_host = u32::try_from(Bounds::FULL.per_host).unwrap();
    for index in 0..per_host + 50 {
        plan.watch(index, "h", 0.0, base);
    }
    let now = at(base, 1000);
    let begun = plan.begin(now);
    assert_eq!(begun.len(), Bounds::FULL.per_host);
    let last = per_host + 49;
    plan.suspect(last, now);
    assert_eq!(plan.begin(now), [], "no place is free");
    plan.ended(begun[0].0, begun[0].1, Ended::Well, now);
    let next: Vec<Index> = plan.begin(now).into_iter().map(|(index, _)| index).collect();
    assert_eq!(next, [last]);
    // It waited twice, and is probed once.
    let mut rest = Vec::new();
    for (index, generation) in &begun[1..] {
        plan.ended(*index, *generation, Ended::Well, now);
        rest.extend(plan.begin(now).into_iter().map(|(index, _)| index));
    }
    assert_eq!(rest, (per_host..last).collect::<Vec<_>>());
}

#[test]
fn no_more_are_in_flight_than_there_are_places() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    let many = u32::try_from(Bounds::FULL.total * 2).unwrap();
    for index in 0..many {
        plan.watch(index, &format!("h{index}"), 0.0, base);
    }
    let begun = plan.begin(at(base, 20_000));
    assert_eq!(begun.len(), Bounds::FULL.total);
    let (index, generation) = begun[0];
    plan.ended(index, generation, Ended::Well, at(base, 20_001));
    plan.ended(index, generation, Ended::Well, at(base, 20_001));
    assert_eq!(plan.begin(at(base, 20_001)).len(), 1, "one place came free, however often it is said");
}

#[test]
fn a_host_that_hangs_delays_nobody_else() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    let hanging = u32::try_from(Bounds::FULL.total * 2).unwrap();
    for index in 0..hanging {
        plan.watch(index, "hangs", 0.0, base);
    }
    for index in hanging..hanging + 100 {
        plan.watch(index, "well", 0.0, base);
    }
    let begun = plan.begin(at(base, 60_000));
    assert_eq!(begun.iter().filter(|(index, _)| *index < hanging).count(), Bounds::FULL.per_host);
    assert_eq!(begun.iter().filter(|(index, _)| *index >= hanging).count(), 100);
    // One place comes free: one that waited for this host gets it.
    let (index, generation) = begun[0];
    plan.ended(index, generation, Ended::Hung, at(base, 63_000));
    assert_eq!(plan.begin(at(base, 63_000)).len(), 1);
}

#[test]
fn what_hung_takes_half_of_the_places_at_most_and_waits_behind_the_others() {
    for hosts in [1, 10_000] {
        let base = Instant::now();
        let mut plan = Plan::new(INTERVAL, Bounds::FULL);
        let places = if hosts == 1 { Bounds::FULL.per_host } else { Bounds::FULL.total };
        let hanging = u32::try_from(places).unwrap();
        let host = |index: Index| format!("h{}", index % hosts);
        for index in 0..hanging {
            plan.watch(index, &host(index), 0.0, base);
        }
        let begun = plan.begin(at(base, 10_000));
        assert_eq!(begun.len(), places);
        for (index, generation) in begun {
            plan.ended(index, generation, Ended::Hung, at(base, 13_000));
        }
        // All of them are due again, and as many others with them.
        for index in hanging..2 * hanging {
            plan.watch(index, &host(index), 0.0, at(base, 13_000));
        }
        let again = plan.begin(at(base, 25_000));
        assert!(again.iter().all(|(index, _)| *index >= hanging), "the others first");
        for (index, generation) in again {
            plan.ended(index, generation, Ended::Well, at(base, 25_001));
        }
        let again = plan.begin(at(base, 25_001));
        assert_eq!(again.len(), places / 2, "and never all places for what hung");
        assert!(again.iter().all(|(index, _)| *index < hanging));
        // Whoever else comes finds a place at once.
        plan.watch(u32::MAX, &host(0), 0.0, at(base, 25_002));
        assert_eq!(plan.begin(at(base, 25_002)).len(), 1);
        let (index, generation) = again[0];
        plan.ended(index, generation, Ended::Hung, at(base, 25_003));
        assert_eq!(plan.begin(at(base, 25_003)).len(), 1, "one that hung gets the place of another");
    }
}

/// A plan in which the eight places of one host are taken by 0 to 7, and more wait for one.
fn crowded(waiting: Index, now: Instant) -> (Plan, Vec<(Index, u64)>) {
    let mut plan = Plan::new(INTERVAL, Bounds { per_host: 8, ..Bounds::FULL });
    for index in 0..8 + waiting {
        plan.watch(index, "h", 0.0, now - Duration::from_secs(1));
    }
    let begun = plan.begin(now);
    assert_eq!(begun.len(), 8);
    (plan, begun)
}

fn indices(begun: Vec<(Index, u64)>) -> Vec<Index> {
    begun.into_iter().map(|(index, _)| index).collect()
}

#[test]
fn a_place_that_was_meant_for_one_that_is_watched_no_more_goes_to_the_next() {
    let base = Instant::now() + Duration::from_secs(10);
    for before_it_is_free in [true, false] {
        let (mut plan, begun) = crowded(2, base);
        if before_it_is_free {
            plan.unwatch(8);
        }
        plan.ended(begun[0].0, begun[0].1, Ended::Well, at(base, 1));
        plan.unwatch(8);
        assert_eq!(indices(plan.begin(at(base, 2))), [9], "before it is free: {before_it_is_free}");
    }
}

#[test]
fn who_waited_in_two_places_takes_one_turn() {
    let base = Instant::now() + Duration::from_secs(10);
    let (mut plan, begun) = crowded(3, base);
    plan.suspect(10, base);
    plan.ended(begun[0].0, begun[0].1, Ended::Well, at(base, 1));
    let turn = plan.begin(at(base, 1));
    assert_eq!(indices(turn.clone()), [10]);
    plan.ended(10, turn[0].1, Ended::Hung, at(base, 2));
    assert_eq!(indices(plan.begin(at(base, 2))), [9]);
    // The next time it is due it goes behind the others again, wherever it stood before.
    assert_eq!(plan.begin(at(base, 10_000)), []);
    plan.ended(begun[1].0, begun[1].1, Ended::Void, at(base, 10_001));
    assert_eq!(indices(plan.begin(at(base, 10_001))), [8]);
}

#[test]
fn what_was_probed_a_moment_ago_is_not_probed_again_at_once() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    let generation = plan.watch(1, "h", 0.0, base);
    plan.begin(base);
    plan.ended(1, generation, Ended::Well, base);
    plan.suspect(1, at(base, 999));
    assert_eq!(plan.begin(at(base, 999)), []);
    plan.suspect(1, at(base, 1000));
    assert_eq!(indices(plan.begin(at(base, 1000))), [1]);
    plan.ended(1, generation, Ended::Well, at(base, 1001));
    // Every second where that is the interval, also if it begins a little late each time.
    let second = Duration::from_secs(1);
    let mut plan = Plan::new(second, Bounds::FULL);
    let generation = plan.watch(1, "h", 0.0, base);
    for tick in 0..5 {
        let due = base + second * tick;
        assert_eq!(plan.next_due(), Some(due));
        plan.begin(due + Duration::from_millis(3));
        plan.ended(1, generation, Ended::Well, due + Duration::from_millis(7));
    }
}

#[test]
fn what_says_nothing_is_not_held_against_it_and_what_is_no_endpoint_is_looked_at_seldom() {
    let base = Instant::now();
    for (ended, next) in [(Ended::Void, [30, 60, 90, 120]), (Ended::Skipped, [120, 240, 360, 480])] {
        let mut plan = Plan::new(INTERVAL, Bounds::FULL);
        let generation = plan.watch(1, "h", 0.0, base);
        let mut now = base;
        for seconds in next {
            plan.begin(now);
            plan.ended(1, generation, ended, now);
            now = plan.next_due().unwrap();
            assert_eq!(now, at(base, seconds * 1000), "{ended:?}");
        }
        // One failure after all of them is the first.
        plan.begin(now);
        plan.ended(1, generation, Ended::Badly, now);
        assert_eq!(plan.next_due(), Some(now + INTERVAL / SUSPECT_HASTE), "{ended:?}");
    }
}

/// Ten thousand endpoints of which a thousand hang, in virtual time for `rounds` intervals: a good probe takes 2 ms, one
/// that hangs its timeout of 3 s. Returns the longest time that one that is well was without a verdict, in the first round
/// and after it.
fn sweep(hosts: u32, rounds: u32) -> (Duration, Duration) {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    for index in 0..10_000 {
        let jitter = f64::from(index % 997) / 997.0;
        plan.watch(index, &format!("h{}", index % hosts), jitter, base);
    }
    let mut running: BinaryHeap<Reverse<(Instant, Index, u64)>> = BinaryHeap::new();
    let mut last: Vec<Option<Instant>> = vec![None; 10_000];
    let (mut first_gap, mut later_gap) = (Duration::ZERO, Duration::ZERO);
    let mut now = base;
    while now < base + INTERVAL * rounds {
        for (index, generation) in plan.begin(now) {
            let takes = if index % 10 == 0 { 3000 } else { 2 };
            running.push(Reverse((at(now, takes), index, generation)));
        }
        assert!(running.len() <= Bounds::FULL.total);
        let ends = running.peek().map(|Reverse((end, ..))| *end);
        let next = [ends, plan.next_due()].into_iter().flatten().min().unwrap();
        now = next.max(now);
        while let Some(Reverse((end, index, generation))) = running.peek().copied() {
            if end > now {
                break;
            }
            running.pop();
            let ended = if index % 10 == 0 { Ended::Hung } else { Ended::Well };
            plan.ended(index, generation, ended, now);
            let before = last[index as usize].replace(now);
            match before {
                None => first_gap = first_gap.max(now.duration_since(base)),
                Some(before) if ended == Ended::Well => later_gap = later_gap.max(now.duration_since(before)),
                Some(_) => {}
            }
        }
    }
    assert!(last.iter().all(Option::is_some), "everybody got a verdict");
    (first_gap, later_gap)
}

#[test]
fn ten_thousand_endpoints_of_which_a_thousand_hang_are_swept_within_one_interval_on_many_hosts_or_on_one() {
    for hosts in [200, 1] {
        let (first, later) = sweep(hosts, 5);
        assert!(first < INTERVAL, "{hosts} hosts: {first:?}");
        // And in the rounds after it nobody who is well waits for those that hang.
        assert!(later <= INTERVAL + GAP_MIN + Duration::from_millis(50), "{hosts} hosts: {later:?}");
    }
}

#[test]
fn a_replaced_watch_ignores_what_the_old_one_brings() {
    let base = Instant::now();
    let mut plan = Plan::new(INTERVAL, Bounds::FULL);
    let old = plan.watch(1, "a", 0.0, base);
    assert_eq!(plan.begin(base), [(1, old)]);
    let new = plan.watch(1, "b", 0.0, base);
    assert_eq!(plan.begin(at(base, 10)), [(1, new)]);
    plan.ended(1, old, Ended::Badly, at(base, 12));
    plan.ended(1, new, Ended::Well, at(base, 13));
    assert_eq!(plan.next_due(), Some(base + INTERVAL));
    plan.unwatch(1);
    assert!(plan.is_empty());
    assert_eq!(plan.begin(at(base, 120_000)), []);
}
