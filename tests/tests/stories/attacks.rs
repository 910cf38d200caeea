//! What somebody on the bus may not do: on a server with the project's own `deploy/nats.conf`, with users and agents as
//! the project's own programs make them. The attackers speak the protocol by themselves.

use e2e::{
    Fleet, ScriptedAgent,
    fleet::{Options, SOON},
    process::Process,
    raw::{Heard, Raw},
    until,
};
use serde_json::{Value, json};

/// A command that finishes at once, or never: what it is told decides.
const WORKER: &str = "read n; [ \"$n\" = '\"hold\"' ] && exec tail -f /dev/null; echo \"$n\"";

/// A fleet with accounts, an agent `victim` that runs, and one `mallory` whose password the attacker has.
struct Siege {
    fleet: Fleet,
    _victim: Process,
    /// Runs at the victim for as long as the story.
    held: String,
}

impl Siege {
    async fn begin() -> Self {
        let options = Options { accounts: Some(vec!["mallory", "victim"]), ..Options::default() };
        let fleet = Fleet::start_with(options).await;
        let settings = [
            ("ROLLCALL_NATS_USER", "victim".to_owned()),
            ("ROLLCALL_NATS_PASSWORD", fleet.credentials().password("victim")),
        ];
        let args = ["agent", "run", "--id", "victim", "--capacity", "2", "--", "sh", "-c", WORKER];
        let victim = fleet.program_as("agent-run", "rollcall", &args, &settings);
        fleet.status("victim", "connected", SOON).await;
        let held = fleet.submit(json!({"agent_id": "victim", "input": "hold"})).await;
        let held = held["execution_id"].as_str().expect("an id").to_owned();
        fleet.state(&held, "running", SOON).await;
        Self { fleet, _victim: victim, held }
    }

    async fn as_user(&self, user: &str) -> Raw {
        Raw::connect(self.fleet.nats.port(), user, &self.fleet.credentials().password(user)).await
    }

    /// Nothing of it changed anything: the work runs, and every entry of the log is an event.
    async fn holds(&self) {
        let view = self.fleet.execution(&self.held).await.expect("the work is known");
        assert_eq!(view["state"], "running", "{view}");
        assert_eq!(self.fleet.events_of("system.invalid_entry").await, Vec::<Value>::new());
        self.fleet.status("victim", "connected", SOON).await;
        let page = until("the log", SOON, || self.fleet.log.read_range(0, 1000, &[])).await;
        assert!(!page.more);
        for entry in &page.entries {
            let event: Value = serde_json::from_slice(&entry.bytes).unwrap_or(Value::Null);
            assert_eq!(event["specversion"], "1.0", "{}: {:?}", entry.subject, entry.bytes);
        }
        self.fleet.audit().await;
    }
}

/// Every one of these publications is refused by the server.
async fn may_not_publish(raw: &mut Raw, who: &str, subjects: &[String]) {
    for subject in subjects {
        raw.publish(subject, None, "{}").await;
        let heard = raw.settle().await;
        let refused =
            |h: &Heard| matches!(h, Heard::Refusal(w) if w.contains("Permissions Violation for Publish"));
        assert!(heard.iter().any(refused), "{who} publishes on {subject}: {heard:?}");
    }
}

/// Every one of these subscriptions is refused by the server.
async fn may_not_hear(raw: &mut Raw, who: &str, subjects: &[String]) {
    for subject in subjects {
        raw.subscribe(subject).await;
        let heard = raw.settle().await;
        let refused = |h: &Heard| matches!(h, Heard::Refusal(w) if w.contains("Permissions Violation for Subscription"));
        assert!(heard.iter().any(refused), "{who} hears {subject}: {heard:?}");
    }
}

fn owned(subjects: &[&str]) -> Vec<String> {
    subjects.iter().map(|s| (*s).to_owned()).collect()
}

