# shellcheck shell=bash
# Sourced by every script here: where the clone is, how a script speaks, and what it needs of the machine.
# Progress and errors go to stderr, so that a script's stdout stays data.

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
STATE_DIR=$ROOT/.rollcall
PROGRAM=${0##*/}

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# usage: the comment at the head of the script that runs.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

have() { command -v -- "$1" >/dev/null 2>&1; }

# elapsed SECONDS_BEFORE: the time since then, as 1m05s.
elapsed() {
    local s=$((SECONDS - $1))
    printf '%dm%02ds' $((s / 60)) $((s % 60))
}

# version_at_least FOUND WANTED: compares dotted numbers.
version_at_least() {
    [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

# as_root COMMAND...: runs it as root, directly or by a sudo that asks nothing; fails when neither is possible.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif have sudo && sudo -n true 2>/dev/null; then
        sudo -n -- "$@"
    else
        return 1
    fi
}

# A rustup installation is often not on the PATH of a fresh shell: look where it puts itself before giving up.
need_rust() {
    have cargo || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    local channel
    channel=$(sed -n 's/^channel *= *"\(.*\)"/\1/p' "$ROOT/rust-toolchain.toml")
    have cargo || die "no Rust toolchain found (cargo): install Rust $channel with rustup, then run this again"
    (cd "$ROOT" && cargo --version >/dev/null) ||
        die "the Rust toolchain $channel that rust-toolchain.toml names does not run: install it with rustup"
}
