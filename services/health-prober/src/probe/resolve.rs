//! Names become addresses. A name server that does not answer holds a thread of the runtime for many seconds, and nothing
//! ends it: so each name is asked for once at a time, and those that hung the last time can't take all the threads there
//! are.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::Semaphore;

/// Names asked for at once: well below the 512 threads that the runtime has for what blocks.
const RESOLUTIONS_MAX: usize = 128;
/// Of these, names that hung the last time.
const HUNG_MAX: usize = RESOLUTIONS_MAX / 2;
/// A name that took this long hung. Servers that are well answer within milliseconds; clients ask again after seconds.
const HUNG_AFTER: Duration = Duration::from_secs(1);
/// Names that are remembered for having hung; when full, all are forgotten.
const REMEMBERED_MAX: usize = 10_000;

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The name servers say so, or could not be asked.
    #[error("{0}")]
    Failed(String),
    /// We could not ask.
    #[error("could not be asked for: {0}")]
    Ours(String),
    /// Too many names are being asked for: our own limit.
    #[error("too many names are being asked for")]
    Busy,
}

/// How names become addresses.
pub trait Resolve: Send + Sync {
    /// All addresses of a name, with this port.
    fn resolve<'a>(
        &'a self,
        host: &'a str,
        port: u16,
    ) -> BoxFuture<'a, Result<Vec<SocketAddr>, ResolveError>>;
}

/// Asks for the addresses of one name, and may take its time.
type Lookup = dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> + Send + Sync;
type Answer = Result<Arc<[SocketAddr]>, ResolveError>;

/// The machine's own resolver.
pub struct SystemResolver {
    lookup: Arc<Lookup>,
    hung_after: Duration,
    permits: Arc<Semaphore>,
    /// What hung the last time needs one of these as well.
    hung_permits: Arc<Semaphore>,
    names: Arc<Mutex<Names>>,
}

/// What is known of names.
#[derive(Default)]
struct Names {
    /// Being asked for.
    asked: HashMap<String, Shared<BoxFuture<'static, Answer>>>,
    /// Hung the last time.
    hung: HashSet<String>,
}

impl Names {
    fn answered(&mut self, name: &str, hung: bool) {
        self.asked.remove(name);
        if self.hung.len() >= REMEMBERED_MAX {
            self.hung.clear();
        }
        if hung {
            self.hung.insert(name.to_owned());
        } else {
            self.hung.remove(name);
        }
    }
}

impl std::fmt::Debug for SystemResolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SystemResolver").finish_non_exhaustive()
    }
}

impl Default for SystemResolver {
    fn default() -> Self {
        let lookup: Arc<Lookup> =
            Arc::new(|host| Box::pin(async move { rollcall_control::resolve(&host, 0).await }));
        Self::asking(lookup, HUNG_AFTER)
    }
}

impl SystemResolver {
    fn asking(lookup: Arc<Lookup>, hung_after: Duration) -> Self {
        Self {
            lookup,
            hung_after,
            permits: Arc::new(Semaphore::new(RESOLUTIONS_MAX)),
            hung_permits: Arc::new(Semaphore::new(HUNG_MAX)),
            names: Arc::default(),
        }
    }

    /// Whoever asks for a name that is being asked for gets the same answer.
    fn ask(&self, host: &str) -> Shared<BoxFuture<'static, Answer>> {
        let mut names = lock(&self.names);
        if let Some(pending) = names.asked.get(host) {
            return pending.clone();
        }
        let hung = names.hung.contains(host).then(|| Arc::clone(&self.hung_permits).try_acquire_owned());
        let permits = (hung.transpose(), Arc::clone(&self.permits).try_acquire_owned());
        let (Ok(hung), Ok(any)) = permits else {
            return std::future::ready(Err(ResolveError::Busy)).boxed().shared();
        };
        let (name, all, hung_after) = (host.to_owned(), Arc::clone(&self.names), self.hung_after);
        let looking = (self.lookup)(name.clone());
        // A task of its own: it goes on when nobody waits any more, as the thread behind it does, and so do its permits.
        let task = tokio::spawn(async move {
            let started = Instant::now();
            let found = looking.await;
            lock(&all).answered(&name, started.elapsed() >= hung_after);
            drop((hung, any));
            found.map(Arc::from).map_err(|error| why(&error))
        });
        let pending = task
            .map(|ended| ended.unwrap_or_else(|error| Err(ResolveError::Failed(error.to_string()))))
            .boxed()
            .shared();
        names.asked.insert(host.to_owned(), pending.clone());
        pending
    }
}

fn why(error: &io::Error) -> ResolveError {
    let words = error.to_string();
    if rollcall_control::is_ours(error) { ResolveError::Ours(words) } else { ResolveError::Failed(words) }
}

