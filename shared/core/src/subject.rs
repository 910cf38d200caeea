//! The only table of subjects and stream names. Nobody else joins strings with dots.

use crate::ids::{AgentId, ExecutionId, InstanceId, Prefix};

/// What a stored payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PayloadKind {
    /// What the submitter handed in.
    Input,
    /// What the agent handed back.
    Result,
    /// Where a returned attempt had got to.
    Checkpoint,
}

impl PayloadKind {
    /// The subject token.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Result => "result",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// A request from the fleet to one instance of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AgentVerb {
    /// Take this execution.
    Dispatch,
    /// End this execution and say when it is dead.
    Terminate,
    /// Shut down.
    Goodbye,
    /// What do you hold?
    Executions,
    /// Are you there?
    Ping,
}

impl AgentVerb {
    /// The subject token.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dispatch => "dispatch",
            Self::Terminate => "terminate",
            Self::Goodbye => "goodbye",
            Self::Executions => "executions",
            Self::Ping => "ping",
        }
    }
}

/// The subject of an event, as read back from the log.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum EventSubject {
    /// About an agent.
    Agent(AgentId),
    /// About an execution.
    Execution(ExecutionId),
    /// From a service about itself; the service's name.
    System(String),
}

/// Builds and reads every subject of one fleet.
#[derive(Debug, Clone, Default)]
pub struct Subjects {
    prefix: Prefix,
}

impl Subjects {
    /// The subjects of the fleet with this prefix.
    #[must_use]
    pub fn new(prefix: Prefix) -> Self {
        Self { prefix }
    }

    /// The fleet's prefix.
    #[must_use]
    pub fn prefix(&self) -> &Prefix {
        &self.prefix
    }

    /// `<prefix>.heartbeat.<agent>`
    #[must_use]
    pub fn heartbeat(&self, agent: &AgentId) -> String {
        format!("{}.heartbeat.{agent}", self.prefix)
    }

    /// `<prefix>.heartbeat.*`
    #[must_use]
    pub fn all_heartbeats(&self) -> String {
        format!("{}.heartbeat.*", self.prefix)
    }

