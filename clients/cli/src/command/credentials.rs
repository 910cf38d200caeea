//! `rollcall agent credentials`: a user of its own for an agent, in the files that `deploy/nats.conf` includes.
//!
//! The same files as `scripts/credentials agent` writes, in the same form and under the same lock.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use clap::Args;
use rollcall_core::ids::AgentId;
use serde_json::json;

use crate::{
    exit,
    failure::Failure,
    output::{Format, Output},
};

/// Random bytes of a password: beyond guessing.
const PASSWORD_BYTES: usize = 24;
/// Only for who owns it.
const FILE_MODE: u32 = 0o600;
/// Users of the bus that are no agents.
const OTHER_USERS: [&str; 4] = ["services", "submitter", "dashboard", "operator"];

/// What `rollcall agent credentials` is told.
#[derive(Debug, Args)]
#[command(after_help = "\
Adds the agent to DIR/nats/agents.conf, which deploy/nats.conf includes, and writes DIR/agents/ID.env. An agent that has
a user already keeps it. Then tell the server: kill -HUP its process (docker-compose kill -s HUP nats).
The agent may publish its own heartbeats and reports, hear its own requests, and nothing else.")]
pub(crate) struct CredentialsArgs {
    /// The agent.
    #[arg(value_name = "AGENT")]
    id: AgentId,
    /// Where credentials are kept.
    #[arg(long, value_name = "DIR", default_value = ".rollcall/credentials")]
    dir: PathBuf,
}

pub(crate) fn run(args: &CredentialsArgs, prefix: &str, output: Output) -> Result<u8, Failure> {
    let id = &args.id;
    if OTHER_USERS.contains(&id.as_str()) {
        return Err(Failure::failed(format!(
            "{id} is the name of another user of the bus: choose another agent id"
        )));
    }
    let (password, fresh) = issue(&args.dir, id, prefix)?;
    match output.format {
        Format::Table => {
            output.line(&environment(id, &password))?;
            if fresh {
                eprintln!(
                    "added to {}: tell the nats-server (kill -HUP)",
                    args.dir.join("nats/agents.conf").display()
                );
            }
        }
        Format::Json | Format::Jsonl => {
            output.line(&json!({"user": id, "password": password, "added": fresh}).to_string())?;
        }
    }
    Ok(exit::OK)
}

/// The agent's password, and whether it was made just now.
fn issue(dir: &Path, id: &AgentId, prefix: &str) -> Result<(String, bool), Failure> {
    let (servers, agents) = (dir.join("nats"), dir.join("agents"));
    for folder in [&servers, &agents] {
        fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
    }
    let conf = servers.join("agents.conf");
    let lock_file = servers.join("agents.conf.lock");
    let lock = OpenOptions::new().create(true).append(true).mode(FILE_MODE).open(&lock_file);
    let lock = lock.map_err(|error| failed(&lock_file, &error))?;
    lock.lock().map_err(|error| failed(&lock_file, &error))?;
    let text = match fs::read_to_string(&conf) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "users: [\n]\n".to_owned(),
        Err(error) => return Err(failed(&conf, &error)),
    };
    if let Some(password) = password_in(&text, id) {
        return Ok((password, false));
    }
    let password = new_password()?;
    let added = with_agent(&text, id, &password, prefix).ok_or_else(|| {
        Failure::failed(format!("{} does not end with a line of its own for ]", conf.display()))
    })?;
    // First the agent's own copy: a password that only the server has would be of no use.
    replace(&agents.join(format!("{id}.env")), &format!("{}\n", environment(id, &password)))?;
    replace(&conf, &added)?;
    Ok((password, true))
}

fn failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("{}: {error}", path.display()))
}

fn environment(id: &AgentId, password: &str) -> String {
    format!("ROLLCALL_NATS_USER={id}\nROLLCALL_NATS_PASSWORD={password}")
}

fn user_line(id: &AgentId, password: &str, prefix: &str) -> String {
    format!(
        "  {{ user: \"{id}\", password: \"{password}\", permissions: {{ \
         publish: [\"{prefix}.heartbeat.{id}\", \"{prefix}.report.{id}.*\"], \
         subscribe: [\"{prefix}.agent.{id}.>\", \"_INBOX_{id}.>\"], \
         allow_responses: {{ max: 1, expires: \"10m\" }} }} }}\n"
    )
}

/// The file with one more user before its last line, which is `]`.
fn with_agent(text: &str, id: &AgentId, password: &str, prefix: &str) -> Option<String> {
    let users = text.trim_end().strip_suffix(']')?;
    users.ends_with('\n').then(|| format!("{users}{}]\n", user_line(id, password, prefix)))
}

fn password_in(text: &str, id: &AgentId) -> Option<String> {
    let start = format!("user: \"{id}\",");
    let line = text.lines().find(|line| line.contains(&start))?;
    let (_, rest) = line.split_once("password: \"")?;
    Some(rest.split_once('"')?.0.to_owned())
}

fn new_password() -> Result<String, Failure> {
    let mut bytes = [0u8; PASSWORD_BYTES];
    let source = Path::new("/dev/urandom");
    File::open(source)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| failed(source, &error))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Puts the file into place in one step, readable by its owner only.
fn replace(path: &Path, text: &str) -> Result<(), Failure> {
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    let written = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(FILE_MODE)
        .open(&fresh)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.and_then(|()| fs::rename(&fresh, path)).map_err(|error| failed(path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_agent_gets_a_user_once_and_nobody_elses_changes() {
        let dir = tempfile::tempdir().unwrap();
        let id = |text: &str| AgentId::new(text).unwrap();
        let (first, fresh) = issue(dir.path(), &id("a-1"), "rollcall").unwrap();
        assert!(fresh);
        assert_eq!(first.len(), 2 * PASSWORD_BYTES);
        let (second, _) = issue(dir.path(), &id("a-10"), "rollcall").unwrap();
        assert_ne!(first, second);
        assert_eq!(issue(dir.path(), &id("a-1"), "rollcall").unwrap(), (first.clone(), false));
        let text = fs::read_to_string(dir.path().join("nats/agents.conf")).unwrap();
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(
            text.starts_with("users: [\n  { user: \"a-1\", password:") && text.ends_with("}\n]\n"),
            "{text}"
        );
        assert!(text.contains("publish: [\"rollcall.heartbeat.a-1\", \"rollcall.report.a-1.*\"]"));
        let env = dir.path().join("agents/a-1.env");
        assert_eq!(
            fs::read_to_string(&env).unwrap(),
            format!("ROLLCALL_NATS_USER=a-1\nROLLCALL_NATS_PASSWORD={first}\n")
        );
        assert_eq!(fs::metadata(&env).unwrap().permissions().mode() & 0o777, FILE_MODE);
    }

    #[test]
    fn a_file_of_another_form_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("nats")).unwrap();
        let conf = dir.path().join("nats/agents.conf");
        fs::write(&conf, "users: [ {user: x} ]").unwrap();
        assert!(issue(dir.path(), &AgentId::new("a").unwrap(), "rollcall").is_err());
        assert_eq!(fs::read_to_string(&conf).unwrap(), "users: [ {user: x} ]");
    }
}
