//! The auditor of the stories: reads the whole log and Redis, and checks invariants 1 to 5 of the design without any
//! of the services' own folding code.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use rollcall_capacity::{Capacity, Place, RedisCapacity};
use serde_json::Value;

use crate::{fleet::Fleet, wait::until};

/// How long Redis may take to agree with the log after a story: the services' audits repair within this.
const AGREE_WITHIN: Duration = Duration::from_secs(30);

const TERMINAL: [&str; 5] = ["completed", "failed", "cancelled", "expired", "quarantined"];

/// What the log says of one execution, as far as the invariants go.
#[derive(Debug, Default, Clone)]
struct Seen {
    /// `queued`, `held`, or a terminal state.
    state: String,
    attempt: u64,
    agent: String,
    pool: String,
    recovered: BTreeSet<u64>,
    last_dispatched: u64,
    /// The entry of its last dispatch, and whether its agent has accepted that.
    dispatch: u64,
    started: bool,
    cancelled: bool,
}

/// A grant above the capacity.
#[derive(Debug)]
struct Above {
    text: String,
    capacity: u64,
    /// Everything that the agent held then, with the entries of its dispatches.
    held: BTreeMap<String, u64>,
}

#[derive(Debug, Default)]
struct Ledger {
    executions: BTreeMap<String, Seen>,
    capacity: BTreeMap<String, u64>,
    pools: BTreeMap<String, String>,
    /// What each agent holds, with the entries of the dispatches.
    held: BTreeMap<String, BTreeMap<String, u64>>,
    /// Grants above the capacity: of those dispatches as many as there were too many must turn out never to have been put
    /// to the agent.
    above: Vec<Above>,
    faults: Vec<String>,
}

impl Fleet {
    /// Checks everything that must hold after any story.
    ///
    /// # Panics
    /// When something does not, naming all of it.
    pub async fn audit(&self) {
        let ledger = self.read_ledger().await;
        assert!(ledger.faults.is_empty(), "the log breaks invariants:\n{}", ledger.faults.join("\n"));
        until("redis to agree with the log", AGREE_WITHIN, || async {
            let ledger = self.read_ledger().await;
            let disagreements = self.compare_with_redis(&ledger).await;
            if disagreements.is_empty() { Ok(()) } else { Err(disagreements) }
        })
        .await;
    }

    async fn read_ledger(&self) -> Ledger {
        let mut ledger = Ledger::default();
        let mut after = 0;
        loop {
            let page =
                until("a page of the log", AGREE_WITHIN, || self.log.read_range(after, 1000, &[])).await;
            for entry in &page.entries {
                let event: Value = serde_json::from_slice(&entry.bytes).unwrap_or(Value::Null);
                ledger.take(entry.seq, &event);
            }
            after = page.next_after;
            if !page.more {
                ledger.faults.extend(ledger.above.drain(..).map(|above| above.text));
                return ledger;
            }
        }
    }

    async fn compare_with_redis(&self, ledger: &Ledger) -> Vec<String> {
        let mut wrong = Vec::new();
        let redis = match RedisCapacity::connect(&self.redis.url(), "rollcall").await {
            Ok(redis) => redis,
            Err(error) => return vec![error.to_string()],
        };
        let mut pools: BTreeSet<String> = ledger.pools.values().cloned().collect();
        pools.extend(ledger.executions.values().map(|e| e.pool.clone()));
        let mut found: BTreeMap<String, (String, Place)> = BTreeMap::new();
        for pool in &pools {
            let mut from = None;
            loop {
                match redis.scan(pool, from).await {
                    Ok(page) => {
                        for placed in page.holds {
                            let member = placed.hold.member();
                            if let Some((other, _)) = found.get(&member).filter(|(p, _)| p != pool) {
                                wrong.push(format!("{member} is in pools {other} and {pool}"));
                            }
                            found.insert(member, (pool.clone(), placed.place));
                        }
                        match page.next {
                            Some(next) => from = Some(next),
                            None => break,
                        }
                    }
                    // A pool that no work and no agent ever touched is not there.
                    Err(_) if !ledger.uses(pool) => break,
                    Err(error) => {
                        wrong.push(format!("pool {pool}: {error}"));
                        break;
                    }
                }
            }
        }
        for (id, seen) in &ledger.executions {
            let member = format!("{id}:{}", seen.attempt);
            match (seen.state.as_str(), found.remove(&member)) {
                ("held", Some((_, Place::Slot { agent, .. }))) if agent == seen.agent => {}
                ("queued", Some((_, Place::Waiting(_)))) => {}
                (state, None) if TERMINAL.contains(&state) => {}
                (state, place) => {
                    wrong.push(format!("{member} is {state} in the log and {place:?} in redis"))
                }
            }
        }
        wrong.extend(found.keys().map(|member| format!("{member} is in redis and not open in the log")));
        wrong
    }
}

