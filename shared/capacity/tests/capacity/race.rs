//! Processes that race for the same slots and the same holds, and a count of everything in the end.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rollcall_capacity::testing::RedisServer;
use rollcall_capacity::{
    Admission, Capacity, Grant, Hold, Outcome, Place, Priority, Queue, RedisCapacity, Requeue, Stamp,
};

use crate::support::*;

const RACERS: u64 = 4;
/// Operations of each racer.
const ROUNDS: u64 = 2500;
/// Agents with one slot that all racers want, one after another.
const PRIZES: u64 = 300;
/// Executions that all of them admit, requeue and settle again and again.
const HOLDS: u64 = 12;
const AGENTS: [(&str, u32); 4] = [("a1", 1), ("a2", 2), ("a3", 3), ("a4", 3)];
/// The racer's number and the server's URL, for a process that this test started.
const RACER: &str = "ROLLCALL_TEST_RACER";

/// What a racer tells: one line per fact that happened by its call.
fn tell(fact: &str, hold: &Hold) {
    println!("= {fact} {hold}");
}

fn tell_promoted(grants: &[Grant]) {
    grants.iter().for_each(|grant| tell("promoted", &grant.hold));
}

fn tell_admission(hold: &Hold, admission: &Admission) -> bool {
    tell_promoted(&admission.promoted);
    match &admission.outcome {
        Outcome::Granted { already: false, .. } => tell("granted", hold),
        Outcome::Queued { already: false, .. } => tell("queued", hold),
        _ => return false,
    }
    true
}

/// In a process of its own; in the ordinary run of the tests it does nothing.
#[tokio::test]
async fn racer() {
    let Ok(racer) = std::env::var(RACER) else { return };
    let (number, url) = racer.split_once(' ').unwrap();
    let number: u64 = number.parse().unwrap();
    let c = connect(url).await;
    c.ping().await.unwrap();
    println!("= started");
    // All begin together: when the parent says so.
    std::io::stdin().read_line(&mut String::new()).unwrap();
    for prize in 0..PRIZES {
        let hold = Hold::new(format!("prize{prize}"), number as u32 + 1);
        let admission = c.admit_to_agent(POOL, &format!("g{prize}"), &hold, ask(5, 0), at(1)).await.unwrap();
        tell_admission(&hold, &admission);
    }
    let mut random = StdRng::seed_from_u64(number);
    for round in 0..ROUNDS {
        race(&c, &mut random, number, round).await;
    }
}

async fn race(c: &RedisCapacity, random: &mut StdRng, number: u64, round: u64) {
    let stamp = Stamp::new(1000 + round, round);
    // Few enough that everybody wants everybody's.
    let hold = Hold::new(format!("h{}", random.random_range(0..HOLDS)), random.random_range(1..4));
    let (agent, slots) = AGENTS[random.random_range(0..AGENTS.len())];
    match random.random_range(0..100) {
        0..25 => {
            let asked = ask(random.random_range(0..3), 6);
            let admission = c.admit_to_agent(POOL, agent, &hold, asked, stamp).await.unwrap();
            tell_admission(&hold, &admission);
            if let Outcome::Granted { grant, .. } = &admission.outcome {
                c.confirm(POOL, grant, stamp).await.unwrap();
            }
        }
        25..45 => {
            let admission =
                c.admit_to_pool(POOL, &hold, ask(random.random_range(0..3), 9), stamp).await.unwrap();
            tell_admission(&hold, &admission);
        }
        45..75 => {
            let settled = c.settle(POOL, &hold, stamp).await.unwrap();
            tell_promoted(&settled.promoted);
            assert!(settled.promoted.len() <= usize::from(settled.released));
            if settled.released {
                tell("released", &hold);
            }
            if settled.dequeued {
                tell("dequeued", &hold);
            }
        }
        75..88 => {
            let refusal = random.random_bool(0.5);
            let requeue = Requeue {
                old: hold.clone(),
                new: if refusal { hold.clone() } else { Hold::new(hold.execution_id.clone(), 3) },
                queue: if random.random_bool(0.5) { Queue::Pool } else { Queue::Agent(agent.into()) },
                priority: Priority::default(),
                hold_back: refusal.then(|| agent.to_owned()),
                granted_at_ms: None,
                granted_by_ms: None,
            };
            let requeued = c.requeue(POOL, &requeue, stamp).await.unwrap();
            tell_promoted(&requeued.promoted);
            for (happened, fact, who) in [
                (requeued.released, "released", &requeue.old),
                (requeued.dequeued, "dequeued", &requeue.old),
                (requeued.queued, "queued", &requeue.new),
            ] {
                if happened {
                    tell(fact, who);
                }
            }
        }
        88..94 => tell_promoted(&c.reopen(POOL, agent, stamp).await.unwrap().promoted),
        _ => {
            let lower = random.random_range(0..=slots);
            let seq = round * RACERS + number + 2;
            let now = setting(lower, random.random_bool(0.8), seq);
            tell_promoted(&c.set_agent(POOL, agent, now, stamp).await.unwrap().promoted);
        }
    }
}

