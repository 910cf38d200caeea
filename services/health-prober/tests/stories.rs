//! The prober against a real NATS: what it writes into the log, answers and asks.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "stories/clock.rs"]
mod clock;
#[path = "stories/file.rs"]
mod file;
#[path = "stories/hearing.rs"]
mod hearing;
#[path = "stories/leaving.rs"]
mod leaving;
#[path = "stories/stage.rs"]
mod stage;

use rollcall_core::agent::Status;
use rollcall_core::wire::{GoodbyeReason, InFlight};
use serde_json::json;
use stage::{Endpoint, Stage, beat};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registered_connected_disconnected_error_in_time() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    let reply = stage.beat("a1", beat("i1", 1)).await;
    assert_eq!(reply["status"], "connected", "{reply}");
    assert_eq!(reply["interval_ms"], 1000);
    assert!(reply["server_time"].is_string());
    let beaten = std::time::Instant::now();
    assert_eq!(stage.types("a1").await, ["agent.registered", "agent.connected"], "answered after the append");
    stage.until("a1", "agent.disconnected").await;
    // The upper bounds are those of the detector's own tests: here others may keep the machine busy.
    let after = beaten.elapsed().as_millis();
    assert!(after >= 1400, "disconnected after {after} ms, at 1.5 intervals");
    let error = stage.until("a1", "agent.error").await;
    let after = beaten.elapsed().as_millis();
    assert!(after >= 3400, "error after {after} ms, at 3.5 intervals");
    assert_eq!(error["data"]["code"], "unreachable");
    assert_eq!(error["data"]["previous"], "disconnected");
    assert_eq!(stage.agent("a1").await["status"], "error");
    assert_eq!(stage.beat("a1", beat("i1", 2)).await["status"], "error", "one success is not enough");
    assert_eq!(stage.beat("a1", beat("i1", 3)).await["status"], "connected");
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_error_and_past_instances_and_condemns_nobody() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    stage.beat("bad", beat("i1", 1)).await;
    stage.beat("old", beat("i1", 1)).await;
    stage.beat("old", beat("i2", 1)).await;
    stage.until("bad", "agent.error").await;
    stage.until("old", "agent.error").await;
    let well = stage.beat("well", beat("i1", 1)).await;
    assert_eq!(well["status"], "connected");
    prober.stop().await;

    let prober = stage.prober().await;
    assert_eq!(stage.agent("bad").await["status"], "error");
    assert_eq!(stage.agent("well").await["status"], "connected");
    let old = stage.beat("old", beat("i1", 99)).await;
    assert_eq!(old["status"], "superseded", "{old}");
    assert_eq!(old["goodbye"]["reason"], "superseded");
    assert_eq!(stage.beat("well", beat("i1", 2)).await["status"], "connected");
    assert_eq!(stage.types("well").await, ["agent.registered", "agent.connected"]);
    assert_eq!(stage.beat("bad", beat("i1", 2)).await["status"], "error");
    assert_eq!(stage.beat("bad", beat("i1", 3)).await["status"], "connected");
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_instance_supersedes_and_the_old_one_is_told() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    let mut goodbyes = stage.goodbyes("a1", "i1").await;
    stage.beat("a1", beat("i1", 1)).await;
    assert_eq!(stage.beat("a1", beat("i2", 1)).await["status"], "connected");
    assert_eq!(
        stage.types("a1").await,
        ["agent.registered", "agent.connected", "agent.superseded", "agent.registered", "agent.connected"]
    );
    assert_eq!(goodbyes.next().await.reason, GoodbyeReason::Superseded);
    // It goes on beating, without asking for an answer: told again, and it changes nothing.
    stage.publish_beat("a1", beat("i1", 2)).await;
    assert_eq!(goodbyes.next().await.reason, GoodbyeReason::Superseded);
    assert_eq!(stage.agent("a1").await["instance_id"], "i2");
    assert_eq!(stage.types("a1").await.len(), 5);
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gone_is_answered_after_it_is_in_the_log() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    stage.beat("a1", beat("i1", 1)).await;
    let mut last = beat("i1", 2);
    last["state"] = json!("gone");
    last["reason"] = json!("sigterm");
    assert_eq!(stage.beat("a1", last.clone()).await["status"], "gone");
    assert_eq!(stage.types("a1").await.last().unwrap(), "agent.gone");
    assert_eq!(stage.beat("a1", last).await["status"], "gone", "asked again, answered again");
    assert_eq!(stage.beat("a1", beat("i1", 3)).await["status"], "gone", "nothing after it counts");
    assert_eq!(stage.types("a1").await.len(), 3);
    assert_eq!(stage.beat("a1", beat("i2", 1)).await["status"], "connected");
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_undrain_goodbye_and_forget() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    for verb in ["agent", "drain", "undrain", "goodbye", "forget"] {
        let answer = stage.api(verb, json!({ "agent_id": "nobody" })).await;
        assert_eq!(answer["error"]["code"], "unknown_agent", "{verb}: {answer}");
        let answer = stage.api(verb, json!({ "agent_id": "a.b" })).await;
        assert_eq!(answer["error"]["code"], "invalid_id", "{verb}: {answer}");
        let answer = stage.api(verb, json!(["x"])).await;
        assert_eq!(answer["error"]["code"], "bad_request", "{verb}: {answer}");
    }
    let keep = stage.keep_beating("a1", "i1");
    stage.until("a1", "agent.connected").await;
    let view = stage.api("drain", json!({ "agent_id": "a1", "reason": "maintenance" })).await;
    assert_eq!(
        (view["status"].as_str(), view["draining"]["by"].as_str()),
        (Some("draining"), Some("operator"))
    );
    let view = stage.api("undrain", json!({ "agent_id": "a1" })).await;
    assert_eq!(view["status"], "connected");
    assert!(view.get("draining").is_none());

    // Nobody listens for a goodbye yet: said so, and repeated in the answer to its heartbeat.
    let answer = stage.api("goodbye", json!({ "agent_id": "a1" })).await;
    assert_eq!(
        (answer["sent"].as_bool(), answer["answered"].as_bool()),
        (Some(true), Some(false)),
        "{answer}"
    );
    let reply = stage.beat("a1", beat("i1", 1_000_000)).await;
    assert_eq!(reply["goodbye"]["reason"], "operator");
    let mut goodbyes = stage.goodbyes("a1", "i1").await;
    let asked = json!({ "agent_id": "a1", "deadline_ms": 7, "in_flight": "abort" });
    assert_eq!(stage.api("goodbye", asked).await["answered"], true);
    let heard = goodbyes.next().await;
    assert_eq!(
        (heard.reason, heard.deadline_ms, heard.in_flight),
        (GoodbyeReason::Operator, 7, InFlight::Abort)
    );
    let reply = stage.beat_until("a1", "i1", 2_000_000, |reply| reply.get("goodbye").is_none()).await;
    assert_eq!(reply["status"], "connected");

    // At the deadline of a drain its instance is told to hand back what it has.
    let view = stage.api("drain", json!({ "agent_id": "a1", "deadline_ms": 300 })).await;
    assert!(view["draining"]["deadline"].is_string());
    let heard = goodbyes.next().await;
    assert_eq!((heard.reason, heard.in_flight), (GoodbyeReason::Drain, InFlight::Return));

    drop(keep);
    let view = stage.api("forget", json!({ "agent_id": "a1" })).await;
    assert_eq!((view["status"].as_str(), view["reason"].as_str()), (Some("gone"), Some("forgotten")));
    let answer = stage.api("drain", json!({ "agent_id": "a1" })).await;
    assert_eq!(answer["error"]["code"], "conflict");
    let listed = stage.api("agents", json!({ "status": "gone" })).await;
    assert_eq!(listed["agents"][0]["agent_id"], "a1");
    assert!(listed["next"].is_null());
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_deadline_survives_a_restart() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    stage.beat("a1", beat("i1", 1)).await;
    stage.api("drain", json!({ "agent_id": "a1", "deadline_ms": 1500 })).await;
    prober.stop().await;
    let mut goodbyes = stage.goodbyes("a1", "i1").await;
    let prober = stage.prober().await;
    assert_eq!(goodbyes.next().await.reason, GoodbyeReason::Drain);
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_probers_write_one_log() {
    let stage = Stage::open().await;
    let (first, second) = (stage.prober().await, stage.prober().await);
    let names: Vec<String> = (0..20).map(|n| format!("a{n}")).collect();
    for name in &names {
        stage.publish_beat(name, beat("i1", 1)).await;
    }
    for name in &names {
        stage.until(name, "agent.error").await;
    }
    // And go on: to look at all of them may take longer than they may be silent.
    let keep: Vec<_> = names.iter().map(|name| stage.keep_beating(name, "i1")).collect();
    for name in &names {
        stage.until_status(name, Status::Connected).await;
        let types = stage.types(name).await;
        let wanted =
            ["agent.registered", "agent.connected", "agent.disconnected", "agent.error", "agent.connected"];
        assert_eq!(types, wanted, "{name}");
    }
    drop(keep);
    first.stop().await;
    second.stop().await;
}