impl Ledger {
    fn uses(&self, pool: &str) -> bool {
        self.pools.values().any(|p| p == pool)
            || self.executions.values().any(|e| e.pool == pool && !TERMINAL.contains(&e.state.as_str()))
    }

    fn take(&mut self, seq: u64, event: &Value) {
        let kind = event["type"].as_str().unwrap_or_default().trim_start_matches("rollcall.").to_owned();
        let data = &event["data"];
        match kind.split_once('.') {
            Some(("agent", "registered" | "updated")) => {
                let agent = text(&data["agent_id"]);
                self.capacity.insert(agent.clone(), data["capacity"].as_u64().unwrap_or(0));
                self.pools.insert(agent, text(&data["pool"]));
            }
            Some(("execution", what)) => self.execution(seq, what, data),
            _ => {}
        }
    }

    fn fault(&mut self, seq: u64, text: String) {
        self.faults.push(format!("entry {seq}: {text}"));
    }

    fn execution(&mut self, seq: u64, what: &str, data: &Value) {
        let id = text(&data["execution_id"]);
        let attempt = data["attempt"].as_u64().unwrap_or(0);
        if what == "submitted" {
            let seen = Seen { state: "queued".into(), attempt, pool: text(&data["pool"]), ..Seen::default() };
            if self.executions.insert(id.clone(), seen).is_some() {
                self.fault(seq, format!("{id} submitted twice"));
            }
            return;
        }
        let Some(mut seen) = self.executions.get(&id).cloned() else {
            self.fault(seq, format!("{what} of {id}, which was never submitted"));
            return;
        };
        let terminal = TERMINAL.contains(&seen.state.as_str());
        let late = what == "completed" && data["late"] == true;
        // Invariant 2 and 5: a terminal state is final, but for one late completion and an operator's retry.
        if terminal && what != "late_result" && what != "retried" && !late {
            self.fault(seq, format!("{what} of {id} after it was {}", seen.state));
        }
        if seen.cancelled && what != "late_result" {
            self.fault(seq, format!("{what} of {id} after it was cancelled"));
        }
        if late && !(seen.recovered.contains(&attempt) && seen.last_dispatched == attempt) {
            self.fault(seq, format!("late completion of {id} attempt {attempt} that does not count"));
        }
        if !late && !matches!(what, "late_result" | "retried") && attempt != seen.attempt {
            self.fault(seq, format!("{what} of {id} in attempt {attempt} while {} counts", seen.attempt));
        }
        match what {
            "dispatched" => {
                seen.state = "held".into();
                seen.agent = text(&data["agent_id"]);
                seen.last_dispatched = attempt;
                (seen.dispatch, seen.started) = (seq, false);
                self.grant(seq, &id, attempt, &seen.agent);
            }
            "queued" => {
                if data["reason"] == "slot_lost" && seen.state == "held" && !seen.started {
                    self.unasked(&id, seen.dispatch);
                }
                self.release(&seen, &id);
                seen.state = "queued".into();
            }
            "started" => seen.started = true,
            "cancel_requested" | "late_result" => {}
            "recovered" => {
                self.release(&seen, &id);
                // Invariant 3: one recovery an attempt.
                if !seen.recovered.insert(attempt) {
                    self.fault(seq, format!("{id} attempt {attempt} recovered twice"));
                }
                match data["action"].as_str() {
                    Some("requeued") => {
                        seen.state = "queued".into();
                        seen.attempt = data["next_attempt"].as_u64().unwrap_or(0);
                    }
                    Some(action) => seen.state = action.to_owned(),
                    None => self.fault(seq, format!("recovery of {id} without an action")),
                }
            }
            "retried" => {
                seen.state = "queued".into();
                seen.attempt = attempt;
            }
            ended => {
                self.release(&seen, &id);
                seen.state = ended.to_owned();
                seen.cancelled = ended == "cancelled";
                seen.attempt = attempt;
            }
        }
        self.executions.insert(id, seen);
    }

