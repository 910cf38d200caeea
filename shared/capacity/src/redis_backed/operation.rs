//! The scripts, as they are sent: what they share in front, then one file per operation.

use std::sync::LazyLock;

/// One Lua script. The server's copy is addressed by its hash and loaded again whenever the server lost it.
pub(crate) struct Operation {
    /// For messages.
    pub(crate) name: &'static str,
    pub(crate) script: LazyLock<redis::Script>,
}

macro_rules! operations {
    ($($constant:ident = $name:literal: $($part:literal),+;)*) => { $(
        pub(crate) static $constant: Operation = Operation {
            name: $name,
            script: LazyLock::new(|| redis::Script::new(concat!($(include_str!(concat!("../lua/", $part, ".lua")), "\n"),+))),
        };
    )* };
}

operations! {
    ADMIT_TO_AGENT = "admit_to_agent": "include/guard", "include/slots", "include/admission", "admit_to_agent-1";
    ADMIT_TO_POOL = "admit_to_pool": "include/guard", "include/slots", "include/admission", "admit_to_pool-1";
    CONFIRM = "confirm": "include/guard", "include/slots", "confirm-1";
    CONFIRM_QUEUED = "confirm_queued": "include/guard", "confirm_queued-1";
    SETTLE = "settle": "include/guard", "include/slots", "include/settling", "settle-1";
    RECLAIM = "reclaim": "include/guard", "include/slots", "include/settling", "reclaim-1";
    REQUEUE = "requeue": "include/guard", "include/slots", "requeue-1";
    ADOPT = "adopt": "include/guard", "include/slots", "adopt-1";
    RELOCATE = "relocate": "include/guard", "include/slots", "relocate-1";
    SET_AGENT = "set_agent": "include/guard", "include/slots", "set_agent-1";
    REOPEN = "reopen": "include/guard", "include/slots", "reopen-1";
    REMOVE_AGENT = "remove_agent": "include/guard", "include/slots", "remove_agent-1";
    PROMOTE = "promote": "include/guard", "include/slots", "promote-1";
    INSPECT = "inspect": "include/guard", "inspect-1";
    INSPECT_POOL = "inspect_pool": "include/guard", "inspect_pool-1";
    SCAN = "scan": "include/guard", "scan-1";
    UNCONFIRMED = "unconfirmed": "include/guard", "unconfirmed-1";
    WAITING_WITH_FREE = "waiting_with_free": "include/guard", "waiting_with_free-1";
    AGENTS = "agents": "include/guard", "agents-1";
    REBUILD_BEGIN = "rebuild_begin": "rebuild_begin-1";
    REBUILD_WIPE = "rebuild_wipe": "include/rebuild", "rebuild_wipe-1";
    REBUILD_LOAD = "rebuild_load": "include/rebuild", "rebuild_load-1";
    REBUILD_COMMIT = "rebuild_commit": "include/rebuild", "rebuild_commit-1";
}

/// One argument of a script.
#[derive(Clone, Copy)]
pub(crate) enum Arg<'a> {
    Text(&'a str),
    Number(u64),
    Order(i64),
}

impl redis::ToRedisArgs for Arg<'_> {
    fn write_redis_args<W: ?Sized + redis::RedisWrite>(&self, out: &mut W) {
        match self {
            Arg::Text(text) => text.write_redis_args(out),
            Arg::Number(number) => number.write_redis_args(out),
            Arg::Order(order) => order.write_redis_args(out),
        }
    }
}

impl redis::ToSingleRedisArg for Arg<'_> {}