/// An agent without subscriptions hears it from whichever prober answers its heartbeat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goodbye_is_in_the_answers_of_every_prober() {
    let stage = Stage::open().await;
    let (first, second) = (stage.prober().await, stage.prober().await);
    assert_eq!(stage.beat("a1", beat("i1", 1)).await["status"], "connected");
    stage.until_status("a1", Status::Connected).await;
    let said = stage.api("goodbye", json!({ "agent_id": "a1", "deadline_ms": 7000 })).await;
    assert_eq!(said["answered"], false, "{said}");
    // Each answers, and an agent hears the quickest. Once both know they do not forget it.
    let begun = std::time::Instant::now();
    let both_say_it = async |seq| {
        let replies = stage.all_replies("a1", seq, 2).await;
        replies.iter().all(|reply| reply["goodbye"]["deadline_ms"] == 7000)
    };
    let mut seq = 2;
    while !both_say_it(seq).await {
        assert!(begun.elapsed() < stage::DEADLINE, "one of them does not know");
        seq += 1;
    }
    for later in 1..=5 {
        assert!(both_say_it(seq + later).await);
    }
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_heartbeats_are_answered_and_change_nothing() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    for (body, code) in [
        ("", "bad_request"),
        ("{}", "bad_request"),
        ("\u{0}\u{1b}[31m", "bad_request"),
        (r#"{"instance_id":"i.1","seq":1,"state":"ready","capacity":1,"executions":[]}"#, "invalid_id"),
        (r#"{"instance_id":"i","seq":1,"state":"ready","capacity":9999,"executions":[]}"#, "bad_request"),
        (
            r#"{"agent_id":"a2","instance_id":"i","seq":1,"state":"ready","capacity":1,"executions":[]}"#,
            "bad_request",
        ),
        (&" ".repeat(70_000), "too_large"),
    ] {
        let reply = stage.beat_raw("a1", body.as_bytes().to_vec()).await;
        assert_eq!(reply["error"]["code"], code, "{:.40}: {reply}", body);
    }
    assert!(stage.types("a1").await.is_empty());
    let answer = stage.api("agent", json!({ "agent_id": "a1" })).await;
    assert_eq!(answer["error"]["code"], "unknown_agent");
    assert_eq!(stage.beat("a1", beat("i1", 1)).await["status"], "connected", "and it goes on");
    // A reply subject inside the log is never published on.
    let before = stage.log.last_seq().await.unwrap();
    stage.publish_with_reply("a1", beat("i1", 2), "rollcall.event.agent.a1").await;
    assert_eq!(stage.beat("a1", beat("i1", 3)).await["status"], "connected");
    assert_eq!(stage.log.last_seq().await.unwrap(), before);
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_process_is_known_by_its_ping_before_the_failure_falls() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    let mut answering = stage.answer_pings("a1", "i1").await;
    let keep = stage.keep_beating("a1", "i1");
    stage.until("a1", "agent.connected").await;
    answering.asked().await;
    // Killed: it beats no more and nobody listens.
    drop(keep);
    answering.stop().await;
    let event = stage.until("a1", "agent.disconnected").await;
    assert_eq!(event["data"]["reason"], "no_responders", "{event}");
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_agent_that_answers_is_degraded_and_an_unheard_one_is_not_pinged_to_death() {
    let stage = Stage::open().await;
    let prober = stage.prober().await;
    let answering = stage.answer_pings("slow", "i1").await;
    stage.beat("slow", beat("i1", 1)).await;
    let event = stage.until("slow", "agent.degraded").await;
    assert_eq!(event["data"]["reason"], "heartbeat_late");
    stage.beat("slow", beat("i1", 2)).await;
    stage.beat("slow", beat("i1", 3)).await;
    stage.until_status("slow", Status::Connected).await;
    assert!(!stage.types("slow").await.contains(&"agent.disconnected".to_owned()));
    let event = stage.until("slow", "agent.error").await;
    assert_eq!(event["data"]["code"], "protocol", "it answers, and does not beat: {event}");
    stage.until_view("slow", |view| view["failures_in_a_row"].as_u64() >= Some(5)).await;
    let errors = stage.types("slow").await.iter().filter(|kind| *kind == "agent.error").count();
    assert_eq!(errors, 1, "nobody asks it any more, and what it answered holds");
    // One that never answered a ping is not condemned by having no responders.
    stage.beat("deaf", beat("i1", 1)).await;
    let event = stage.until("deaf", "agent.disconnected").await;
    assert_eq!(event["data"]["reason"], "missed_heartbeat");
    answering.stop().await;
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_bus_condemns_nobody() {
    let mut stage = Stage::open().await;
    let prober = stage.prober().await;
    stage.beat("a1", beat("i1", 1)).await;
    stage.server.stop().unwrap();
    // Longer than any threshold; what is under test is that this time counts for nothing.
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    stage.server.start_again().unwrap();
    stage.bus.connected().await;
    let reply = stage.beat_until("a1", "i1", 2, |reply| reply["status"].is_string()).await;
    assert_eq!(reply["status"], "connected");
    assert_eq!(stage.types("a1").await, ["agent.registered", "agent.connected"]);
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_degrades_and_both_channels_together_are_silence() {
    let stage = Stage::open().await;
    let endpoint = Endpoint::start().await;
    let settings = [
        ("ROLLCALL_ALLOW_CIDRS", "127.0.0.0/8"),
        ("ROLLCALL_PROBE_INTERVAL_MS", "1000"),
        ("ROLLCALL_PROBE_TIMEOUT_MS", "500"),
    ];
    let prober = stage.prober_with(&settings).await;
    let probe = json!({ "probe": { "kind": "http", "url": endpoint.url() } });
    let keep = stage.keep_beating_with("a1", "i1", probe.clone());
    stage.until_view("a1", |view| view["probe"]["last_result"] == "ok").await;
    assert_eq!(stage.agent("a1").await["status"], "connected");
    endpoint.answer("500 Internal Server Error");
    let event = stage.until("a1", "agent.degraded").await;
    assert_eq!(event["data"]["reason"], "probe_bad");
    let types = stage.types("a1").await;
    assert_eq!(types, ["agent.registered", "agent.connected", "agent.degraded"], "and it stays so");
    assert!(event["data"]["evidence"]["probe"]["result"].as_str().unwrap().starts_with("status: "));
    endpoint.answer("200 OK");
    stage.until_status("a1", Status::Connected).await;
    endpoint.answer("401 Unauthorized");
    stage.until_status("a1", Status::Degraded).await;
    let view = stage
        .until_view("a1", |v| v["probe"]["last_result"].as_str().is_some_and(|r| r.starts_with("auth")))
        .await;
    assert_eq!(view["status"], "degraded");
    drop(keep);
    let event = stage.until("a1", "agent.error").await;
    assert_eq!(event["data"]["code"], "auth", "it is there, and refuses us: {event}");
    let types = stage.types("a1").await;
    assert_eq!(types[3..], ["agent.connected", "agent.degraded", "agent.disconnected", "agent.error"]);
    prober.stop().await;
}

/// What a `nats` probe says of an agent whose heartbeats come every quarter of a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_who_answers_the_ping_is_a_failure_of_who_answered_before_and_not_around_a_reconnect() {
    let mut stage = Stage::open().await;
    let settings = [("ROLLCALL_PROBE_INTERVAL_MS", "1000"), ("ROLLCALL_PROBE_TIMEOUT_MS", "500")];
    let prober = stage.prober_with(&settings).await;
    // `calm` has an interval that does not end while this runs.
    let (probe, calm) = (
        json!({ "probe": { "kind": "nats", "url": "" } }),
        json!({ "probe": { "kind": "nats", "url": "" }, "interval_ms": 60000 }),
    );
    let calm_listens = stage.answer_pings("calm", "i1").await;
    let brisk_listens = stage.answer_pings("brisk", "i1").await;
    let _beats = (
        stage.keep_beating_with("deaf", "i1", probe.clone()),
        stage.keep_beating_with("calm", "i1", calm),
        stage.keep_beating_with("brisk", "i1", probe),
    );
    for agent in ["calm", "brisk"] {
        stage.until_view(agent, |view| view["probe"]["last_result"] == "ok").await;
    }
    let says = |view: &serde_json::Value, what: &str| {
        view["probe"]["last_result"].as_str().is_some_and(|result| result.starts_with(what))
    };
    stage.until_view("deaf", |view| says(view, "void: no_responders: it never answered")).await;
    // NATS restarts; the prober is back before an agent that is slow to come back.
    calm_listens.stop().await;
    stage.server.restart().unwrap();
    stage.until_agents(|answer| answer["sight"]["since"].is_string()).await;
    stage.until_view("calm", |view| says(view, "void: no_responders: nobody")).await;
    // Who beats on and does not listen any more is not well.
    stage.until_view("brisk", |view| view["probe"]["last_result"] == "ok").await;
    brisk_listens.stop().await;
    stage.until_view("brisk", |view| view["status"] == "degraded" && says(view, "no_responders")).await;
    for agent in ["deaf", "calm"] {
        assert_eq!(stage.types(agent).await, ["agent.registered", "agent.connected"], "{agent}");
    }
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_down_on_every_channel_is_not_probed_again_for_every_heartbeat_that_it_misses() {
    let stage = Stage::open().await;
    let endpoint = Endpoint::start().await;
    endpoint.answer("500 Internal Server Error");
    // No probe is due by itself while this runs, not even of what has just failed.
    let settings = [
        ("ROLLCALL_ALLOW_CIDRS", "127.0.0.0/8"),
        ("ROLLCALL_PROBE_INTERVAL_MS", "60000"),
        ("ROLLCALL_PROBE_TIMEOUT_MS", "500"),
        ("ROLLCALL_FORGET_AFTER_MS", "10000"),
    ];
    let prober = stage.prober_with(&settings).await;
    let mut only = beat("i1", 1);
    only["probe"] = json!({ "kind": "http", "url": endpoint.url() });
    stage.beat("a1", only).await;
    stage.until("a1", "agent.error").await;
    let down = endpoint.connections();
    assert!((2..=6).contains(&down), "by itself, and because heartbeats did not come: {down} times");
    stage.until("a1", "agent.gone").await;
    // The error itself may have led to one more.
    let more = endpoint.connections() - down;
    assert!(more <= 1, "probed {more} times while it was down");
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agents_url_does_not_lead_inside_unless_allowed() {
    let stage = Stage::open().await;
    let endpoint = Endpoint::start().await;
    let prober = stage
        .prober_with(&[("ROLLCALL_PROBE_INTERVAL_MS", "1000"), ("ROLLCALL_PROBE_TIMEOUT_MS", "500")])
        .await;
    let probe = json!({ "probe": { "kind": "http", "url": endpoint.url() } });
    let keep = stage.keep_beating_with("a1", "i1", probe);
    let view = stage
        .until_view("a1", |view| {
            view["probe"]["last_result"].as_str().is_some_and(|r| r.starts_with("refused: "))
        })
        .await;
    assert_eq!(view["status"], "connected", "what is not probed is not held against it");
    assert_eq!(endpoint.connections(), 0);
    drop(keep);
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_of_the_file_are_probed_and_the_file_is_read_again() {
    let stage = Stage::open().await;
    let endpoint = Endpoint::start().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agents.toml");
    let row = |id: &str, capacity: u32| {
        format!(
            "[[agents]]\nagent_id = \"{id}\"\ncapacity = {capacity}\ncontrol = {{ kind = \"http\", url = \"{}\" }}\n",
            endpoint.url()
        )
    };
    std::fs::write(&path, row("f1", 1)).unwrap();
    let settings = [
        ("ROLLCALL_AGENTS_FILE", path.to_str().unwrap()),
        ("ROLLCALL_PROBE_INTERVAL_MS", "1000"),
        ("ROLLCALL_PROBE_TIMEOUT_MS", "500"),
    ];
    let prober = stage.prober_with(&settings).await;
    stage.until("f1", "agent.connected").await;
    assert_eq!(stage.types("f1").await, ["agent.registered", "agent.connected"]);
    let registered = &stage.events("f1").await[0]["data"];
    assert_eq!(registered["control"]["url"], endpoint.url());
    let instance = registered["instance_id"].as_str().unwrap().to_owned();

    // A file with a mistake changes nothing; a changed one does.
    std::fs::write(&path, format!("{}nonsense", row("f1", 1))).unwrap();
    std::fs::write(&path, format!("{}\n{}", row("f1", 3), row("f2", 1))).unwrap();
    stage.until("f1", "agent.updated").await;
    stage.until("f2", "agent.connected").await;
    assert_eq!(stage.agent("f1").await["capacity"], 3);

    endpoint.answer("503 Service Unavailable");
    stage.until("f1", "agent.disconnected").await;
    let event = stage.until("f1", "agent.error").await;
    assert_eq!(event["data"]["code"], "unreachable");
    prober.stop().await;

    // The instance survives a restart, and so does error.
    let prober = stage.prober_with(&settings).await;
    let view = stage.agent("f1").await;
    assert_eq!(
        (view["status"].as_str(), view["instance_id"].as_str()),
        (Some("error"), Some(instance.as_str()))
    );
    endpoint.answer("200 OK");
    stage.until_status("f1", Status::Connected).await;
    std::fs::write(&path, row("f2", 1)).unwrap();
    let event = stage.until("f1", "agent.gone").await;
    assert_eq!(event["data"]["reason"], "removed from the agents file");
    std::fs::write(&path, format!("{}\n{}", row("f2", 1), row("f1", 1))).unwrap();
    stage.until_status("f1", Status::Connected).await;
    assert_ne!(
        stage.agent("f1").await["instance_id"].as_str(),
        Some(instance.as_str()),
        "only as a new instance"
    );
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losing_work_again_and_again_quarantines_and_undrain_lifts_it() {
    let stage = Stage::open().await;
    stage.lose("a1", 1, "orphaned").await;
    let prober = stage.prober().await;
    let keep = stage.keep_beating("a1", "i1");
    stage.until("a1", "agent.connected").await;
    for n in 2..7 {
        stage.lose("a1", n, "timed_out").await;
    }
    for n in 7..9 {
        stage.lose("a1", n, "stalled").await;
    }
    // All that the crash of its predecessor took is one loss.
    for n in 20..26 {
        stage.lose_of("a1", "i0", n, "agent_restarted").await;
    }
    assert!(stage.agent("a1").await.get("quarantined").is_none());
    // One of the five was before this prober started.
    stage.lose("a1", 10, "orphaned").await;
    let event = stage.until("a1", "agent.quarantined").await;
    assert_eq!(event["data"]["count"], 5);
    let view = stage.api("undrain", json!({ "agent_id": "a1", "reason": "fixed" })).await;
    assert!(view.get("quarantined").is_none(), "{view}");
    assert_eq!(stage.until("a1", "agent.released").await["data"]["by"], "operator");
    drop(keep);
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_whose_work_stands_still_is_told_goodbye() {
    let stage = Stage::open().await;
    let prober = stage.prober_with(&[("ROLLCALL_ACTIVITY_TIMEOUT_MS", "1500")]).await;
    let mut goodbyes = stage.goodbyes("a1", "i1").await;
    let stuck = json!({ "executions": [{ "id": "e1", "attempt": 1, "progress": 3 }] });
    let keep = stage.keep_beating_with("a1", "i1", stuck);
    let idle = stage.keep_beating("idle", "i1");
    assert_eq!(goodbyes.next().await.reason, GoodbyeReason::ActivityTimeout);
    let reply = stage.beat("idle", beat("i1", 1_000_000)).await;
    assert!(reply.get("goodbye").is_none(), "nothing to do is no standstill");
    drop((keep, idle));
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_log_does_not_take_is_kept_and_tried_again() {
    let mut stage = Stage::open().await;
    let prober = stage.prober().await;
    stage.beat("a1", beat("i1", 1)).await;
    stage.server.stop().unwrap();
    stage.server.start_again().unwrap();
    stage.bus.connected().await;
    // Whatever the state of the log just after its restart: the event is in it in the end, once.
    let reply = stage.beat_until("a2", "i1", 1, |reply| reply["status"] == "connected").await;
    assert!(reply["server_time"].is_string());
    assert_eq!(stage.types("a2").await, ["agent.registered", "agent.connected"]);
    prober.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_gone_is_probed_no_more() {
    let stage = Stage::open().await;
    let (left, stays) = (Endpoint::start().await, Endpoint::start().await);
    let settings = [
        ("ROLLCALL_ALLOW_CIDRS", "127.0.0.0/8"),
        ("ROLLCALL_PROBE_INTERVAL_MS", "1000"),
        ("ROLLCALL_PROBE_TIMEOUT_MS", "500"),
    ];
    let prober = stage.prober_with(&settings).await;
    let probe = |endpoint: &Endpoint| json!({ "probe": { "kind": "http", "url": endpoint.url() } });
    let keep = (
        stage.keep_beating_with("left", "i1", probe(&left)),
        stage.keep_beating_with("stays", "i1", probe(&stays)),
    );
    for agent in ["left", "stays"] {
        stage.until_view(agent, |view| view["probe"]["last_result"] == "ok").await;
    }
    drop(keep.0);
    let mut last = beat("i1", 1_000_000);
    last["state"] = json!("gone");
    assert_eq!(stage.beat("left", last).await["status"], "gone");
    // One may have been under way.
    let (before, others) = (left.requests() + 1, stays.requests());
    stage.until_view("stays", |_| stays.requests() >= others + 4).await;
    assert!(left.requests() <= before, "{} probes, {before} before it went", left.requests());
    prober.stop().await;
}
