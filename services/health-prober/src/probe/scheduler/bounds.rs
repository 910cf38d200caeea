//! How much may be under way at once, within the files that this process may open.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Probes in flight at once. A thousand endpoints that hang hold a thousand places for as long as a probe may take;
/// with these there is room for others beside them.
const PROBES_MAX: usize = 1024;
/// Probes in flight at once to one host: with the default interval and timeout, 1,280 endpoints of one host that all hang
/// are got through in one interval.
const PROBES_PER_HOST_MAX: usize = 128;
/// Connections kept between probes.
const WARM_MAX: usize = 4096;
/// Files that a probe may hold open: its connection, and the one it replaces while that is being closed.
const FILES_PER_PROBE: usize = 2;
/// Files for everything else: the bus, the admin server, the log, names being resolved.
const FILES_RESERVED: usize = 256;
/// Fewer probes at once would be of no use: rather fail to open a file now and then, which is held against nobody.
const PROBES_MIN: usize = 16;

/// How much may be under way at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Probes in flight.
    pub total: usize,
    /// Probes in flight to one host.
    pub per_host: usize,
    /// Connections kept between probes.
    pub warm: usize,
}

impl Bounds {
    /// As many as are ever of use.
    pub const FULL: Self = Self { total: PROBES_MAX, per_host: PROBES_PER_HOST_MAX, warm: WARM_MAX };
    /// Open files that [`Bounds::FULL`] needs.
    pub const FILES: u64 = (FILES_RESERVED + PROBES_MAX * FILES_PER_PROBE + WARM_MAX) as u64;

    /// What `files` open files allow. At least half of those that are to be had go to probes that are in flight.
    #[must_use]
    pub fn within(files: u64) -> Self {
        let files = usize::try_from(files).unwrap_or(usize::MAX).saturating_sub(FILES_RESERVED);
        let total = (files / 2 / FILES_PER_PROBE).clamp(PROBES_MIN, PROBES_MAX);
        Self {
            total,
            per_host: PROBES_PER_HOST_MAX.min(total / 2),
            warm: WARM_MAX.min(files.saturating_sub(total * FILES_PER_PROBE)),
        }
    }

    /// Places that may be taken by what hung the last time: half, so that there always are some for everybody else.
    pub(super) const fn hung(places: usize) -> usize {
        places / 2
    }
}

/// Raises the limit of open files as far as this process may: the usual soft one is far below the hard one. Returns what
/// may be opened now.
///
/// # Errors
/// The system's.
pub fn raise_file_limit() -> nix::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_files_mean_few_probes_and_never_more_files_than_there_are() {
        assert_eq!(Bounds::within(Bounds::FILES), Bounds::FULL);
        assert_eq!(Bounds::within(u64::MAX), Bounds::FULL);
        assert_eq!(Bounds::within(1024), Bounds { total: 192, per_host: 96, warm: 384 });
        for files in 300..20_000 {
            let bounds = Bounds::within(files);
            let needs = FILES_RESERVED + bounds.total * FILES_PER_PROBE + bounds.warm;
            assert!(u64::try_from(needs).unwrap() <= files.max(320), "{files}: {bounds:?}");
            assert!(bounds.per_host < bounds.total && bounds.per_host >= 8, "{files}: {bounds:?}");
        }
        assert_eq!(Bounds::within(0), Bounds { total: 16, per_host: 8, warm: 0 });
    }

    #[test]
    fn the_limit_of_open_files_is_raised_to_the_hard_one() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(raise_file_limit().unwrap(), hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap().0, hard);
    }
}
