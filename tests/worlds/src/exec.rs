//! Virtual time: a clock that jumps from event to event, tasks that are polled one at a time, and one seeded source of
//! chance. Nothing here knows threads, sleeps or the time of day, so the same seed is the same world.

use std::{
    cell::{Cell, RefCell},
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, BinaryHeap, VecDeque},
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

/// Chance: `splitmix64`, which is small, fast and the same everywhere.
#[derive(Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// The same seed gives the same numbers.
    #[must_use]
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Who a task belongs to: it dies with its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A service, by its place.
    Service(usize),
    /// An instance of an agent, by its place.
    Instance(usize),
    /// Nobody: the world itself.
    World,
}

struct Task {
    owner: Owner,
    work: Pin<Box<dyn Future<Output = ()>>>,
}

struct Timer {
    at: u64,
    order: u64,
    act: Box<dyn FnOnce()>,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// See the module.
pub(crate) struct Exec {
    now: Cell<u64>,
    order: Cell<u64>,
    timers: RefCell<BinaryHeap<Reverse<Timer>>>,
    tasks: RefCell<BTreeMap<u64, Task>>,
    ready: RefCell<VecDeque<u64>>,
    /// Services that stand still, with their tasks that would run.
    frozen: RefCell<BTreeMap<usize, Vec<u64>>>,
    /// The task that is being polled, and whether its owner died in the meantime.
    current: Cell<u64>,
    current_owner: Cell<Owner>,
    current_killed: Cell<bool>,
    rng: RefCell<Rng>,
}

impl Exec {
    pub(crate) fn new(seed: u64) -> Rc<Self> {
        Rc::new(Self {
            now: Cell::new(0),
            order: Cell::new(0),
            timers: RefCell::default(),
            tasks: RefCell::default(),
            ready: RefCell::default(),
            frozen: RefCell::default(),
            current: Cell::new(0),
            current_owner: Cell::new(Owner::World),
            current_killed: Cell::new(false),
            rng: RefCell::new(Rng::new(seed)),
        })
    }

    /// Milliseconds since the world began.
    pub(crate) fn now(&self) -> u64 {
        self.now.get()
    }

    fn number(&self) -> u64 {
        let number = self.order.get() + 1;
        self.order.set(number);
        number
    }

    /// A number from `low` to `high`, both included.
    pub(crate) fn between(&self, low: u64, high: u64) -> u64 {
        low + self.rng.borrow_mut().next() % (high - low + 1)
    }

    /// True so many times in a thousand.
    pub(crate) fn chance(&self, per_mille: u64) -> bool {
        self.between(0, 999) < per_mille
    }

    /// Does something `after` milliseconds from now.
    pub(crate) fn later(&self, after: u64, act: impl FnOnce() + 'static) {
        let timer = Timer { at: self.now() + after, order: self.number(), act: Box::new(act) };
        self.timers.borrow_mut().push(Reverse(timer));
    }

    /// Starts a task.
    pub(crate) fn spawn(&self, owner: Owner, work: impl Future<Output = ()> + 'static) {
        let id = self.number();
        self.tasks.borrow_mut().insert(id, Task { owner, work: Box::pin(work) });
        self.ready.borrow_mut().push_back(id);
    }

    /// Drops every task of an owner, wherever it is: between two of its steps.
    pub(crate) fn kill(&self, owner: Owner) {
        if self.current.get() != 0 && self.current_owner.get() == owner {
            self.current_killed.set(true);
        }
        let doomed: Vec<u64> =
            self.tasks.borrow().iter().filter(|(_, task)| task.owner == owner).map(|(id, _)| *id).collect();
        for id in doomed {
            let task = self.tasks.borrow_mut().remove(&id);
            drop(task);
        }
    }

    /// No task of a service runs until it thaws; what they wait for happens meanwhile.
    pub(crate) fn freeze(&self, service: usize) {
        self.frozen.borrow_mut().entry(service).or_default();
    }

