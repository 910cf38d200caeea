//! The report of a cycle: every open execution is in exactly one category.

use proptest::prelude::*;
use rollcall_core::{
    ExecutionId,
    agent::Status,
    event::CancelRequested,
    wire::{Outcome, TerminateState},
};
use watchdog::{facts::Waiting, matrix::Row, report::CycleReport, sight::Void};

use crate::sim::{Begun, LIMITS, Sim, Truth};

const IDS: [&str; 4] = ["x", "y", "z", "q"];

#[derive(Debug, Clone)]
enum Step {
    Advance(u64),
    Beat(bool),
    Blind,
    Restart,
    Status(Status),
    Dispatch(usize, u64),
    Cancel(usize),
    Supersede,
    Suspend(bool),
    Truth(Truth),
    Waiting(Waiting),
    Ending(Option<TerminateState>),
}

fn step() -> impl Strategy<Value = Step> {
    let statuses = [Status::Connected, Status::Disconnected, Status::Error, Status::Gone];
    let truths = [Truth::Lists, Truth::Empty, Truth::Away, Truth::Mute];
    let endings = [None, Some(TerminateState::NotRunning), Some(TerminateState::Terminated)];
    prop_oneof![
        6 => (1u64..3_000).prop_map(Step::Advance),
        4 => any::<bool>().prop_map(Step::Beat),
        1 => Just(Step::Blind),
        1 => Just(Step::Restart),
        2 => prop::sample::select(statuses.to_vec()).prop_map(Step::Status),
        3 => (0..IDS.len(), 2_000u64..20_000).prop_map(|(n, ms)| Step::Dispatch(n, ms)),
        1 => (0..IDS.len()).prop_map(Step::Cancel),
        1 => Just(Step::Supersede),
        1 => any::<bool>().prop_map(Step::Suspend),
        3 => prop::sample::select(truths.to_vec()).prop_map(Step::Truth),
        2 => prop_oneof![Just(Waiting::Nothing), Just(Waiting::Withholds(Outcome::Completed))].prop_map(Step::Waiting),
        1 => prop::sample::select(endings.to_vec()).prop_map(Step::Ending),
    ]
}

fn take(sim: &mut Sim, step: &Step) {
    let state = |sim: &Sim, n: usize| {
        sim.world.executions.get(&ExecutionId::new(IDS[n]).unwrap()).map(|execution| execution.state)
    };
    match step {
        Step::Advance(ms) => sim.advance(*ms),
        Step::Beat(lists) => sim.beat(*lists, 1),
        Step::Blind => sim.blind(Void::Gaps, 500),
        Step::Restart => sim.restart(500),
        Step::Status(status) => sim.status("i-1", *status),
        Step::Dispatch(n, timeout_ms) => {
            if state(sim, *n).is_some_and(|state| !state.holds_slot()) {
                sim.dispatch(IDS[*n], *timeout_ms);
            }
        }
        Step::Cancel(n) => {
            if state(sim, *n).is_some_and(|state| state.holds_slot()) {
                let cancel = CancelRequested {
                    execution_id: ExecutionId::new(IDS[*n]).unwrap(),
                    attempt: 1,
                    agent_id: None,
                    reason: String::new(),
                    by: String::new(),
                };
                sim.execution_event(IDS[*n], cancel.into());
            }
        }
        Step::Supersede => sim.supersede(),
        Step::Suspend(on) => sim.world.log_suspended = *on,
        Step::Truth(truth) => sim.truth = *truth,
        Step::Waiting(waiting) => sim.waiting = *waiting,
        Step::Ending(ending) => sim.ending = *ending,
    }
}

/// Healthy, dispatched a moment ago, and waiting, one by one.
fn by_hand(sim: &Sim) -> (usize, usize, usize) {
    let (mut healthy, mut in_grace, mut queued) = (0, 0, 0);
    for (id, execution) in &sim.world.executions {
        let Some(held) = execution.holder() else {
            queued += 1;
            continue;
        };
        let row = sim.world.standing_judgement(id, sim.now).unwrap().0.row;
        let is_fresh = held.dispatched_at.plus_ms(LIMITS.dispatch_grace_ms) > sim.now;
        match (sim.world.troubles.contains_key(id), row) {
            (true, Row::Healthy | Row::Unheard) => healthy += 1,
            (true, Row::InGrace) => in_grace += 1,
            (true, _) => {}
            (false, _) if is_fresh => in_grace += 1,
            (false, _) => healthy += 1,
        }
    }
    (healthy, in_grace, queued)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn every_open_execution_is_in_exactly_one_category(steps in prop::collection::vec(step(), 1..60)) {
        let mut sim = Sim::begun(Begun::Started, 15_000, Some(3_000));
        for id in &IDS[1..] {
            sim.submit(id, Begun::Dispatched, None);
        }
        for step in &steps {
            take(&mut sim, step);
            let report = CycleReport::of(&sim.world, sim.now, false);
            let categories = report.categories;
            prop_assert_eq!(categories.sum(), report.open, "{:?}", &categories);
            let counted = (categories.healthy, categories.in_grace, categories.queued);
            prop_assert_eq!(counted, by_hand(&sim), "{:?} of {:?}", &categories, &report.rows);
        }
    }
}
