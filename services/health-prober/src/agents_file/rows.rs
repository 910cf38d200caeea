//! The rows of the agents file. Each stands for itself: one that is wrong is set aside, and the others count.

use std::collections::{BTreeMap, HashMap};

use rollcall_core::event::Profile;
use rollcall_core::wire::{CAPACITY_MAX, CONTROL_KIND, DURATION_MS_MAX, Endpoint};
use rollcall_core::{AgentId, InstanceId, Pool};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::{Spanned, Table, Value};

use crate::probe::{self, KINDS as PROBE_KINDS, STDIO_KIND};

/// One agent of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileAgent {
    /// Its id.
    pub agent_id: AgentId,
    /// Executions it can hold at once.
    pub capacity: u32,
    /// Its pool.
    pub pool: Pool,
    /// Its default execution timeout.
    pub timeout_ms: Option<u64>,
    /// For people.
    pub version: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Where it is probed.
    pub probe: Option<Endpoint>,
    /// Where it is driven.
    pub control: Option<Endpoint>,
}

impl FileAgent {
    /// What its registration says.
    #[must_use]
    pub fn profile(&self, instance_id: InstanceId) -> Profile {
        Profile {
            agent_id: self.agent_id.clone(),
            instance_id,
            capacity: self.capacity,
            pool: self.pool.clone(),
            interval_ms: None,
            timeout_ms: self.timeout_ms,
            version: self.version.clone(),
            labels: self.labels.clone(),
            probe: self.probed(),
            control: self.control.clone(),
        }
    }

    /// Its probe, or else its control endpoint's list of executions.
    fn probed(&self) -> Option<Endpoint> {
        self.probe.clone().or_else(|| {
            self.control.as_ref().map(|control| Endpoint {
                kind: CONTROL_KIND.to_owned(),
                url: format!("{}/api/executions/running", control.url.trim_end_matches('/')),
            })
        })
    }
}

/// What a file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileRead {
    /// The good rows.
    pub agents: Vec<FileAgent>,
    /// The others.
    pub aside: Vec<Aside>,
}

/// A row that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Aside {
    /// Whom it is about, if that can be told.
    pub agent_id: Option<AgentId>,
    /// Which row it is, and what is wrong with which of its fields.
    pub why: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AgentsFile {
    #[serde(default)]
    agents: Vec<Spanned<Value>>,
}

/// Reads the text of a file.
///
/// # Errors
/// It is no TOML, or no list of agents, in words. What is wrong with a row only sets that row aside.
pub fn parse(text: &str) -> Result<FileRead, String> {
    let file: AgentsFile = toml::from_str(text).map_err(|error| error.to_string())?;
    let mut read = FileRead::default();
    let mut rows: HashMap<AgentId, usize> = HashMap::new();
    for (row, number) in file.agents.into_iter().zip(1..) {
        let line = 1 + text.bytes().take(row.span().start).filter(|byte| *byte == b'\n').count();
        let mut row = row.into_inner();
        let id = row.get("agent_id").cloned().and_then(|id| id.try_into::<AgentId>().ok());
        let twin = id.as_ref().and_then(|id| rows.get(id));
        let agent = match (row.as_table_mut(), twin) {
            (None, _) => Err("it is no table".to_owned()),
            (Some(_), Some(first)) => {
                Err(format!("agent_id: row {first} is about the same agent, and counts"))
            }
            (Some(table), None) => agent(table),
        };
        match agent {
            Ok(agent) => {
                rows.insert(agent.agent_id.clone(), number);
                read.agents.push(agent);
            }
            Err(why) => {
                let of = id.as_ref().map(|id| format!(", agent {id}")).unwrap_or_default();
                read.aside
                    .push(Aside { agent_id: id, why: format!("row {number} (line {line}{of}): {why}") });
            }
        }
    }
    Ok(read)
}

