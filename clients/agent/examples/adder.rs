//! An agent in a few lines: adds up the numbers it is given. `cargo run -p rollcall-agent --example adder -- adder-1`

use rollcall_agent::{Agent, BusOptions, Execution, Finish, worker_fn};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let id = std::env::args().nth(1).unwrap_or_else(|| "adder-1".to_owned());
    let url = std::env::var("ROLLCALL_NATS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".to_owned());
    let worker = worker_fn(|execution: Execution| async move {
        match execution.input::<Vec<f64>>() {
            Ok(numbers) => Finish::completed(&numbers.iter().sum::<f64>()),
            Err(error) => Finish::failed("bad_input", error.to_string()),
        }
    });
    let agent = Agent::builder(id).capacity(4).build(worker)?;
    let exit = agent.start(BusOptions { url, ..BusOptions::default() }).await?;
    // 75 asks the supervisor for a new start, 0 does not.
    std::process::exit(i32::from(exit.status));
}
