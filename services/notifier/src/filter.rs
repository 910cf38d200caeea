//! What a subscriber wants to hear of.

use rollcall_core::{
    AgentId, ExecutionId, Pool,
    event::{AgentEvent, ExecutionEvent, SystemEventKind, TYPE_PREFIX},
    subject::Subjects,
    wire::ApiError,
};

use crate::entry::About;

/// Most types that one filter may name.
const TYPES_MAX: usize = 64;

/// The first half of an event's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Agent,
    Execution,
    System,
}

impl Family {
    const ALL: [Self; 3] = [Self::Agent, Self::Execution, Self::System];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Execution => "execution",
            Self::System => "system",
        }
    }

    const fn names(self) -> &'static [&'static str] {
        match self {
            Self::Agent => AgentEvent::NAMES,
            Self::Execution => ExecutionEvent::NAMES,
            Self::System => SystemEventKind::NAMES,
        }
    }
}

/// One type, or all types of a family.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    family: Family,
    name: Option<&'static str>,
}

impl Pattern {
    fn parse(text: &str) -> Result<Vec<Self>, ApiError> {
        let shown: String = text.chars().take(80).collect();
        let short = text.strip_prefix(TYPE_PREFIX).unwrap_or(text);
        if short == "*" {
            return Ok(Family::ALL.map(|family| Self { family, name: None }).into());
        }
        let unknown = || {
            ApiError::bad_request(format!(
                "type: {shown:?} is no event type, like execution.recovered or agent.*"
            ))
        };
        let (family, name) = short.split_once('.').ok_or_else(unknown)?;
        let family = Family::ALL.into_iter().find(|f| f.as_str() == family).ok_or_else(unknown)?;
        if name == "*" {
            return Ok(vec![Self { family, name: None }]);
        }
        match family.names().iter().find(|known| **known == name) {
            Some(name) => Ok(vec![Self { family, name: Some(name) }]),
            None => Err(ApiError::bad_request(format!(
                "type: {shown:?} is no event type; {} has {}",
                family.as_str(),
                family.names().join(", ")
            ))),
        }
    }

    fn matches(&self, kind: &str) -> bool {
        kind.strip_prefix(self.family.as_str())
            .and_then(|rest| rest.strip_prefix('.'))
            .is_some_and(|name| self.name.is_none_or(|wanted| wanted == name))
    }
}

/// A conjunction of what is named; empty matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    types: Vec<Pattern>,
    /// Only events that name this agent.
    pub agent: Option<AgentId>,
    /// Only events of agents and executions in this pool.
    pub pool: Option<Pool>,
    /// Only events of this execution.
    pub execution: Option<ExecutionId>,
}

impl Filter {
    /// Of any type, about all of what is named.
    #[must_use]
    pub const fn about(agent: Option<AgentId>, pool: Option<Pool>, execution: Option<ExecutionId>) -> Self {
        Self { types: Vec::new(), agent, pool, execution }
    }

    /// Adds a comma-separated list of types: `execution.recovered,agent.*`, each with or without `rollcall.`.
    pub fn add_types(&mut self, list: &str) -> Result<(), ApiError> {
        for text in list.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            self.types.extend(Pattern::parse(text)?);
        }
        if self.types.len() > TYPES_MAX {
            return Err(ApiError::bad_request(format!("type: more than {TYPES_MAX} types")));
        }
        Ok(())
    }

    /// Whether a subscriber with this filter hears of it.
    #[must_use]
    pub fn matches(&self, about: &About) -> bool {
        let same = |wanted: &Option<_>, found: &Option<_>| wanted.is_none() || wanted == found;
        (self.types.is_empty() || self.types.iter().any(|t| t.matches(about.kind)))
            && same(&self.agent, &about.agent)
            && (self.execution.is_none() || self.execution == about.execution)
            && (self.pool.is_none() || self.pool == about.pool)
    }

    /// The subjects of the log that can hold a match: what has to be read to resume. None: nothing can match.
    #[must_use]
    pub fn log_subjects(&self, subjects: &Subjects) -> Vec<String> {
        let has = |family: Family| self.types.is_empty() || self.types.iter().any(|t| t.family == family);
        let mut wanted = Vec::new();
        if has(Family::Agent) && self.execution.is_none() {
            wanted.push(match &self.agent {
                Some(agent) => subjects.agent_event(agent),
                None => subjects.all_agent_events(),
            });
        }
        if has(Family::Execution) {
            wanted.push(match &self.execution {
                Some(execution) => subjects.execution_event(execution),
                None => subjects.all_execution_events(),
            });
        }
        if has(Family::System) {
            wanted.push(subjects.all_system_events());
        }
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{self, FLEET};

    fn types(list: &str) -> Filter {
        let mut filter = Filter::default();
        filter.add_types(list).unwrap();
        filter
    }

    #[test]
    fn types_match_with_and_without_prefix_and_by_family() {
        let recovered = About::of(&samples::recovered("e1", "a1", 1));
        let registered = About::of(&samples::registered("a1", "p"));
        for (list, execution, agent) in [
            ("execution.recovered", true, false),
            ("rollcall.execution.recovered", true, false),
            ("agent.*", false, true),
            ("rollcall.agent.*, execution.recovered", true, true),
            ("execution.completed", false, false),
            ("*", true, true),
            ("", true, true),
        ] {
            let filter = types(list);
            assert_eq!(filter.matches(&recovered), execution, "{list}");
            assert_eq!(filter.matches(&registered), agent, "{list}");
        }
    }

    #[test]
    fn a_type_that_does_not_exist_is_named() {
        for bad in ["recovered", "execution.recoverd", "webhook.*", "execution.", "execution.*.x", "a b"] {
            let error = Filter::default().add_types(bad).unwrap_err();
            assert!(error.message.contains(bad), "{error}");
        }
        let list = vec!["agent.*"; TYPES_MAX + 1].join(",");
        assert!(Filter::default().add_types(&list).is_err());
    }

    #[test]
    fn everything_named_must_match() {
        let event = About::of(&samples::dispatched("e1", "a1", 1));
        let mut filter = Filter { agent: Some(samples::agent_id("a1")), ..Filter::default() };
        assert!(filter.matches(&event));
        filter.execution = Some("e2".parse().unwrap());
        assert!(!filter.matches(&event));
        filter.execution = Some("e1".parse().unwrap());
        assert!(filter.matches(&event));
        filter.pool = Some(Pool::default());
        assert!(!filter.matches(&event), "a pool that is not known does not match");
        assert!(filter.matches(&About { pool: Some(Pool::default()), ..event }));
    }

    #[test]
    fn only_subjects_that_can_match_are_read() {
        let all = ["rollcall.event.agent.*", "rollcall.event.execution.*", "rollcall.event.system.*"];
        assert_eq!(Filter::default().log_subjects(&FLEET), all);
        assert_eq!(types("execution.recovered").log_subjects(&FLEET), all[1..2]);
        let one = Filter { execution: Some("e1".parse().unwrap()), ..Filter::default() };
        assert_eq!(one.log_subjects(&FLEET), ["rollcall.event.execution.e1", "rollcall.event.system.*"]);
        let none = Filter { execution: Some("e1".parse().unwrap()), ..types("agent.*") };
        assert!(none.log_subjects(&FLEET).is_empty());
    }
}