fn lock(names: &Mutex<Names>) -> MutexGuard<'_, Names> {
    names.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Resolve for SystemResolver {
    fn resolve<'a>(
        &'a self,
        host: &'a str,
        port: u16,
    ) -> BoxFuture<'a, Result<Vec<SocketAddr>, ResolveError>> {
        Box::pin(async move {
            let found = self.ask(host).await?;
            Ok(found.iter().map(|address| SocketAddr::new(address.ip(), port)).collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Notify;

    use super::*;

    /// Names that begin with `hang` are not answered before `released`, `no` has no address, any other one is here.
    struct Servers {
        resolver: SystemResolver,
        asked: Arc<AtomicUsize>,
        released: Arc<Notify>,
    }

    impl Servers {
        fn new() -> Self {
            let (asked, released) = (Arc::<AtomicUsize>::default(), Arc::<Notify>::default());
            let (count, release) = (Arc::clone(&asked), Arc::clone(&released));
            let lookup: Arc<Lookup> = Arc::new(move |host| {
                count.fetch_add(1, Ordering::SeqCst);
                let release = Arc::clone(&release);
                Box::pin(async move {
                    match host.as_str() {
                        hanging if hanging.starts_with("hang") => release.notified().await,
                        "no" => return Err(io::Error::other("no such name")),
                        // EMFILE: no file handle left to ask with.
                        "handleless" => return Err(io::Error::from_raw_os_error(24)),
                        _ => {}
                    }
                    Ok(vec!["127.0.0.1:0".parse().unwrap()])
                })
            });
            Self { resolver: SystemResolver::asking(lookup, Duration::from_millis(1)), asked, released }
        }

        async fn ask(&self, host: &str) -> Result<Vec<SocketAddr>, ResolveError> {
            let answer = tokio::time::timeout(Duration::from_secs(10), self.resolver.resolve(host, 80));
            answer.await.expect("an answer")
        }

        /// As a probe does that runs out of time.
        async fn give_up_on(&self, host: &str) {
            let soon = Duration::from_millis(2);
            assert!(tokio::time::timeout(soon, self.resolver.resolve(host, 80)).await.is_err(), "{host}");
        }

        /// Every question that is open is answered.
        async fn release(&self) {
            let all = async {
                while !lock(&self.resolver.names).asked.is_empty() {
                    self.released.notify_waiters();
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), all).await.expect("all are answered");
        }
    }

    #[tokio::test]
    async fn a_name_is_asked_for_once_at_a_time_and_again_afterwards() {
        let servers = Servers::new();
        servers.give_up_on("hang").await;
        servers.give_up_on("hang").await;
        assert_eq!(servers.asked.load(Ordering::SeqCst), 1, "the first question is still open");
        let both = futures_util::future::join(
            servers.resolver.resolve("hang", 80),
            servers.resolver.resolve("hang", 443),
        );
        servers.released.notify_one();
        let (web, secure) = both.await;
        assert_eq!(web.unwrap(), ["127.0.0.1:80".parse().unwrap()]);
        assert_eq!(secure.unwrap(), ["127.0.0.1:443".parse().unwrap()]);
        assert_eq!(servers.asked.load(Ordering::SeqCst), 1);
        let failed = servers.ask("no").await.unwrap_err();
        assert_eq!(failed, ResolveError::Failed("no such name".to_owned()));
        assert_eq!(servers.ask("no").await.unwrap_err(), failed);
        assert_eq!(servers.asked.load(Ordering::SeqCst), 3, "nothing is remembered");
        let ours = servers.ask("handleless").await;
        assert!(matches!(ours, Err(ResolveError::Ours(_))), "{ours:?}");
    }

    #[tokio::test]
    async fn a_name_that_hangs_holds_its_thread_also_when_nobody_waits_and_there_is_a_bound() {
        let servers = Servers::new();
        for index in 0..RESOLUTIONS_MAX - 1 {
            servers.give_up_on(&format!("hang{index}")).await;
        }
        assert!(servers.ask("well").await.is_ok(), "others find a thread");
        servers.give_up_on("hang-last").await;
        assert_eq!(servers.ask("well").await, Err(ResolveError::Busy));
        servers.release().await;
        assert!(servers.ask("well").await.is_ok());
    }

    #[tokio::test]
    async fn names_that_hung_the_last_time_leave_threads_to_the_others() {
        let servers = Servers::new();
        for index in 0..RESOLUTIONS_MAX {
            servers.give_up_on(&format!("hang{index}")).await;
        }
        servers.release().await;
        for index in 0..HUNG_MAX {
            servers.give_up_on(&format!("hang{index}")).await;
        }
        let busy = servers.ask(&format!("hang{HUNG_MAX}")).await;
        assert_eq!(busy, Err(ResolveError::Busy), "their share is used up");
        assert!(servers.ask("well").await.is_ok());
        servers.release().await;
        servers.give_up_on(&format!("hang{HUNG_MAX}")).await;
        servers.release().await;
        assert_eq!(lock(&servers.resolver.names).hung.len(), RESOLUTIONS_MAX);
        lock(&servers.resolver.names).answered("hang0", false);
        assert_eq!(lock(&servers.resolver.names).hung.len(), RESOLUTIONS_MAX - 1, "well again");
    }
}
