//! The simulator's fleet, with every fault it knows, while the services themselves are killed.

use std::time::Duration;

use e2e::{
    Fleet,
    fleet::{Options, SOON},
    until,
};

/// How long the run may take from its start: half a minute of faults, then what the settings allow for.
const RUN_ENDS_WITHIN: Duration = Duration::from_secs(180);
/// What was dispatched has to outlive its dispatcher: the stories' two seconds are less than one may take to start on two busy
/// cores. The default is a minute.
const GRACE_MS: &str = "10000";
/// Services, in the order in which they are killed.
const KILLED: [&str; 4] = ["health-prober", "dispatcher", "watchdog", "notifier"];

/// Submissions that the log holds.
async fn submitted(fleet: &Fleet) -> Result<usize, String> {
    let page =
        fleet.log.read_range(0, 1000, &["rollcall.event.execution.*"]).await.map_err(|e| e.to_string())?;
    let of_them = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains("rollcall.execution.submitted");
    Ok(page.entries.iter().filter(|entry| of_them(&entry.bytes)).count())
}

/// The simulator knows what it injected, and compares: every fault recovered once for its reason, nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn every_service_is_killed_in_the_middle_of_a_simulated_run() {
    let mut fleet = Fleet::start_with(Options::default().env("ROLLCALL_DISPATCH_GRACE_MS", GRACE_MS)).await;
    let mut run = fleet.program(
        "simulate",
        "rollcall",
        &[
            "simulate",
            "--agents",
            "40",
            "--minutes",
            "0.5",
            "--seed",
            "1",
            "--submit-per-second",
            "3",
            "-o",
            "json",
        ],
    );
    for (killed, service) in KILLED.iter().enumerate() {
        // Each a few seconds of work after the last, so that there is something to lose.
        let enough = 12 * (killed + 1);
        until("the run to be in full swing", SOON, || async {
            match submitted(&fleet).await {
                Ok(count) if count >= enough => Ok(()),
                other => Err(other),
            }
        })
        .await;
        fleet.crash(service).await;
    }
    let status = run.ended(RUN_ENDS_WITHIN).await;
    assert_eq!(status, Some(0), "the simulator found deviations:\n{}", run.output());
    fleet.audit().await;
}
