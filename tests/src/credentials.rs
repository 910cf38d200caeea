//! The users of the project's own NATS configuration, made by the project's own script.

use std::{path::Path, process::Command};

use rollcall_nats::{Bus, BusOptions, testing::NatsServer};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::process::binary;

/// A folder of credentials.
#[derive(Debug)]
pub struct Credentials {
    folder: TempDir,
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is a folder of the repository")
}

fn run(command: &mut Command) {
    let done = command.output().expect("it starts");
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

impl Credentials {
    /// Makes those of the services, submitters, dashboards and operators, and of these agents: of the first by
    /// `scripts/credentials`, of the others by `rollcall agent credentials`.
    ///
    /// # Panics
    /// When one of them fails.
    #[must_use]
    pub fn make(agents: &[&str]) -> Self {
        let folder = TempDir::new().expect("a folder for credentials");
        let mut script = Command::new(repository().join("scripts/credentials"));
        script.arg("--dir").arg(folder.path()).arg("agent").args(agents.first());
        run(&mut script);
        for agent in agents.iter().skip(1) {
            let mut program = Command::new(binary("rollcall"));
            run(program.args(["agent", "credentials", agent, "--dir"]).arg(folder.path()));
        }
        Self { folder }
    }

    /// `deploy/nats.conf`, reading these credentials.
    ///
    /// # Panics
    /// When it can't be read.
    #[must_use]
    pub fn nats_config(&self) -> String {
        let shipped =
            std::fs::read_to_string(repository().join("deploy/nats.conf")).expect("deploy/nats.conf");
        // The server reads includes relative to the file, which lies in another temporary folder.
        let name = self.folder.path().file_name().expect("a named folder").to_string_lossy().into_owned();
        let config = shipped.replace("./credentials/", &format!("../{name}/nats/"));
        assert_ne!(config, shipped, "deploy/nats.conf includes its credentials");
        config
    }

    /// The password of a user or an agent.
    ///
    /// # Panics
    /// When there is no such user.
    #[must_use]
    pub fn password(&self, user: &str) -> String {
        let places = [format!("{user}.env"), format!("agents/{user}.env")];
        let text = places.iter().find_map(|p| std::fs::read_to_string(self.folder.path().join(p)).ok());
        let text = text.unwrap_or_else(|| panic!("no credentials of {user}"));
        let line = text.lines().find_map(|l| l.strip_prefix("ROLLCALL_NATS_PASSWORD="));
        line.expect("an env file names its password").to_owned()
    }

    /// A connection as this user.
    ///
    /// # Panics
    /// When there is none.
    pub async fn bus(&self, nats: &NatsServer, user: &str) -> Bus {
        let options = BusOptions {
            url: nats.url(),
            prefix: "rollcall".to_owned(),
            connection_name: format!("test {user}"),
            user: Some(user.to_owned()),
            password: Some(self.password(user)),
            inbox_prefix: Some(format!("_INBOX_{user}")),
            ..BusOptions::default()
        };
        Bus::connect(options, CancellationToken::new()).await.expect("a user of this server")
    }
}
