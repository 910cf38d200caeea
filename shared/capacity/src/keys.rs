//! The names of the keys. The scripts derive a pool's other keys from its `meta` key.

/// `<prefix>:{<pool>}:meta`.
pub(crate) fn meta(prefix: &str, pool: &str) -> String {
    format!("{prefix}:{{{pool}}}:meta")
}

/// `<prefix>:{<pool>}:turn:<execution_id>:<attempt>`: not derived by any script, and gone by itself.
pub(crate) fn turn(prefix: &str, pool: &str, member: &str) -> String {
    format!("{prefix}:{{{pool}}}:turn:{member}")
}

/// The set of all pools, outside of any pool's hash tag.
pub(crate) fn pools(prefix: &str) -> String {
    format!("{prefix}:pools")
}
