//! The service processes: where they live, how they start and die, and their connections.

use std::rc::Rc;

use crate::{
    agent::Beat,
    buffers::{Buffers, Notice},
    clock::Clocks,
    dispatcher::Dispatcher,
    exec::Owner,
    prober::Prober,
    stage::Stage,
    watchdog::Watchdog,
};

/// A cut is noticed within this time.
const NOTICE_MAX_MS: u64 = 2_000;

/// A service's connection.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Link {
    /// Core messages (heartbeats, requests) don't pass.
    pub bus_cut: bool,
    /// The log is not reachable.
    pub log_cut: bool,
    /// The service knows.
    pub noticed: bool,
}

impl Link {
    pub(crate) const fn is_cut(&self) -> bool {
        self.bus_cut || self.log_cut
    }
}

/// A service that runs.
#[derive(Clone)]
pub(crate) enum Body {
    Dispatcher(Rc<Dispatcher>),
    Watchdog(Rc<Watchdog>),
    Prober(Rc<Prober>),
}

/// What kind of service lives at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Dispatcher,
    Watchdog,
    Prober,
}

/// A place for a service process.
pub(crate) struct Place {
    pub kind: Kind,
    pub body: Option<Body>,
    pub link: Link,
    pub clocks: Clocks,
    pub buffers: Buffers,
    /// Heartbeats that are lost on their way into this process, of a thousand, and nobody is told.
    pub loses: u64,
}

impl Place {
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            body: None,
            link: Link::default(),
            clocks: Clocks::default(),
            buffers: Buffers::default(),
            loses: 0,
        }
    }
}

impl Stage {
    pub(crate) fn body(&self, me: usize) -> Option<Body> {
        self.places.borrow()[me].body.clone()
    }

    pub(crate) fn link(&self, me: usize) -> Link {
        self.places.borrow()[me].link
    }

    /// Starts the service at a place, unless it runs.
    pub(crate) fn start(self: &Rc<Self>, me: usize) {
        let kind = {
            let places = self.places.borrow();
            if places[me].body.is_some() {
                return;
            }
            places[me].kind
        };
        self.say(|| format!("{kind:?} {me} starts"));
        let body = match kind {
            Kind::Dispatcher => Body::Dispatcher(Dispatcher::new(self, me)),
            Kind::Watchdog => Body::Watchdog(Watchdog::new(self, me)),
            Kind::Prober => Body::Prober(Prober::new(self, me)),
        };
        {
            let place = &mut self.places.borrow_mut()[me];
            place.body = Some(body.clone());
            // It takes its host's word first.
            place.clocks.ours = place.clocks.wall;
        }
        match body {
            Body::Dispatcher(dispatcher) => dispatcher.run(),
            Body::Watchdog(watchdog) => watchdog.run(),
            Body::Prober(prober) => prober.run(),
        }
    }

    /// The service dies between two of its steps.
    pub(crate) fn crash(self: &Rc<Self>, me: usize) {
        self.say(|| format!("service {me} dies"));
        self.exec.kill(Owner::Service(me));
        self.exec.thaw(me);
        let place = &mut self.places.borrow_mut()[me];
        place.body = None;
        place.buffers.die();
    }

    /// Cuts or heals a service's connection; it notices a cut after a while and a new connection at once.
    pub(crate) fn set_link(self: &Rc<Self>, me: usize, bus_cut: bool, log_cut: bool) {
        let before = self.link(me);
        if (before.bus_cut, before.log_cut) == (bus_cut, log_cut) {
            return;
        }
        self.say(|| format!("service {me}: bus cut {bus_cut}, log cut {log_cut}"));
        let whole = !bus_cut && !log_cut;
        self.places.borrow_mut()[me].link = Link { bus_cut, log_cut, noticed: before.noticed && !whole };
        if !whole && before.bus_cut && !bus_cut {
            // Heartbeats come again by a connection that was made anew.
            self.tell(me, Notice::Link(false));
            self.tell(me, Notice::Link(true));
        }
        if whole {
            self.tell(me, Notice::Link(false));
            self.tell(me, Notice::Link(true));
            self.tell(me, Notice::Tail);
            return;
        }
        let stage = Rc::clone(self);
        self.exec.later(self.exec.between(0, NOTICE_MAX_MS), move || {
            let link = stage.link(me);
            if (link.bus_cut || link.log_cut) && !link.noticed {
                stage.places.borrow_mut()[me].link.noticed = true;
                stage.tell(me, Notice::Link(false));
            }
        });
    }

    /// Heartbeats are lost on their way into a service for a while, those of all agents.
    pub(crate) fn lose(self: &Rc<Self>, me: usize, per_mille: u64, lasts: u64) {
        self.say(|| format!("service {me} loses {per_mille} of a thousand heartbeats for {lasts} ms"));
        self.count("services lost heartbeats");
        self.places.borrow_mut()[me].loses = per_mille;
        self.truth.borrow_mut().losing.push((me, self.exec.now(), self.exec.now() + lasts));
        let stage = Rc::clone(self);
        self.exec.later(lasts, move || stage.places.borrow_mut()[me].loses = 0);
    }

    fn loses(&self, me: usize) -> bool {
        let per_mille = self.places.borrow()[me].loses;
        per_mille > 0 && self.exec.chance(per_mille)
    }

    /// A heartbeat goes out to every service that listens. True: it gets to all of them, by an ordinary way.
    pub(crate) fn broadcast(self: &Rc<Self>, beat: &Rc<Beat>) -> bool {
        let mut clean = true;
        for me in 0..self.places.borrow().len() {
            for _ in 0..=usize::from(self.comes_twice()) {
                let Some(way) = self.way() else {
                    clean = false;
                    continue;
                };
                clean &= way <= self.weather.get().way_max;
                let (stage, beat) = (Rc::clone(self), Rc::clone(beat));
                self.exec.later(way, move || {
                    if !stage.link(me).bus_cut && !stage.loses(me) {
                        stage.receive(me, beat);
                    }
                });
            }
        }
        clean
    }
}