/// Ways to read a stream, to change it, or to take something out of it.
fn streams() -> Vec<String> {
    let verbs = ["INFO", "MSG.GET", "DELETE", "PURGE", "MSG.DELETE", "UPDATE", "CREATE", "SNAPSHOT"];
    let mut all: Vec<String> =
        verbs.iter().map(|v| format!("$JS.API.STREAM.{v}.ROLLCALL_PAYLOADS")).collect();
    all.extend(verbs.iter().map(|v| format!("$JS.API.STREAM.{v}.ROLLCALL_EVENTS")));
    all.extend(owned(&[
        "$JS.API.INFO",
        "$JS.API.STREAM.NAMES",
        "$JS.API.CONSUMER.CREATE.ROLLCALL_PAYLOADS",
        "$JS.API.CONSUMER.MSG.NEXT.ROLLCALL_REPORTS.dispatcher",
        "$JS.API.DIRECT.GET.ROLLCALL_PAYLOADS",
    ]));
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ordinary_loop_works_with_accounts() {
    let siege = Siege::begin().await;
    let fleet = &siege.fleet;
    let done = fleet.submit(json!({"agent_id": "victim", "input": 7})).await;
    let done = done["execution_id"].as_str().unwrap();
    assert_eq!(fleet.state(done, "completed", SOON).await["attempt"], 1);
    let cancelled =
        fleet.api("cancel", json!({"execution_id": siege.held, "reason": "enough"})).await.unwrap();
    assert!(matches!(cancelled["state"].as_str(), Some("cancelling" | "cancelled")), "{cancelled}");
    fleet.state(&siege.held, "cancelled", SOON).await;
    fleet.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_speaks_and_hears_for_itself_alone() {
    let siege = Siege::begin().await;
    let victim = siege.fleet.api("agent", json!({"agent_id": "victim"})).await.unwrap();
    let instance = victim["instance_id"].as_str().unwrap().to_owned();
    let held = &siege.held;
    let mut mallory = siege.as_user("mallory").await;
    let mut speak = owned(&[
        "rollcall.heartbeat.victim",
        "rollcall.event.agent.victim",
        "rollcall.event.system.dispatcher",
        "rollcall.recovery.orphaned.victim",
        "rollcall.health.connected.victim",
        "_INBOX_victim.x",
        "_INBOX_services.x",
        "_R_.x",
    ]);
    for verb in ["submit", "release", "cancel", "retry", "execution", "drain", "forget", "watchdog.run"] {
        speak.push(format!("rollcall.api.{verb}"));
    }
    for verb in ["dispatch", "terminate", "goodbye", "executions", "ping"] {
        speak.push(format!("rollcall.agent.victim.{instance}.{verb}"));
    }
    speak.push(format!("rollcall.report.victim.{held}"));
    speak.push(format!("rollcall.event.execution.{held}"));
    speak.push(format!("rollcall.payload.{held}.result.1"));
    speak.extend(streams());
    may_not_publish(&mut mallory, "mallory", &speak).await;
    let mut hear = owned(&[
        ">",
        "*.*.*",
        "rollcall.>",
        "rollcall.agent.>",
        "rollcall.agent.victim.>",
        "rollcall.agent.*.*.dispatch",
        "rollcall.payload.>",
        "rollcall.event.>",
        "rollcall.report.>",
        "rollcall.heartbeat.*",
        "rollcall.api.>",
        "_INBOX.>",
        "_INBOX_victim.>",
        "_INBOX_services.>",
        "_R_.>",
        "$JS.>",
        "$SYS.>",
    ]);
    hear.push(format!("rollcall.payload.{held}.input.1"));
    hear.push(format!("rollcall.agent.victim.{instance}.dispatch"));
    may_not_hear(&mut mallory, "mallory", &hear).await;
    // What it may say of somebody else's work on its own subject is refused by the dispatcher, with an alarm.
    let body = json!({"instance_id": instance, "attempt": 1, "outcome": "completed", "result": "stolen"});
    mallory.subscribe("_INBOX_mallory.>").await;
    mallory
        .publish(&format!("rollcall.report.mallory.{held}"), Some("_INBOX_mallory.1"), &body.to_string())
        .await;
    let acknowledged = mallory.hears("_INBOX_mallory.1", SOON).await;
    assert!(acknowledged.contains("ROLLCALL_REPORTS"), "{acknowledged}");
    reports_are_read(&siege.fleet, &format!("rollcall.report.mallory.{held}")).await;
    siege.holds().await;
}

async fn reports_are_read(fleet: &Fleet, subject: &str) {
    let reports = rollcall_nats::Reports::new(&fleet.bus);
    until("the dispatcher to have read the report", SOON, || async {
        match reports.last(subject).await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

/// The server acknowledges a report to whatever reply subject it came with: it must not reach the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_report_whose_acknowledgement_should_land_in_the_log() {
    let siege = Siege::begin().await;
    let mut mallory = siege.as_user("mallory").await;
    let mut submitter = siege.as_user("submitter").await;
    let beat = json!({"instance_id": "m-1", "seq": 1, "state": "ready", "capacity": 1, "executions": []});
    let targets = [
        format!("rollcall.event.execution.{}", siege.held),
        "rollcall.event.execution.new".to_owned(),
        "rollcall.event.agent.victim".to_owned(),
        "rollcall.event.system.dispatcher".to_owned(),
        format!("rollcall.payload.{}.input.1", siege.held),
        "rollcall.report.victim.x".to_owned(),
    ];
    let before = siege.fleet.history(&siege.held).await;
    for (n, target) in targets.iter().enumerate() {
        let report = format!("rollcall.report.mallory.x{n}");
        mallory.publish(&report, Some(target), "{}").await;
        let mut beat = beat.clone();
        beat["seq"] = json!(n + 1);
        mallory.publish("rollcall.heartbeat.mallory", Some(target), &beat.to_string()).await;
        // A submitter's requests are answered by services, who look where an answer is to go.
        for verb in ["submit", "execution", "agent", "watchdog.status"] {
            submitter.publish(&format!("rollcall.api.{verb}"), Some(target), "{}").await;
        }
        let heard = (mallory.settle().await, submitter.settle().await);
        assert_eq!(heard, (Vec::new(), Vec::new()), "all of this may be published");
        reports_are_read(&siege.fleet, &report).await;
    }
    // Each service has answered something since, on the same connection and in order.
    siege.fleet.status("mallory", "connected", SOON).await;
    for verb in ["executions", "agents", "watchdog.status"] {
        siege.fleet.api(verb, json!({})).await.unwrap();
    }
    assert_eq!(siege.fleet.history(&siege.held).await, before);
    assert!(siege.fleet.history("new").await.is_empty());
    siege.holds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submitter_asks_and_does_nothing_else() {
    let siege = Siege::begin().await;
    let mut submitter = siege.as_user("submitter").await;
    submitter.subscribe("_INBOX_submitter.>").await;
    let body = json!({"agent_id": "victim", "input": 5, "execution_id": "theirs"});
    submitter.publish("rollcall.api.submit", Some("_INBOX_submitter.1"), &body.to_string()).await;
    let answer = submitter.hears("_INBOX_submitter.1", SOON).await;
    assert!(answer.contains("theirs"), "{answer}");
    siege.fleet.state("theirs", "completed", SOON).await;
    let mut speak = owned(&[
        "rollcall.heartbeat.victim",
        "rollcall.heartbeat.new",
        "rollcall.event.agent.victim",
        "rollcall.event.execution.x",
        "rollcall.report.victim.x",
        "rollcall.payload.x.input.1",
        "rollcall.agent.victim.i.terminate",
        "rollcall.recovery.orphaned.victim",
        "_INBOX_services.x",
        "_INBOX_dashboard.x",
    ]);
    for verb in ["drain", "undrain", "goodbye", "forget", "watchdog.run"] {
        speak.push(format!("rollcall.api.{verb}"));
    }
    speak.extend(streams());
    may_not_publish(&mut submitter, "submitter", &speak).await;
    let hear = [
        ">",
        "rollcall.>",
        "rollcall.event.>",
        "rollcall.payload.>",
        "rollcall.report.>",
        "rollcall.agent.>",
        "rollcall.api.>",
        "_INBOX.>",
        "_INBOX_services.>",
        "_R_.>",
    ];
    may_not_hear(&mut submitter, "submitter", &owned(&hear)).await;
    siege.holds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dashboard_hears_broadcasts_and_says_nothing() {
    let siege = Siege::begin().await;
    let mut dashboard = siege.as_user("dashboard").await;
    let mut speak = owned(&[
        "rollcall.heartbeat.victim",
        "rollcall.api.execution",
        "rollcall.api.submit",
        "rollcall.event.agent.victim",
        "rollcall.recovery.orphaned.victim",
        "rollcall.health.connected.victim",
        "anything",
    ]);
    speak.extend(streams());
    may_not_publish(&mut dashboard, "a dashboard", &speak).await;
    let hear = [
        "rollcall.event.>",
        "rollcall.payload.>",
        "rollcall.report.>",
        "rollcall.agent.>",
        "_INBOX_services.>",
        ">",
    ];
    may_not_hear(&mut dashboard, "a dashboard", &owned(&hear)).await;
    for broadcasts in ["rollcall.health.>", "rollcall.recovery.>", "rollcall.system.>"] {
        dashboard.subscribe(broadcasts).await;
    }
    assert_eq!(dashboard.settle().await, []);
    siege.fleet.api("drain", json!({"agent_id": "victim", "reason": "x"})).await.unwrap();
    let heard = dashboard.hears("rollcall.health.draining.victim", SOON).await;
    assert!(heard.contains("rollcall.agent.draining"), "{heard}");
    siege.fleet.api("undrain", json!({"agent_id": "victim"})).await.unwrap();
    siege.holds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_take_nothing_out_of_a_stream() {
    let siege = Siege::begin().await;
    let mut services = siege.as_user("services").await;
    let mut speak = Vec::new();
    for stream in ["ROLLCALL_EVENTS", "ROLLCALL_REPORTS", "ROLLCALL_PAYLOADS"] {
        for verb in ["DELETE", "PURGE", "MSG.DELETE", "UPDATE", "RESTORE"] {
            speak.push(format!("$JS.API.STREAM.{verb}.{stream}"));
        }
    }
    may_not_publish(&mut services, "a service", &speak).await;
    siege.holds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_a_password() {
    let options = Options { accounts: Some(vec!["mallory"]), ..Options::default() };
    let fleet = Fleet::start_with(options).await;
    for (user, password) in [("services", "change-me"), ("mallory", ""), ("nobody", "x"), ("", "")] {
        let refused = Raw::refused(fleet.nats.port(), user, password).await;
        assert!(refused.contains("Authorization Violation"), "{user}: {refused}");
    }
    fleet.audit().await;
}

/// The same attack on a server without accounts, as in development: there it succeeds, and does no harm.
#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_that_landed_in_the_log_is_skipped_and_alarmed() {
    let fleet = Fleet::start().await;
    let agent = ScriptedAgent::start(&fleet.bus, "a", 1).await;
    fleet.status("a", "connected", SOON).await;
    let work = fleet.submit(json!({"agent_id": "a"})).await;
    let work = work["execution_id"].as_str().expect("an id").to_owned();
    fleet.state(&work, "running", SOON).await;
    let mut mallory = Raw::connect(fleet.nats.port(), "", "").await;
    let target = format!("rollcall.event.execution.{work}");
    mallory.publish("rollcall.report.mallory.x", Some(&target), "{}").await;
    until("the acknowledgement to be in the log", SOON, || async {
        let history = fleet.history(&work).await;
        if history.iter().any(|e| e["stream"] == "ROLLCALL_REPORTS") { Ok(()) } else { Err(history) }
    })
    .await;
    // It counts as the subject's last entry and as nothing else: the next append finds its place.
    agent.report(&work, 1, "completed", json!({"result": 1})).await;
    fleet.state(&work, "completed", SOON).await;
    let alarm = until("the alarm", SOON, || async {
        fleet.events_of("system.invalid_entry").await.first().cloned().ok_or("nothing yet")
    })
    .await;
    assert!(alarm["data"].to_string().contains(&target), "{alarm}");
    fleet.audit().await;
}
