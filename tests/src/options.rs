//! What a story may want otherwise.

use std::time::Duration;

/// What differs from an ordinary fleet.
#[derive(Debug, Clone)]
pub struct Options {
    /// Settings over the defaults of the stories.
    pub env: Vec<(&'static str, String)>,
    /// Processes of each service.
    pub replicas: Vec<(&'static str, usize)>,
    /// Configuration of the bus's server.
    pub nats_config: Option<String>,
    /// The project's own `deploy/nats.conf` with the users of `scripts/credentials`, these agents among them.
    pub accounts: Option<Vec<&'static str>>,
    /// Every answer of Redis comes later, by one of these in turn.
    pub redis_delays: &'static [Duration],
    /// The servers are not up when the services start, and nobody waits for anything.
    pub servers_down: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            env: Vec::new(),
            replicas: vec![("health-prober", 1), ("dispatcher", 1), ("watchdog", 1), ("notifier", 1)],
            nats_config: None,
            accounts: None,
            redis_delays: &[],
            servers_down: false,
        }
    }
}

impl Options {
    /// With this setting.
    #[must_use]
    pub fn env(mut self, name: &'static str, value: impl ToString) -> Self {
        self.env.push((name, value.to_string()));
        self
    }

    /// With so many processes of a service.
    #[must_use]
    pub fn replicas(mut self, service: &'static str, count: usize) -> Self {
        self.replicas.retain(|(name, _)| *name != service);
        self.replicas.push((service, count));
        self
    }
}
