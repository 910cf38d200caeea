//! Which reply subjects a service may publish on.
//!
//! A requester chooses the reply subject. A service that answers any of them can be made to write into the log
//! (PROTOCOL.md 1), so only inboxes are answered: `_INBOX.`, `_INBOX_<name>.`, and `_R_.` of another account.

/// Longest reply subject that is answered, in bytes. The server's own limit for a protocol line is 4096.
const REPLY_MAX_BYTES: usize = 1024;

/// True if `reply` looks like an inbox: the right first token, at least one more, no wildcard, space or control byte.
pub fn is_inbox(reply: &str) -> bool {
    if reply.len() > REPLY_MAX_BYTES || !reply.bytes().all(|b| b.is_ascii_graphic()) {
        return false;
    }
    let Some((first, rest)) = reply.split_once('.') else { return false };
    let first_is_inbox = match first {
        "_INBOX" | "_R_" => true,
        other => other.strip_prefix("_INBOX_").is_some_and(is_name),
    };
    first_is_inbox && rest.split('.').all(|token| !token.is_empty() && token != "*" && token != ">")
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::is_inbox;

    #[test]
    fn inboxes_are_answered() {
        for good in ["_INBOX.abc", "_INBOX.abc.def", "_INBOX_agent-7.x.y", "_R_.a8Ds.1"] {
            assert!(is_inbox(good), "{good:?}");
        }
    }

    #[test]
    fn nothing_else_is() {
        for bad in [
            "",
            "_INBOX",
            "_INBOX.",
            "_INBOX..a",
            "_INBOX.a.",
            "_INBOX.*",
            "_INBOX.a.>",
            "_INBOX.a b",
            "_INBOX.a\r\nPUB",
            "_INBOX_.a",
            "_INBOX_a*.b",
            "_INBOXES.a",
            "_R_",
            "_R_x.a",
            "rollcall.event.agent.a",
            "$JS.API.STREAM.DELETE.X",
            "x._INBOX.a",
        ] {
            assert!(!is_inbox(bad), "{bad:?}");
        }
        assert!(!is_inbox(&format!("_INBOX.{}", "a".repeat(2000))));
    }
}