    /// The tasks of a service run again.
    pub(crate) fn thaw(&self, service: usize) {
        if let Some(held) = self.frozen.borrow_mut().remove(&service) {
            self.ready.borrow_mut().extend(held);
        }
    }

    pub(crate) fn is_frozen(&self, service: usize) -> bool {
        self.frozen.borrow().contains_key(&service)
    }

    /// Takes the world to `until`, or to the end of everything that can happen.
    pub(crate) fn run_until(&self, until: u64) {
        loop {
            self.run_ready();
            let next = self.timers.borrow().peek().map(|Reverse(timer)| timer.at);
            match next {
                Some(at) if at <= until => {
                    let timer = self.timers.borrow_mut().pop();
                    let Some(Reverse(timer)) = timer else { return };
                    self.now.set(timer.at);
                    (timer.act)();
                }
                _ => {
                    self.now.set(until);
                    return;
                }
            }
        }
    }

    fn run_ready(&self) {
        loop {
            let Some(id) = self.ready.borrow_mut().pop_front() else { return };
            let Some(mut task) = self.tasks.borrow_mut().remove(&id) else { continue };
            if let Owner::Service(service) = task.owner
                && let Some(held) = self.frozen.borrow_mut().get_mut(&service)
            {
                held.push(id);
                self.tasks.borrow_mut().insert(id, task);
                continue;
            }
            self.current.set(id);
            self.current_owner.set(task.owner);
            self.current_killed.set(false);
            let polled = task.work.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            self.current.set(0);
            if polled.is_pending() && !self.current_killed.get() {
                self.tasks.borrow_mut().insert(id, task);
            }
        }
    }

    /// Forgets all that was still to come; tasks hold on to the world otherwise.
    pub(crate) fn clear(&self) {
        let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        drop(tasks);
        let timers = std::mem::take(&mut *self.timers.borrow_mut());
        drop(timers);
    }
}

struct Slot<T> {
    value: Option<T>,
    kept: bool,
    waiter: Option<u64>,
}

/// A value that comes later; the first one counts.
pub(crate) struct Promise<T> {
    exec: Rc<Exec>,
    slot: Rc<RefCell<Slot<T>>>,
}

impl<T> Clone for Promise<T> {
    fn clone(&self) -> Self {
        Self { exec: Rc::clone(&self.exec), slot: Rc::clone(&self.slot) }
    }
}

impl<T: 'static> Promise<T> {
    pub(crate) fn new(exec: &Rc<Exec>) -> Self {
        let slot = Slot { value: None, kept: false, waiter: None };
        Self { exec: Rc::clone(exec), slot: Rc::new(RefCell::new(slot)) }
    }

    /// Gives the value, unless there was one.
    pub(crate) fn keep(&self, value: T) {
        let mut slot = self.slot.borrow_mut();
        if slot.kept {
            return;
        }
        slot.kept = true;
        slot.value = Some(value);
        if let Some(waiter) = slot.waiter.take() {
            self.exec.ready.borrow_mut().push_back(waiter);
        }
    }

    /// Gives the value later, unless there is one by then.
    pub(crate) fn keep_after(&self, after: u64, value: T) {
        let promise = self.clone();
        self.exec.later(after, move || promise.keep(value));
    }
}

impl<T> Future for Promise<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<T> {
        let mut slot = self.slot.borrow_mut();
        match slot.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                slot.waiter = Some(self.exec.current.get());
                Poll::Pending
            }
        }
    }
}

/// Comes back `after` milliseconds later.
pub(crate) async fn pause(exec: &Rc<Exec>, after: u64) {
    let promise = Promise::new(exec);
    promise.keep_after(after, ());
    promise.await;
}

/// The output of a future that never waits: the in-memory capacity.
pub(crate) fn at_once<T>(work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    match work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("the model answers at once"),
    }
}
