//! A service that does nothing but wait for its end, or what `ROLLCALL_TEST_PROBE` tells it.

use std::process::ExitCode;
use std::time::Duration;

use rollcall_service::{Program, run_main};

const PROGRAM: Program = Program {
    name: "dispatcher",
    about: "does nothing",
    version: env!("CARGO_PKG_VERSION"),
    conditions: &["replay"],
};

fn main() -> ExitCode {
    run_main(PROGRAM, |context| async move {
        match std::env::var("ROLLCALL_TEST_PROBE").as_deref() {
            Ok("fail") => anyhow::bail!("it did not work"),
            Ok("panic") => {
                tokio::spawn(async { panic!("a task died") });
            }
            Ok("caught") => {
                let caught = rollcall_nats::isolation::catch(async { panic!("one request died") }).await;
                context.readiness.set("replay", caught == Err::<(), _>("one request died".to_owned()));
            }
            Ok("wedged") => {
                context.register_loop("shell", Duration::from_millis(1));
                context.readiness.set("replay", true);
            }
            Ok("hang") => std::future::pending::<()>().await,
            Ok("nats") => {
                let bus = context.connect_bus().await?;
                context.readiness.set("replay", true);
                context.shutdown.cancelled().await;
                bus.drain(Duration::from_secs(2)).await;
            }
            _ => context.readiness.set("replay", true),
        }
        context.shutdown.cancelled().await;
        Ok(())
    })
}