fn start_racer(number: u64, url: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "race::racer", "--nocapture"])
        .env(RACER, format!("{number} {url}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// How often each fact was told of each hold.
type Facts = BTreeMap<(String, String), i64>;

fn count_facts(children: Vec<Child>) -> Facts {
    // One thread each: a racer whose pipe is full waits.
    let readers: Vec<_> = children
        .into_iter()
        .map(|mut child| {
            std::thread::spawn(move || {
                let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
                // The harness may write in front of the first line.
                assert!(lines.any(|line| line.ends_with("= started")), "a racer did not start");
                let mut stdin = child.stdin.take().unwrap();
                stdin.write_all(b"go\n").unwrap();
                let facts: Vec<String> =
                    lines.filter_map(|line| Some(line.strip_prefix("= ")?.to_owned())).collect();
                assert!(child.wait().unwrap().success(), "a racer failed");
                facts
            })
        })
        .collect();
    let mut facts = Facts::new();
    for reader in readers {
        for line in reader.join().unwrap() {
            let (fact, hold) = line.split_once(' ').unwrap();
            *facts.entry((hold.to_owned(), fact.to_owned())).or_default() += 1;
        }
    }
    facts
}

/// Looks on while the racers run: never more held than any setting allowed.
async fn observe(url: String, stop: tokio::sync::watch::Receiver<bool>) -> u64 {
    let c = connect(&url).await;
    let mut looks = 0;
    while !*stop.borrow() {
        for (agent, slots) in AGENTS {
            let held = c.inspect(POOL, agent, 0).await.unwrap().held_count;
            assert!(held <= slots.into(), "{agent} holds {held} of {slots}");
        }
        looks += 1;
    }
    looks
}

async fn all_places(c: &RedisCapacity) -> BTreeMap<String, Place> {
    let mut places = BTreeMap::new();
    let mut from = None;
    loop {
        let page = c.scan(POOL, from).await.unwrap();
        places.extend(page.holds.into_iter().map(|placed| (placed.hold.to_string(), placed.place)));
        from = page.next;
        if from.is_none() {
            return places;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_processes_never_grant_twice_nor_too_much() {
    let server = RedisServer::start();
    let url = server.url();
    let c = connect(&url).await;
    ready(&c).await;
    for (agent, slots) in AGENTS {
        c.set_agent(POOL, agent, setting(slots, true, 1), at(1)).await.unwrap();
    }
    for prize in 0..PRIZES {
        c.set_agent(POOL, &format!("g{prize}"), setting(1, true, 1), at(1)).await.unwrap();
    }
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let observer = tokio::spawn(observe(url.clone(), stopped));
    let racers = (0..RACERS).map(|number| start_racer(number, &url)).collect();
    let facts = tokio::task::spawn_blocking(|| count_facts(racers)).await.unwrap();
    stop.send(true).unwrap();
    assert!(observer.await.unwrap() > 20);

    check_prizes(&facts);
    check_accounts(&facts, &all_places(&c).await);
    drain(&c).await;
}

fn check_prizes(facts: &Facts) {
    for prize in 0..PRIZES {
        let winners = (1..=RACERS).map(|number| format!("prize{prize}:{number}"));
        let won: i64 = winners.filter_map(|hold| facts.get(&(hold, "granted".into()))).sum();
        assert_eq!(won, 1, "one slot of agent g{prize} was granted {won} times");
    }
}

/// Every grant and place that was told of ended in a release, a departure, a promotion, or is there still.
fn check_accounts(facts: &Facts, places: &BTreeMap<String, Place>) {
    let told = |hold: &str, fact: &str| facts.get(&(hold.to_owned(), fact.to_owned())).copied().unwrap_or(0);
    let holds: std::collections::BTreeSet<&str> =
        facts.keys().map(|(hold, _)| hold.as_str()).chain(places.keys().map(String::as_str)).collect();
    for hold in holds {
        let slots = told(hold, "granted") + told(hold, "promoted") - told(hold, "released");
        let queued = told(hold, "queued") - told(hold, "promoted") - told(hold, "dequeued");
        let expected = match places.get(hold) {
            Some(Place::Slot { .. }) => (1, 0),
            Some(Place::Waiting(_)) => (0, 1),
            None => (0, 0),
        };
        assert_eq!((slots, queued), expected, "slots and places of {hold}, which is {:?}", places.get(hold));
    }
    let sum =
        |fact: &str| facts.iter().filter(|((_, told), _)| told == fact).map(|(_, count)| count).sum::<i64>();
    for fact in ["granted", "promoted", "queued", "released", "dequeued"] {
        assert!(sum(fact) > 200, "the race was too easy: {fact} {}", sum(fact));
    }
}

/// All that is left can be settled, one by one, until nothing is there.
async fn drain(c: &RedisCapacity) {
    for (agent, slots) in AGENTS {
        c.set_agent(POOL, agent, setting(slots, true, 1 << 40), at(1)).await.unwrap();
        c.reopen(POOL, agent, at(1)).await.unwrap();
    }
    assert!(c.waiting_with_free(POOL).await.unwrap().is_empty());
    let mut left = all_places(c).await;
    while !left.is_empty() {
        for member in left.keys() {
            let settled = c.settle(POOL, &Hold::from_member(member).unwrap(), at(9)).await.unwrap();
            assert!(settled.released || settled.dequeued);
        }
        left = all_places(c).await;
    }
    assert!(c.unconfirmed(POOL, 1 << 40, 9).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_is_one_processs_until_it_has_passed() {
    let server = RedisServer::start();
    let (hold, lasts) = (Hold::new("x", 1), std::time::Duration::from_secs(600));
    let mut won = 0;
    let racers: Vec<_> = (0..16)
        .map(|_| {
            let (url, hold) = (server.url(), hold.clone());
            tokio::spawn(async move { connect(&url).await.take_turn(POOL, &hold, lasts).await.unwrap() })
        })
        .collect();
    for racer in racers {
        won += usize::from(racer.await.unwrap());
    }
    assert_eq!(won, 1);
    let c = connect(&server.url()).await;
    assert!(c.take_turn(POOL, &Hold::new("x", 2), lasts).await.unwrap(), "another attempt is another matter");
    assert!(c.take_turn("other", &hold, lasts).await.unwrap(), "so is another pool");
    let (passing, soon) = (Hold::new("y", 1), std::time::Duration::from_millis(200));
    assert!(c.take_turn(POOL, &passing, soon).await.unwrap());
    let began = std::time::Instant::now();
    while !c.take_turn(POOL, &passing, soon).await.unwrap() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        assert!(began.elapsed() < soon * 100, "nobody gives it back");
    }
}
