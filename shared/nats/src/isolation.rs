//! Panics that one request may cause without ending the process.
//!
//! The service's panic hook ends the process, since a dead background task must not go unnoticed. Request handlers
//! are the exception: they run inside [`catch`], and the hook asks [`is_isolated`] before it acts.

use std::any::Any;
use std::cell::Cell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// True while this thread polls a future inside [`catch`].
pub fn is_isolated() -> bool {
    DEPTH.with(|depth| depth.get() > 0)
}

struct Scope;

impl Scope {
    fn enter() -> Self {
        DEPTH.with(|depth| depth.set(depth.get() + 1));
        Self
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        DEPTH.with(|depth| depth.set(depth.get() - 1));
    }
}

/// Runs `future`; a panic inside becomes an error with the panic's message.
pub async fn catch<F: Future>(future: F) -> Result<F::Output, String> {
    let mut future = pin!(future);
    std::future::poll_fn(|cx| {
        let scope = Scope::enter();
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx)));
        drop(scope);
        match polled {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
            Err(panic) => Poll::Ready(Err(message(panic.as_ref()))),
        }
    })
    .await
}

fn message(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        return (*text).to_owned();
    }
    panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "panic without a message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_becomes_its_message_and_the_scope_ends() {
        let caught = catch(async {
            tokio::task::yield_now().await;
            assert!(is_isolated());
            panic!("boom {}", 7)
        })
        .await;
        assert_eq!(caught, Err::<(), _>("boom 7".to_owned()));
        assert!(!is_isolated());
        assert_eq!(catch(async { 3 }).await, Ok(3));
    }
}