    /// The agent token of a heartbeat's subject, unchecked text.
    #[must_use]
    pub fn agent_of_heartbeat<'a>(&self, subject: &'a str) -> Option<&'a str> {
        let token = subject
            .strip_prefix(self.prefix.as_str())?
            .strip_prefix(".heartbeat.")
            .filter(|t| !t.contains('.'))?;
        (!token.is_empty()).then_some(token)
    }

    /// `<prefix>.report.<agent>.<execution>`
    #[must_use]
    pub fn report(&self, agent: &AgentId, execution: &ExecutionId) -> String {
        format!("{}.report.{agent}.{execution}", self.prefix)
    }

    /// The agent and execution tokens of a report's subject, unchecked text.
    #[must_use]
    pub fn of_report<'a>(&self, subject: &'a str) -> Option<(&'a str, &'a str)> {
        let rest = subject.strip_prefix(self.prefix.as_str())?.strip_prefix(".report.")?;
        rest.split_once('.').filter(|(agent, execution)| {
            !agent.is_empty() && !execution.is_empty() && !execution.contains('.')
        })
    }

    /// `<prefix>.payload.<execution>.<kind>.<attempt>`
    #[must_use]
    pub fn payload(&self, execution: &ExecutionId, kind: PayloadKind, attempt: u32) -> String {
        format!("{}.payload.{execution}.{}.{attempt}", self.prefix, kind.as_str())
    }

    /// `<prefix>.agent.<agent>.<instance>.<verb>`
    #[must_use]
    pub fn agent_request(&self, agent: &AgentId, instance: &InstanceId, verb: AgentVerb) -> String {
        format!("{}.agent.{agent}.{instance}.{}", self.prefix, verb.as_str())
    }

    /// `<prefix>.prober.goodbye`: what one prober tells the other ones.
    #[must_use]
    pub fn prober_goodbye(&self) -> String {
        format!("{}.prober.goodbye", self.prefix)
    }

    /// `<prefix>.agent.<agent>.<instance>.*`: everything an instance is asked.
    #[must_use]
    pub fn agent_requests(&self, agent: &AgentId, instance: &InstanceId) -> String {
        format!("{}.agent.{agent}.{instance}.*", self.prefix)
    }

    /// `<prefix>.api.<verb>`; a verb may hold dots (`watchdog.status`).
    #[must_use]
    pub fn api(&self, verb: &str) -> String {
        format!("{}.api.{verb}", self.prefix)
    }

    /// `<prefix>.event.agent.<agent>`
    #[must_use]
    pub fn agent_event(&self, agent: &AgentId) -> String {
        format!("{}.event.agent.{agent}", self.prefix)
    }

    /// `<prefix>.event.execution.<execution>`
    #[must_use]
    pub fn execution_event(&self, execution: &ExecutionId) -> String {
        format!("{}.event.execution.{execution}", self.prefix)
    }

    /// `<prefix>.event.system.<service>`
    #[must_use]
    pub fn system_event(&self, service: &str) -> String {
        format!("{}.event.system.{service}", self.prefix)
    }

    /// `<prefix>.event.>`
    #[must_use]
    pub fn all_events(&self) -> String {
        format!("{}.event.>", self.prefix)
    }

    /// `<prefix>.event.agent.*`
    #[must_use]
    pub fn all_agent_events(&self) -> String {
        format!("{}.event.agent.*", self.prefix)
    }

    /// `<prefix>.event.execution.*`
    #[must_use]
    pub fn all_execution_events(&self) -> String {
        format!("{}.event.execution.*", self.prefix)
    }

    /// `<prefix>.event.system.*`
    #[must_use]
    pub fn all_system_events(&self) -> String {
        format!("{}.event.system.*", self.prefix)
    }

    /// What an entry of the log is about, by its subject. `None`: no valid subject of the log.
    #[must_use]
    pub fn of_event(&self, subject: &str) -> Option<EventSubject> {
        let rest = subject.strip_prefix(self.prefix.as_str())?.strip_prefix(".event.")?;
        let (kind, token) = rest.split_once('.')?;
        match kind {
            "agent" => AgentId::new(token).ok().map(EventSubject::Agent),
            "execution" => ExecutionId::new(token).ok().map(EventSubject::Execution),
            "system" => crate::ids::is_valid_id(token).then(|| EventSubject::System(token.to_owned())),
            _ => None,
        }
    }

    /// `<prefix>.recovery.<reason>.<agent>`
    #[must_use]
    pub fn recovery_broadcast(&self, reason: &str, agent: &str) -> String {
        format!("{}.recovery.{reason}.{agent}", self.prefix)
    }

    /// `<prefix>.health.<status>.<agent>`
    #[must_use]
    pub fn health_broadcast(&self, status: &str, agent: &AgentId) -> String {
        format!("{}.health.{status}.{agent}", self.prefix)
    }

    /// `<prefix>.system.<name>`
    #[must_use]
    pub fn system_broadcast(&self, name: &str) -> String {
        format!("{}.system.{name}", self.prefix)
    }

    fn stream(&self, name: &str) -> String {
        format!("{}_{name}", self.prefix.as_str().to_ascii_uppercase())
    }

    /// The stream that holds the event log.
    #[must_use]
    pub fn events_stream(&self) -> String {
        self.stream("EVENTS")
    }

    /// The work queue of reports.
    #[must_use]
    pub fn reports_stream(&self) -> String {
        self.stream("REPORTS")
    }

    /// The stream that holds inputs, results and checkpoints.
    #[must_use]
    pub fn payloads_stream(&self) -> String {
        self.stream("PAYLOADS")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subject_is_the_one_of_the_contract() {
        let s = Subjects::default();
        let agent = AgentId::new("agent-7").unwrap();
        let instance = InstanceId::new("i-1").unwrap();
        let execution = ExecutionId::new("01J").unwrap();
        assert_eq!(s.heartbeat(&agent), "rollcall.heartbeat.agent-7");
        assert_eq!(s.report(&agent, &execution), "rollcall.report.agent-7.01J");
        assert_eq!(s.payload(&execution, PayloadKind::Input, 2), "rollcall.payload.01J.input.2");
        assert_eq!(
            s.agent_request(&agent, &instance, AgentVerb::Terminate),
            "rollcall.agent.agent-7.i-1.terminate"
        );
        assert_eq!(s.api("watchdog.run"), "rollcall.api.watchdog.run");
        assert_eq!(s.agent_event(&agent), "rollcall.event.agent.agent-7");
        assert_eq!(s.execution_event(&execution), "rollcall.event.execution.01J");
        assert_eq!(s.events_stream(), "ROLLCALL_EVENTS");
    }

    #[test]
    fn subjects_of_another_fleet_are_not_ours() {
        let s = Subjects::new(Prefix::new("blue").unwrap());
        assert_eq!(s.agent_of_heartbeat("blue.heartbeat.a"), Some("a"));
        assert_eq!(s.agent_of_heartbeat("bluer.heartbeat.a"), None);
        assert_eq!(s.agent_of_heartbeat("blue.heartbeat.a.b"), None);
        assert_eq!(s.of_report("blue.report.a.x"), Some(("a", "x")));
        assert_eq!(s.of_report("blue.report.a"), None);
        assert_eq!(s.of_report("blue.report.a.b.c"), None);
        assert_eq!(s.of_event("rollcall.event.agent.a"), None);
        assert_eq!(s.of_event("blue.event.execution.x"), Some(EventSubject::Execution("x".parse().unwrap())));
        assert_eq!(s.of_event("blue.event.execution.x.y"), None);
        assert_eq!(s.of_event("blue.event.other.x"), None);
        assert_eq!(s.events_stream(), "BLUE_EVENTS");
    }
}