    /// Invariant 1: no grant at or above the capacity known at that moment.
    fn grant(&mut self, seq: u64, id: &str, attempt: u64, agent: &str) {
        let capacity = self.capacity.get(agent).copied().unwrap_or(0);
        let held = self.held.entry(agent.to_owned()).or_default();
        if held.len() as u64 >= capacity {
            let text = format!(
                "entry {seq}: {id}:{attempt} granted on {agent}, which holds {} of {capacity}: {held:?}",
                held.len()
            );
            held.insert(id.to_owned(), seq);
            self.above.push(Above { text, capacity, held: held.clone() });
        } else {
            held.insert(id.to_owned(), seq);
        }
    }

    /// A dispatch was taken back because its slot was gone, so it was never put to its agent: before that, and before one
    /// that has not answered is asked again, its slot is looked at (PROTOCOL.md, where the contract was silent). That this
    /// is so is what the simulator judges by the agents' own truth; here only the log speaks, and it excuses this one
    /// dispatch, not the others beside it nor another one of the same execution.
    fn unasked(&mut self, id: &str, dispatch: u64) {
        for above in &mut self.above {
            if above.held.get(id) == Some(&dispatch) {
                above.held.remove(id);
            }
        }
        self.above.retain(|above| above.held.len() as u64 > above.capacity);
    }

    fn release(&mut self, seen: &Seen, id: &str) {
        if let Some(held) = self.held.get_mut(&seen.agent) {
            held.remove(id);
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// An agent with one slot, and what is granted on it and goes back, in that order.
    fn above(events: &[(&str, &str, Value)]) -> usize {
        let mut ledger = Ledger::default();
        let mut seq = 0;
        let mut take = |kind: &str, data: Value| {
            seq += 1;
            ledger.take(seq, &json!({"type": format!("rollcall.{kind}"), "data": data}));
        };
        take("agent.registered", json!({"agent_id": "a", "capacity": 1, "pool": "p"}));
        for id in ["x", "y", "z"] {
            take("execution.submitted", json!({"execution_id": id, "attempt": 1, "pool": "p"}));
        }
        for (kind, id, more) in events {
            let mut data = json!({"execution_id": id, "attempt": 1, "agent_id": "a"});
            for (name, value) in more.as_object().into_iter().flatten() {
                data[name] = value.clone();
            }
            take(&format!("execution.{kind}"), data);
        }
        assert_eq!(ledger.faults, Vec::<String>::new());
        ledger.above.len()
    }

    fn granted(id: &str) -> (&'static str, &str, Value) {
        ("dispatched", id, Value::Null)
    }

    fn back<'a>(id: &'a str, reason: &str) -> (&'static str, &'a str, Value) {
        ("queued", id, json!({"reason": reason}))
    }

    #[test]
    fn a_grant_above_the_capacity_is_excused_by_the_dispatch_that_lost_its_slot() {
        assert_eq!(above(&[granted("x")]), 0);
        assert_eq!(above(&[granted("x"), granted("y")]), 1);
        for id in ["x", "y"] {
            assert_eq!(above(&[granted("x"), granted("y"), back(id, "slot_lost")]), 0, "{id}");
        }
    }

    #[test]
    fn a_grant_above_the_capacity_is_excused_by_nothing_else() {
        let other_reason = [granted("x"), granted("y"), back("y", "at_capacity")];
        assert_eq!(above(&other_reason), 1);
        let another_dispatch =
            [granted("x"), granted("y"), back("y", "at_capacity"), granted("y"), back("y", "slot_lost")];
        assert_eq!(above(&another_dispatch), 1, "of the same execution");
        let two_too_many = [granted("x"), granted("y"), granted("z"), back("z", "slot_lost")];
        assert_eq!(above(&two_too_many), 2, "the second one was granted while there was no room either");
        let accepted = [granted("x"), granted("y"), ("started", "y", Value::Null), back("y", "slot_lost")];
        assert_eq!(above(&accepted), 1, "its agent had taken it");
    }
}
