use super::*;

fn key(id: &str, attempt: u32) -> Key {
    Key::new(ExecutionId::new(id).unwrap(), attempt)
}

fn listed(book: &Book) -> Vec<String> {
    book.claims().map(ToString::to_string).collect()
}

/// What a claim takes at most, with its comma.
fn claim(key: &Key) -> usize {
    let claim = rollcall_core::wire::Claim {
        id: key.execution_id.as_str().into(),
        attempt: u32::MAX,
        progress: Some(1.234_567_890_123_456_7e-300),
    };
    serde_json::to_vec(&claim).unwrap().len() + 1
}

#[test]
fn a_repeated_dispatch_is_held_and_started_once() {
    let mut book = Book::new(2);
    let k = key("x", 1);
    assert_eq!(book.dispatch(&k), Admission::Start);
    assert_eq!(book.dispatch(&k), Admission::Held);
    assert_eq!(book.finish(&k, Ending::Completed), Some(Outcome::Completed));
    assert_eq!(book.dispatch(&k), Admission::Held, "finished, not acknowledged");
    assert!(book.acknowledged(&k));
    assert_eq!(book.dispatch(&k), Admission::Held, "a late repetition of a dispatch that ran");
    assert_eq!(book.running(), 0);
}

#[test]
fn a_claim_is_listed_until_its_report_is_acknowledged() {
    let mut book = Book::new(2);
    let k = key("x", 1);
    book.dispatch(&k);
    assert_eq!(listed(&book), ["x:1"]);
    assert!(!book.acknowledged(&k), "it runs: there is nothing to acknowledge");
    book.finish(&k, Ending::Failed);
    assert_eq!(listed(&book), ["x:1"]);
    assert!(book.acknowledged(&k));
    assert!(!book.acknowledged(&k));
    assert!(listed(&book).is_empty());
}

#[test]
fn a_finish_without_acknowledgement_does_not_count_towards_capacity() {
    let mut book = Book::new(1);
    book.dispatch(&key("x", 1));
    assert_eq!(book.state(), AgentState::Busy);
    assert_eq!(book.dispatch(&key("y", 1)), Admission::Refused(Refusal::AtCapacity));
    book.finish(&key("x", 1), Ending::Completed);
    assert_eq!(book.state(), AgentState::Ready);
    assert_eq!(book.dispatch(&key("y", 1)), Admission::Start);
    assert_eq!(listed(&book), ["x:1", "y:1"]);
}

#[test]
fn claims_never_outgrow_a_heartbeat() {
    let mut book = Book::new(1024);
    // 451 claims of 61 + 66 bytes leave room for one of 67.
    let long = "x".repeat(57);
    let taken = (0..1024)
        .take_while(|i| book.dispatch(&key(&format!("{long}{i:04}"), 1)) == Admission::Start)
        .count();
    assert!((400..1024).contains(&taken), "{taken}");
    assert_eq!(book.dispatch(&key("y", 1)), Admission::Start, "a shorter one still fits");
    let whole = book.claims().map(claim).sum::<usize>();
    assert!(whole <= CLAIM_BYTES_MAX, "{whole}");
    let first = key(&format!("{long}0000"), 1);
    book.finish(&first, Ending::Completed);
    book.acknowledged(&first);
    assert_eq!(book.dispatch(&key(&format!("{long}9999"), 1)), Admission::Start, "room again");
}

#[test]
fn a_terminated_attempt_is_never_started() {
    let mut book = Book::new(1);
    let k = key("x", 1);
    assert_eq!(book.terminate(&k, StopCause::Terminated), Termination::NotRunning);
    assert_eq!(book.dispatch(&k), Admission::Refused(Refusal::Terminated), "overtaken by its termination");
    assert_eq!(book.dispatch(&key("x", 2)), Admission::Start, "the next attempt is another matter");
}

#[test]
fn an_older_attempt_than_the_held_one_is_refused_and_a_newer_one_waits_for_its_end() {
    let mut book = Book::new(4);
    book.dispatch(&key("x", 2));
    assert_eq!(book.dispatch(&key("x", 1)), Admission::Refused(Refusal::OldAttempt));
    assert_eq!(book.dispatch(&key("x", 3)), Admission::Refused(Refusal::OlderAttemptRuns(key("x", 2))));
    book.terminate(&key("x", 2), StopCause::Terminated);
    book.finish(&key("x", 2), Ending::Stopped);
    assert_eq!(book.dispatch(&key("x", 3)), Admission::Start);
    assert_eq!(book.dispatch(&key("xy", 1)), Admission::Start, "another id with the same beginning");
}