fn agent(row: &mut Table) -> Result<FileAgent, String> {
    let missing = |name: &str| format!("{name} is missing");
    for name in ["probe", "control"] {
        // Not the parser's words: they would repeat a URL that stands there by itself.
        if row.get(name).is_some_and(|endpoint| !endpoint.is_table()) {
            return Err(format!("{name}: it is no table of kind and url"));
        }
    }
    let agent = FileAgent {
        agent_id: take(row, "agent_id")?.ok_or_else(|| missing("agent_id"))?,
        capacity: take(row, "capacity")?.ok_or_else(|| missing("capacity"))?,
        pool: take(row, "pool")?.unwrap_or_default(),
        timeout_ms: take(row, "timeout_ms")?,
        version: take(row, "version")?,
        labels: take(row, "labels")?.unwrap_or_default(),
        probe: take(row, "probe")?,
        control: take(row, "control")?,
    };
    if let Some((name, _)) = row.iter().next() {
        return Err(format!("{}: there is no such field", name.escape_debug()));
    }
    if agent.capacity > CAPACITY_MAX {
        return Err(format!("capacity: {} is over {CAPACITY_MAX}", agent.capacity));
    }
    if let Some(timeout) = agent.timeout_ms.filter(|t| *t == 0 || *t > DURATION_MS_MAX) {
        return Err(format!("timeout_ms: {timeout} is not within 1..{DURATION_MS_MAX}"));
    }
    if agent.probe.is_none() && agent.control.is_none() {
        return Err("neither probe nor control, nothing could be known of it".to_owned());
    }
    if let Some(control) = &agent.control {
        control.check_control().map_err(|why| format!("control: {why}"))?;
        if !control.is_driven() {
            return Err(format!("control: kind {:?}, only {CONTROL_KIND} is driven", control.kind));
        }
        if probe::placeholder(control).is_some() {
            return Err(format!("control: url {:?} names no host", control.url));
        }
        probe::check_url(control).map_err(|why| format!("control: {why}"))?;
    }
    if let Some(probe) = &agent.probe {
        probe.check().map_err(|why| format!("probe: {why}"))?;
        let kind = probe.kind.as_str();
        if kind != STDIO_KIND && !PROBE_KINDS.contains(&kind) {
            return Err(format!("probe: kind {kind:?}, not one of {}, {STDIO_KIND}", PROBE_KINDS.join(", ")));
        }
        probe::check_url(probe).map_err(|why| format!("probe: {why}"))?;
    }
    Ok(agent)
}

