//! A panic ends the process: a background task that died silently is worse than a restart.

use std::backtrace::Backtrace;
use std::panic::PanicHookInfo;

use crate::exit;

/// Logs every panic and exits, except inside [`rollcall_nats::isolation::catch`], where the catcher answers for it.
pub(crate) fn install() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let message = message(info);
        if rollcall_nats::isolation::is_isolated() {
            tracing::error!(message, place, "panic in a request");
            return;
        }
        tracing::error!(message, place, backtrace = %Backtrace::force_capture(), "panic, the process ends");
        std::process::exit(i32::from(exit::PANIC));
    }));
}

fn message<'a>(info: &'a PanicHookInfo<'_>) -> &'a str {
    info.payload_as_str().unwrap_or("panic without a message")
}