#[test]
fn what_a_stop_is_reported_as() {
    let cases = [
        (StopCause::of_terminate("timed_out"), Ending::Stopped, Outcome::Terminated),
        (StopCause::of_terminate("cancelled"), Ending::Stopped, Outcome::Cancelled),
        (StopCause::Returned, Ending::Stopped, Outcome::Returned),
        (StopCause::Returned, Ending::Failed, Outcome::Returned),
        (StopCause::Terminated, Ending::Failed, Outcome::Terminated),
        (StopCause::Cancelled, Ending::Completed, Outcome::Completed),
        (StopCause::Returned, Ending::Completed, Outcome::Completed),
    ];
    for (cause, ending, expected) in cases {
        let mut book = Book::new(1);
        book.dispatch(&key("x", 1));
        assert_eq!(book.terminate(&key("x", 1), cause), Termination::Stop);
        assert_eq!(book.finish(&key("x", 1), ending), Some(expected), "{cause:?} {ending:?}");
        assert_eq!(book.finish(&key("x", 1), ending), None, "an end is reported once");
        assert_eq!(
            book.terminate(&key("x", 1), cause),
            Termination::NotRunning,
            "it is dead, whatever is reported"
        );
    }
}

#[test]
fn a_termination_goes_before_a_return_and_not_the_other_way() {
    let mut book = Book::new(2);
    book.dispatch(&key("x", 1));
    book.dispatch(&key("y", 1));
    book.terminate(&key("y", 1), StopCause::Cancelled);
    assert_eq!(book.return_all(), [key("x", 1)], "y is being stopped already");
    book.terminate(&key("x", 1), StopCause::Terminated);
    assert_eq!(book.finish(&key("x", 1), Ending::Stopped), Some(Outcome::Terminated));
    assert_eq!(book.finish(&key("y", 1), Ending::Stopped), Some(Outcome::Cancelled));
}

#[test]
fn closed_once_and_for_good() {
    let mut book = Book::new(1);
    book.dispatch(&key("x", 1));
    assert!(book.close());
    assert!(!book.close());
    assert_eq!(book.state(), AgentState::Draining);
    assert_eq!(book.dispatch(&key("y", 1)), Admission::Refused(Refusal::Draining));
    assert_eq!(book.dispatch(&key("x", 1)), Admission::Held, "what is held is still held");
}

#[test]
fn tombstones_are_bounded_oldest_first() {
    let mut book = Book::new(1);
    for i in 0..=TOMBSTONES_MAX {
        book.terminate(&key(&format!("t{i}"), 1), StopCause::Terminated);
    }
    assert_eq!(book.tombstones.len(), TOMBSTONES_MAX);
    assert_eq!(book.tombstone_order.len(), TOMBSTONES_MAX);
    assert_eq!(book.dispatch(&key("t1", 1)), Admission::Refused(Refusal::Terminated));
    assert_eq!(book.dispatch(&key("t0", 1)), Admission::Start, "forgotten");
}

/// A small random walk: no sequence of requests starts an attempt twice, exceeds the capacity, or unlists early.
#[test]
fn no_sequence_of_requests_breaks_the_invariants() {
    // A fixed linear congruential generator: the walk is the same every time.
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    let mut next = move |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for _ in 0..200 {
        let mut book = Book::new(2);
        let mut started: HashMap<Key, u32> = HashMap::new();
        let mut open: Vec<Key> = Vec::new();
        let mut banned: Vec<Key> = Vec::new();
        for _ in 0..200 {
            let k = key(&format!("e{}", next(4)), 1 + u32::try_from(next(3)).unwrap());
            match next(6) {
                0 | 1 => {
                    if book.dispatch(&k) == Admission::Start {
                        assert!(!banned.contains(&k), "{k} was terminated before");
                        *started.entry(k.clone()).or_default() += 1;
                        open.push(k);
                    }
                }
                2 => {
                    if book.terminate(&k, StopCause::Terminated) == Termination::NotRunning
                        && !open.contains(&k)
                    {
                        banned.push(k);
                    }
                }
                3 => drop(book.finish(&k, Ending::Completed)),
                4 => {
                    if book.acknowledged(&k) {
                        open.retain(|o| *o != k);
                    }
                }
                _ => drop(book.return_all()),
            }
            assert!(book.running() <= 2);
            let mut claims: Vec<_> = book.claims().cloned().collect();
            claims.sort();
            open.sort();
            assert_eq!(claims, open);
            assert!(started.values().all(|n| *n == 1), "{started:?}");
        }
    }
}