/// Takes a field out of its row.
fn take<T: DeserializeOwned>(row: &mut Table, name: &str) -> Result<Option<T>, String> {
    let read = |value: Value| value.try_into().map_err(|error| format!("{name}: {}", error.message()));
    row.remove(name).map(read).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_describes_agents() {
        let read = parse(
            r#"
            [[agents]]
            agent_id = "legacy-1"
            capacity = 2
            labels = { zone = "b" }
            control = { kind = "http", url = "http://10.0.0.7:8080/" }
            [[agents]]
            agent_id = "legacy-2"
            capacity = 1
            pool = "gpu"
            probe = { kind = "tcp", url = "10.0.0.8:22" }
            "#,
        )
        .unwrap();
        assert_eq!(read.aside, []);
        let profile = read.agents[0].profile("file-1".parse().unwrap());
        assert_eq!((profile.pool.as_str(), profile.capacity), ("default", 2));
        assert_eq!(profile.probe.unwrap().url, "http://10.0.0.7:8080/api/executions/running");
        assert_eq!(read.agents[1].profile("file-2".parse().unwrap()).probe.unwrap().kind, "tcp");
        assert_eq!(parse("").unwrap(), FileRead::default());
    }

    /// The example in the manual is a file that is read.
    #[test]
    fn the_manual_shows_a_file_that_works() {
        let manual = include_str!("../../../../docs/OPERATIONS.md");
        let (_, rest) = manual.split_once("```toml\n[[agents]]").unwrap();
        let (example, _) = rest.split_once("```").unwrap();
        let read = parse(&format!("[[agents]]{example}")).unwrap();
        assert_eq!(read.aside, []);
        assert!(read.agents.iter().any(|agent| agent.control.is_some() && agent.probe.is_none()));
        assert!(read.agents.iter().any(|agent| agent.control.is_none()));
        for field in ["pool", "timeout_ms", "version", "labels", "probe", "control"] {
            assert!(example.contains(field), "{field} is not shown");
        }
    }

    const PROBE: &str = "probe = { kind = \"tcp\", url = \"h:1\" }";

    fn row(id: &str, more: &str) -> String {
        format!("[[agents]]\nagent_id = \"{id}\"\ncapacity = 1\n{more}\n")
    }

    #[test]
    fn a_bad_row_is_set_aside_with_its_place_and_field_and_the_others_count() {
        let probe = |kind: &str, url: &str| format!("probe = {{ kind = \"{kind}\", url = \"{url}\" }}");
        for (bad, names) in [
            (row("b", &probe("htttp", "http://h")), "probe: kind \"htttp\", not one of http, tcp"),
            (row("b", &probe("http", "10.0.0.7 8080")), "probe: its url \"10.0.0.7 8080\" can't be read"),
            (row("b", &probe("http", "ftp://h")), "probe: its url \"ftp://h\" has a scheme"),
            (row("b", &probe("tcp", "h")), "probe: its url \"tcp://h\" names no port"),
            (row("b", &probe("grpc", "h:1")), "probe: its url"),
            (row("b", "probe = \"http://h\""), "probe: "),
            (row("b", "probe = { url = \"http://h\" }"), "probe: missing field `kind`"),
            (row("b", &PROBE.replace("probe", "control")), "control: kind \"tcp\", only http is driven"),
            (
                row("b", "control = { kind = \"http\", url = \"http://\" }"),
                "control: url \"http://\" names no host",
            ),
            (row("b", ""), "neither probe nor control"),
            (row("b", &format!("capcity = 2\n{PROBE}")), "capcity: there is no such field"),
            (row("b", PROBE).replace("= 1", "= 9999"), "capacity: 9999"),
            (row("b", PROBE).replace("= 1", "= \"1\""), "capacity: "),
            (row("b", PROBE).replace("= 1", "= -1"), "capacity: "),
            (row("b", PROBE).replace("capacity = 1", ""), "capacity is missing"),
            (row("b", &format!("timeout_ms = 0\n{PROBE}")), "timeout_ms: 0"),
            (row("b", &format!("pool = \"a.b\"\n{PROBE}")), "pool: "),
            (row("a", PROBE), "agent_id: row 1 is about the same agent"),
        ] {
            let text = format!("{}{bad}{}", row("a", PROBE), row("c", PROBE));
            let read = parse(&text).unwrap();
            let good: Vec<_> = read.agents.iter().map(|agent| agent.agent_id.as_str()).collect();
            assert_eq!(good, ["a", "c"], "{bad}");
            let [aside] = &read.aside[..] else { panic!("{:?}", read.aside) };
            let id = if names.contains("row 1") { "a" } else { "b" };
            assert_eq!(aside.agent_id.as_ref().map(AgentId::as_str), Some(id), "{bad}");
            let place = format!("row 2 (line 5, agent {id}): ");
            assert!(aside.why.starts_with(&(place + names)), "{}", aside.why);
        }
        let nobody = parse(&row("a.b", PROBE)).unwrap();
        assert_eq!(nobody.aside[0].agent_id, None);
        assert!(nobody.aside[0].why.starts_with("row 1 (line 1): agent_id: "), "{}", nobody.aside[0].why);
        assert_eq!(parse("agents = [7]").unwrap().aside[0].why, "row 1 (line 1): it is no table");
    }

    #[test]
    fn a_row_with_a_user_or_password_is_set_aside_and_they_are_not_repeated() {
        for (bad, names) in [
            ("control = { kind = \"http\", url = \"http://u:hunter2@h/\" }", "control: its url carries"),
            (
                "control = { kind = \"http\", url = \"http://h/?key=hunter2\" }",
                "control: its url has a query",
            ),
            ("control = { kind = \"http\", url = \"http://h/#hunter2\" }", "control: its url has a query"),
            ("control = \"http://u:hunter2@h/\"", "control: it is no table"),
            ("probe = { kind = \"http\", url = \"http://u:hunter2@not a host/\" }", "probe: its url carries"),
            ("probe = { kind = \"tcp\", url = \"u:hunter2@h:1\" }", "probe: its url carries"),
            ("probe = { kind = \"nats\", url = \"nats://u:hunter2@h:1\" }", "probe: its url carries"),
            ("probe = \"http://u:hunter2@h/\"", "probe: it is no table"),
        ] {
            let read = parse(&row("b", bad)).unwrap();
            let [aside] = &read.aside[..] else { panic!("{bad}: {read:?}") };
            assert!(aside.why.contains(names) && !aside.why.contains("hunter2"), "{}", aside.why);
        }
    }

    #[test]
    fn what_is_not_probed_is_taken_all_the_same() {
        for (kind, url) in
            [("stdio", ""), ("acp", "stdio:agent"), ("acp", "acp://"), ("http", ""), ("nats", "")]
        {
            let text = row("a", &format!("probe = {{ kind = \"{kind}\", url = \"{url}\" }}"));
            let read = parse(&text).unwrap();
            assert_eq!((read.agents.len(), read.aside.len()), (1, 0), "{:?}", read.aside);
        }
    }

    #[test]
    fn a_file_that_is_no_list_of_agents_is_refused_whole() {
        for (text, names) in [
            ("agents = 7".to_owned(), "agents"),
            ("[[agents]".to_owned(), ""),
            ("nonsense".to_owned(), ""),
            // Read as a file without agents it would take them all away.
            (row("a", PROBE).replace("agents", "agent"), "unknown field `agent`"),
        ] {
            let error = parse(&text).expect_err(&text);
            assert!(error.contains(names), "{text}: {error}");
        }
    }
}
