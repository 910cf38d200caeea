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
    Listing::Listed { at: t(at), rose_at, stands_since, named_at: Some(t(at)) }
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
    let read =
        |seq| format!(r#"{{"instance_id":"i","seq":{seq},"state":"ready","capacity":1,"executions":[]}}"#);
    let mut claims = claims();
    let (five, four) = (read(5), read(4));
    assert!(claims.beat(&Heartbeat::read("a", five.as_bytes()).unwrap(), t(1)));
    assert!(!claims.beat(&Heartbeat::read("a", five.as_bytes()).unwrap(), t(2)));
    assert!(!claims.beat(&Heartbeat::read("a", four.as_bytes()).unwrap(), t(3)));
    assert_eq!(claims.last_at, Some(t(1)));
}
