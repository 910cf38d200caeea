//! The log and the stream of reports, as the services rely on them: appends with the expected last sequence of their
//! subject, repetitions known by their id, reports that stay until they are acknowledged.

use std::{collections::BTreeMap, rc::Rc};

use rollcall_core::{
    AgentId, ExecutionId, InstanceId,
    event::{Event, EventBody, ExecutionEvent},
    wire::Outcome,
};
use uuid::Uuid;

/// One entry.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Its sequence, from 1.
    pub seq: u64,
    /// Its subject.
    pub subject: String,
    /// What it says, decoded from its bytes.
    pub event: Event,
    /// The bytes as they were appended.
    pub bytes: Vec<u8>,
    /// True time at which its author decided it, milliseconds since the world began.
    pub decided_at: u64,
    /// True time at which it landed.
    pub landed_at: u64,
}

impl Entry {
    /// The event, if it is one about an execution.
    #[must_use]
    pub(crate) const fn execution(&self) -> Option<&ExecutionEvent> {
        match &self.event.body {
            EventBody::Execution(event) => Some(event),
            _ => None,
        }
    }
}

/// What became of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Appended {
    /// It is there.
    At(u64),
    /// Something else happened to its subject.
    Conflict,
}

/// The log.
#[derive(Debug, Default)]
pub(crate) struct Log {
    entries: Vec<Rc<Entry>>,
    subjects: BTreeMap<String, Vec<u64>>,
    ids: BTreeMap<Uuid, u64>,
}

impl Log {
    pub(crate) fn entries(&self) -> &[Rc<Entry>] {
        &self.entries
    }

    pub(crate) fn last_seq(&self) -> u64 {
        self.entries.len() as u64
    }

    pub(crate) fn last_of(&self, subject: &str) -> u64 {
        self.subjects.get(subject).and_then(|seqs| seqs.last()).copied().unwrap_or(0)
    }

    pub(crate) fn first_of(&self, subject: &str) -> Option<Rc<Entry>> {
        self.at(*self.subjects.get(subject)?.first()?)
    }

    pub(crate) fn at(&self, seq: u64) -> Option<Rc<Entry>> {
        self.entries.get(usize::try_from(seq.checked_sub(1)?).ok()?).map(Rc::clone)
    }

    pub(crate) fn history(&self, subject: &str) -> Vec<Rc<Entry>> {
        let seqs = self.subjects.get(subject).map_or(&[][..], Vec::as_slice);
        seqs.iter().filter_map(|seq| self.at(*seq)).collect()
    }

    /// `expected`: the last sequence of the subject; `None`: whatever it is (which only a defect does).
    pub(crate) fn append(
        &mut self,
        subject: &str,
        bytes: &[u8],
        expected: Option<u64>,
        decided_at: u64,
        now: u64,
    ) -> Appended {
        let event = Event::decode(bytes).expect("services write events");
        if let Some(seq) = self.ids.get(&event.id) {
            return Appended::At(*seq);
        }
        if expected.is_some_and(|expected| expected != self.last_of(subject)) {
            return Appended::Conflict;
        }
        let seq = self.last_seq() + 1;
        self.ids.insert(event.id, seq);
        self.subjects.entry(subject.to_owned()).or_default().push(seq);
        self.entries.push(Rc::new(Entry {
            seq,
            subject: subject.to_owned(),
            event,
            bytes: bytes.to_vec(),
            decided_at,
            landed_at: now,
        }));
        Appended::At(seq)
    }
}

/// A report that the stream took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    /// Who reported, by its subject.
    pub agent: AgentId,
    /// The instance it names.
    pub instance: InstanceId,
    /// The execution, by its subject.
    pub execution: ExecutionId,
    /// The attempt it names.
    pub attempt: u32,
    /// What it says.
    pub outcome: Outcome,
}

#[derive(Debug)]
struct Waiting {
    report: Report,
    published_at: u64,
    /// Not delivered (again) before.
    next_at: u64,
}

/// The stream of reports: a work queue.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    waiting: BTreeMap<u64, Waiting>,
    taken: Vec<Report>,
    last: u64,
}

impl Reports {
    pub(crate) fn publish(&mut self, report: &Report, now: u64) {
        self.last += 1;
        self.taken.push(report.clone());
        self.waiting.insert(self.last, Waiting { report: report.clone(), published_at: now, next_at: now });
    }

    /// Delivers the first that is due; it comes again unless it is acknowledged within `ack_wait`.
    pub(crate) fn deliver(&mut self, now: u64, ack_wait: u64) -> Option<(u64, Report, u64)> {
        let (id, waiting) = self.waiting.iter_mut().find(|(_, w)| w.next_at <= now)?;
        waiting.next_at = now + ack_wait;
        Some((*id, waiting.report.clone(), waiting.published_at))
    }

    pub(crate) fn ack(&mut self, id: u64) {
        self.waiting.remove(&id);
    }

    pub(crate) fn nak(&mut self, id: u64, until: u64) {
        if let Some(waiting) = self.waiting.get_mut(&id) {
            waiting.next_at = until;
        }
    }

    /// The last one on the subject of an agent and an execution that is not acknowledged.
    pub(crate) fn last(&self, agent: &AgentId, execution: &ExecutionId) -> Option<(u32, Outcome)> {
        let on_subject = |w: &&Waiting| w.report.agent == *agent && w.report.execution == *execution;
        let last = self.waiting.values().rev().find(on_subject)?;
        Some((last.report.attempt, last.report.outcome))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// All that was ever taken.
    pub(crate) fn taken(&self) -> &[Report] {
        &self.taken
    }
}
