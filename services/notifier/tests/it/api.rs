//! `/api/*`, the dashboard, and what is refused.

use std::sync::Arc;

use notifier::{
    feed::FeedLimits,
    http,
    shared::{Limits, Shared},
};
use rollcall_core::{Timestamp, agent::Status, subject::Subjects};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{harness::Log, samples};

#[tokio::test]
async fn the_fleet_is_shown_as_the_log_tells_it() {
    let mut log = Log::start().await;
    log.append_all(&[
        samples::registered("a1", "blue"),
        samples::status("a1", Status::Connected, None),
        samples::registered("a2", "red"),
        samples::status("a2", Status::Error, Some(Status::Disconnected)),
        samples::submitted("e1", Some("a1")),
        samples::dispatched("e1", "a1", 1),
        samples::submitted("e2", None),
        samples::submitted("e3", Some("a2")),
        samples::dispatched("e3", "a2", 1),
    ])
    .await;
    let seq = log.append(&samples::recovered("e3", "a2", 1)).await;
    let notifier = log.notifier().await;
    notifier.caught_up(seq).await;

    let summary = notifier.json("/api/summary").await;
    assert_eq!(summary["agents"]["total"], 2);
    assert_eq!(summary["agents"]["by_status"]["error"], 1);
    assert_eq!((&summary["agents"]["capacity"], &summary["agents"]["held"]), (&json!(4), &json!(1)));
    assert_eq!(summary["executions"]["by_state"]["queued"], 1);
    assert_eq!(summary["recoveries"]["by_reason"]["orphaned"], 1);
    assert_eq!(summary["log"]["connected"], true);

    let agents = notifier.json("/api/agents").await;
    assert_eq!(agents["agents"][0]["agent_id"], "a1");
    assert_eq!(agents["agents"][0]["executions"], 1);
    assert_eq!(agents["agents"][0]["last_heartbeat_age_ms"], Value::Null);
    let agent = notifier.json("/api/agents/a2").await;
    assert_eq!((&agent["status"], &agent["failure"]["code"]), (&json!("error"), &json!("unreachable")));

    let ids = |answer: &Value| {
        let rows = answer["executions"].as_array().unwrap().iter();
        rows.map(|row| row["execution_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let all = notifier.json("/api/executions").await;
    assert_eq!((ids(&all), &all["next"]), (vec!["e3".into(), "e2".into(), "e1".into()], &Value::Null));
    assert_eq!(ids(&notifier.json("/api/executions?state=queued,dispatching").await), ["e2", "e1"]);
    assert_eq!(ids(&notifier.json("/api/executions?state=failed").await), ["e3"]);
    assert_eq!(ids(&notifier.json("/api/executions?agent=a2").await), ["e3"]);
    let page = notifier.json("/api/executions?limit=2").await;
    assert_eq!((ids(&page), &page["next"]), (vec!["e3".into(), "e2".into()], &json!("e2")));
    assert_eq!(ids(&notifier.json("/api/executions?limit=2&after=e2").await), ["e1"]);
    notifier.stop().await;
}

#[tokio::test]
async fn an_execution_comes_with_its_whole_history_also_when_memory_has_let_it_go() {
    let mut log = Log::start().await;
    let life = |id: &str| {
        [samples::submitted(id, None), samples::dispatched(id, "a1", 1), samples::recovered(id, "a1", 1)]
    };
    log.append_all(&life("e1")).await;
    log.append_all(&life("e2")).await;
    let limits =
        Limits { ended_kept: 1, feed: FeedLimits { events: 2, bytes: usize::MAX }, ..Limits::default() };
    let notifier = log.notifier_with(limits).await;
    let list = notifier.json("/api/executions").await;
    assert_eq!((list["executions"].as_array().unwrap().len(), &list["forgotten"]), (1, &json!(1)));

    let text = notifier.get("/api/executions/e1").await.text().await.unwrap();
    for (seq, bytes) in &log.entries[..3] {
        let entry = format!("{{\"seq\":{seq},\"event\":{}}}", std::str::from_utf8(bytes).unwrap());
        assert!(text.contains(&entry), "the bytes of the log: {text}");
    }
    let shown: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&shown["state"], shown["history"].as_array().unwrap().len()), (&json!("failed"), 3));

    // What was forgotten comes back into the list when something happens to it.
    let seq = log.append(&samples::retried("e1", 2)).await;
    notifier.caught_up(seq).await;
    let queued = notifier.json("/api/executions?state=queued").await;
    assert_eq!(queued["executions"][0]["execution_id"], "e1");
    assert_eq!(queued["executions"][0]["attempt"], 2);
    assert_eq!(notifier.json("/api/summary").await["executions"]["by_state"]["failed"], 1);
    notifier.stop().await;
}

#[tokio::test]
async fn events_are_paged_from_the_log_and_from_memory() {
    let mut log = Log::start().await;
    for n in 1..=30 {
        let id = format!("e{n}");
        log.append(&samples::submitted(&id, None)).await;
        if n % 10 == 0 {
            log.append(&samples::recovered(&id, "a1", 1)).await;
        }
    }
    let limits = Limits { feed: FeedLimits { events: 5, bytes: usize::MAX }, ..Limits::default() };
    let notifier = log.notifier_with(limits).await;
    let seqs = |answer: &Value| {
        let rows = answer["events"].as_array().unwrap().iter();
        rows.map(|row| row["seq"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    for filter in ["", "&type=execution.recovered", "&type=execution.submitted&execution=e7"] {
        let everything = notifier.json(&format!("/api/events?after=0&limit=1000{filter}")).await;
        let mut after = 0;
        let mut paged = Vec::new();
        loop {
            let page = notifier.json(&format!("/api/events?after={after}&limit=4{filter}")).await;
            assert!(page["events"].as_array().unwrap().len() <= 4);
            paged.extend(seqs(&page));
            after = page["next"].as_u64().unwrap();
            if page["more"] == false {
                break;
            }
        }
        assert_eq!(paged, seqs(&everything), "{filter}");
        assert_eq!(after, 33, "{filter}: everything was looked at");
    }
    let last = notifier.json("/api/events?type=execution.recovered").await;
    assert_eq!(seqs(&last), [11, 22, 33], "recoveries are remembered beyond the ring");
    assert_eq!(seqs(&notifier.json("/api/events?limit=2").await), [32, 33]);
    let event: Value = serde_json::from_slice(&log.entries[32].1).unwrap();
    assert_eq!(last["events"][2]["event"], event);
    notifier.stop().await;
}

#[tokio::test]
async fn what_is_wrong_is_said_in_the_words_of_the_api() {
    let log = Log::start().await;
    let notifier = log.notifier().await;
    for (path, status, code, named) in [
        ("/nothing", 404, "not_found", "/nothing"),
        ("/api", 404, "not_found", "/api"),
        ("/api/agents/a1", 404, "not_found", "a1"),
        ("/api/agents/a.b", 400, "invalid_id", "a.b"),
        ("/api/agents/%ff", 400, "bad_request", "UTF-8"),
        ("/api/executions/e1", 404, "not_found", "e1"),
        ("/api/executions/*", 400, "invalid_id", "execution_id"),
        ("/api/executions?state=lost", 400, "bad_request", "lost"),
        ("/api/executions?limit=0", 400, "bad_request", "limit"),
        ("/api/executions?after=nobody", 404, "not_found", "nobody"),
        ("/api/events?after=x", 400, "bad_request", "after"),
        ("/events?after=1e3", 400, "bad_request", "after"),
        ("/events?type=execution.lost", 400, "bad_request", "execution.lost"),
        ("/events?agent=a%20b", 400, "invalid_id", "agent_id"),
        ("/events?after=1&after=2", 400, "bad_request", "after"),
    ] {
        let response = notifier.get(path).await;
        assert_eq!(response.status(), status, "{path}");
        assert_eq!(response.headers()["content-type"], "application/json", "{path}");
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["error"]["code"], code, "{path}: {body}");
        assert!(body["error"]["message"].as_str().unwrap().contains(named), "{path}: {body}");
    }
    let client = reqwest::Client::new();
    let posted = client.post(notifier.url("/api/agents")).body(vec![b'x'; 1 << 20]).send().await.unwrap();
    assert_eq!(posted.status(), 405);
    assert_eq!(posted.json::<Value>().await.unwrap()["error"]["code"], "bad_request");
    let header = client.get(notifier.url("/events")).header("Last-Event-ID", "abc").send().await.unwrap();
    assert_eq!(header.status(), 400);
    notifier.stop().await;
}

#[tokio::test]
async fn the_dashboard_is_one_page_that_loads_nothing_and_runs_nothing_else() {
    let log = Log::start().await;
    let notifier = log.notifier().await;
    let response = notifier.get("/").await;
    assert_eq!(response.headers()["content-type"], "text/html; charset=utf-8");
    let policy = response.headers()["content-security-policy"].to_str().unwrap().to_owned();
    for part in ["default-src 'none'", "script-src 'sha256-", "style-src 'sha256-", "connect-src 'self'"] {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    assert_eq!(response.headers()["x-content-type-options"], "nosniff");
    assert!(response.text().await.unwrap().contains("<title>Rollcall</title>"));
    let api = notifier.get("/api/summary").await;
    assert_eq!(api.headers()["cache-control"], "no-store");
    assert!(!api.headers().contains_key("access-control-allow-origin"));
    notifier.stop().await;
}

#[tokio::test]
async fn every_documented_path_is_served() {
    let log = Log::start().await;
    let notifier = log.notifier().await;
    let document = notifier.json("/api/openapi.json").await;
    for path in document["paths"].as_object().unwrap().keys() {
        let body = notifier.get(&path.replace("{id}", "x")).await;
        let is_stream = path == "/events";
        let text = if is_stream { String::new() } else { body.text().await.unwrap() };
        assert!(!text.contains("there is nothing at"), "{path}");
    }
    notifier.stop().await;
}

/// The site over a read model that nobody feeds: as if the notifier were far behind the log.
async fn behind(log: &Log, ready: bool) -> (String, CancellationToken) {
    let shutdown = CancellationToken::new();
    let shared = Shared::new(Subjects::default(), log.log.clone(), Limits::default(), shutdown.clone());
    if ready {
        shared.set_ready();
    }
    let listener = http::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(http::serve(Arc::clone(&shared), listener));
    (url, shutdown)
}

#[tokio::test]
async fn not_found_is_only_said_when_the_log_says_so() {
    let mut log = Log::start().await;
    log.append_all(&[samples::registered("a1", "blue"), samples::status("a1", Status::Connected, None)])
        .await;
    log.append(&samples::submitted("e1", None)).await;
    let (url, shutdown) = behind(&log, true).await;
    let agent: Value = reqwest::get(format!("{url}/api/agents/a1")).await.unwrap().json().await.unwrap();
    assert_eq!((&agent["status"], &agent["pool"]), (&json!("connected"), &json!("blue")));
    let execution: Value =
        reqwest::get(format!("{url}/api/executions/e1")).await.unwrap().json().await.unwrap();
    assert_eq!(execution["state"], "queued");
    assert_eq!(Timestamp::parse(execution["submitted_at"].as_str().unwrap()).unwrap(), samples::NOW);
    assert_eq!(reqwest::get(format!("{url}/api/agents/a2")).await.unwrap().status(), 404);
    shutdown.cancel();
}

#[tokio::test]
async fn while_the_log_is_read_the_model_is_not_answered_from_but_streams_are_open() {
    let mut log = Log::start().await;
    log.append(&samples::submitted("e1", None)).await;
    let (url, shutdown) = behind(&log, false).await;
    for path in ["/api/summary", "/api/agents", "/api/executions/e1", "/api/events"] {
        let response = reqwest::get(format!("{url}{path}")).await.unwrap();
        assert_eq!(response.status(), 503, "{path}");
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "not_ready");
    }
    for path in ["/", "/api/openapi.json", "/events"] {
        assert_eq!(reqwest::get(format!("{url}{path}")).await.unwrap().status(), 200, "{path}");
    }
    shutdown.cancel();
}

#[tokio::test]
async fn a_notifier_that_waits_for_its_server_says_so() {
    let mut log = Log::start().await;
    log.append(&samples::submitted("e1", None)).await;
    log.server.stop().unwrap();
    let notifier = log.notifier_unready(Limits::default()).await;
    assert_eq!(notifier.get("/").await.status(), 200);
    for path in ["/api/summary", "/events"] {
        let response = notifier.get(path).await;
        assert_eq!(response.status(), 503, "{path}");
        let body: Value = response.json().await.unwrap();
        assert_eq!(
            (&body["error"]["code"], &body["error"]["message"]),
            (&json!("not_ready"), &json!("waiting for NATS"))
        );
    }
    log.server.start_again().unwrap();
    notifier.ready().await;
    assert_eq!(notifier.json("/api/executions/e1").await["state"], "queued");
    notifier.stop().await;
}
