//! A process without a file handle to spare: a test of its own, since it takes them from everything in it.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rollcall_control::{is_ours, resolve};

#[tokio::test]
async fn a_name_that_we_had_no_file_handle_for_is_not_called_unknown() {
    // Whatever it loads for the first name is loaded.
    assert!(!resolve("localhost", 80).await.unwrap().is_empty());
    let unknown = resolve("no-such-host.invalid", 80).await.unwrap_err();
    assert!(!is_ours(&unknown), "{unknown}");
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
    let mut taken: Vec<std::fs::File> =
        std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
    for spare in 0..2 {
        let error = resolve("no-such-host.invalid", 80).await.unwrap_err();
        assert!(is_ours(&error), "with {spare} to spare: {error}");
        taken.pop();
    }
}
