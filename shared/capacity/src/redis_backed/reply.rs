//! Reading the answers of the scripts.

use redis::Value;

use crate::{Epoch, Error, Grant, HeldSlot, Hold, Place, Placed, Priority, Queue, QueuedHold, Result};

/// Width of one priority in a score, as in `lua/include/slots.lua`.
const BAND: u64 = 1 << 49;

/// The fields of an answer, read one by one.
pub(crate) struct Reply {
    operation: &'static str,
    fields: std::vec::IntoIter<Value>,
}

impl Reply {
    pub(crate) fn new(operation: &'static str, value: Value) -> Result<Self> {
        match value {
            Value::Array(fields) => Ok(Self { operation, fields: fields.into_iter() }),
            other => Err(malformed(operation, format!("expected fields, got {other:?}"))),
        }
    }

    /// The error for something in this answer that makes no sense.
    pub(crate) fn wrong(&self, what: impl Into<String>) -> Error {
        malformed(self.operation, what)
    }

    fn next(&mut self) -> Result<Value> {
        self.fields.next().ok_or_else(|| malformed(self.operation, "too short"))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.fields.as_slice().is_empty()
    }

    pub(crate) fn int(&mut self) -> Result<i64> {
        match self.next()? {
            Value::Int(number) => Ok(number),
            other => Err(self.wrong(format!("expected a number, got {other:?}"))),
        }
    }

    pub(crate) fn count(&mut self) -> Result<u64> {
        let number = self.int()?;
        u64::try_from(number).map_err(|_| self.wrong(format!("negative count {number}")))
    }

    pub(crate) fn flag(&mut self) -> Result<bool> {
        Ok(self.int()? != 0)
    }

    pub(crate) fn text(&mut self) -> Result<String> {
        match self.next()? {
            Value::BulkString(bytes) => {
                String::from_utf8(bytes).map_err(|_| self.wrong("text that is not utf-8"))
            }
            Value::SimpleString(text) => Ok(text),
            other => Err(self.wrong(format!("expected text, got {other:?}"))),
        }
    }

    /// A nested list, as a reply of its own.
    pub(crate) fn list(&mut self) -> Result<Reply> {
        Reply::new(self.operation, self.next()?)
    }

    pub(crate) fn hold(&mut self) -> Result<Hold> {
        let member = self.text()?;
        Hold::from_member(&member).ok_or_else(|| self.wrong(format!("{member:?} is no hold")))
    }

    /// A score: a whole number in the text form of a double.
    pub(crate) fn score(&mut self) -> Result<u64> {
        let text = self.text()?;
        self.whole(&text)
    }

    fn whole(&self, text: &str) -> Result<u64> {
        match text.parse::<f64>() {
            // Exact: scores are integers below 2^53.
            Ok(number) if number >= 0.0 && number.fract() == 0.0 => Ok(number as u64),
            _ => Err(self.wrong(format!("{text:?} is no whole number"))),
        }
    }

    /// `{member, agent, ...}`.
    pub(crate) fn grants(&mut self, epoch: &Epoch) -> Result<Vec<Grant>> {
        let mut list = self.list()?;
        let mut grants = Vec::new();
        while !list.is_empty() {
            grants.push(Grant { hold: list.hold()?, agent: list.text()?, epoch: epoch.clone() });
        }
        Ok(grants)
    }

    /// `{member, granted at, ...}`.
    pub(crate) fn held(&mut self) -> Result<Vec<HeldSlot>> {
        let mut list = self.list()?;
        let mut held = Vec::new();
        while !list.is_empty() {
            held.push(HeldSlot { hold: list.hold()?, granted_at_ms: list.score()? });
        }
        Ok(held)
    }

    /// `{member, score, ...}`, the first of which is at rank `from` (from 0).
    pub(crate) fn queued(&mut self, from: u64) -> Result<Vec<QueuedHold>> {
        let mut list = self.list()?;
        let mut queued = Vec::new();
        for position in from + 1.. {
            if list.is_empty() {
                break;
            }
            let (hold, score) = (list.hold()?, list.score()?);
            let priority = u8::try_from(score / BAND)
                .ok()
                .and_then(Priority::new)
                .ok_or_else(|| list.wrong(format!("score {score} of {hold} has no priority")))?;
            queued.push(QueuedHold { hold, priority, position });
        }
        Ok(queued)
    }

    /// The rest of a hold's entry: `place, granted at`. `None` when it has no place any more.
    pub(crate) fn placed(&mut self, hold: Hold) -> Result<Option<Placed>> {
        let (place, granted_at) = (self.text()?, self.text()?);
        let place = match (place.get(..1), place.get(1..)) {
            (Some("s"), Some(agent)) if !granted_at.is_empty() => {
                Place::Slot { agent: agent.to_owned(), granted_at_ms: self.whole(&granted_at)? }
            }
            (Some("q"), Some(agent)) => Place::Waiting(Queue::Agent(agent.to_owned())),
            (Some("p"), _) => Place::Waiting(Queue::Pool),
            (Some("x"), _) => Place::Waiting(Queue::External),
            (None, _) => return Ok(None),
            _ => return Err(self.wrong(format!("{place:?} of {hold} is no place"))),
        };
        Ok(Some(Placed { hold, place }))
    }
}

fn malformed(operation: &'static str, what: impl Into<String>) -> Error {
    Error::Reply { operation, what: what.into() }
}
