# shellcheck shell=bash
# Sourced after common.sh. Starts programs in the background and stops exactly those, by their recorded pids.
#
# Each program gets a session of its own, so that Ctrl-C reaches only the script, which then stops them in order:
# by tier, highest first. A pid is recorded with its start time, because the kernel gives numbers out again.
# Needs RUN_DIR. Logs go to $RUN_DIR/log/NAME.log, records to $RUN_DIR/pids.

declare -a STARTED=() # "tier pid starttime name"

# stat_fields PID: leaves what follows the name in /proc/PID/stat in STAT, so the state is the first; empty when there is
# no such process. No program is started for it: a stop looks at every process of the machine.
stat_fields() {
    local line=''
    STAT=()
    { read -r line <"/proc/$1/stat"; } 2>/dev/null || true
    [ -z "$line" ] || read -r -a STAT <<<"${line##*) }"
}
STAT_SESSION=3 STAT_START_TIME=19

# is_running PID STARTTIME: that very process runs, and is not just waiting to be reaped.
is_running() {
    stat_fields "$1"
    [ -n "$2" ] && [ "${STAT[STAT_START_TIME]:-}" = "$2" ] && [ "${STAT[0]}" != Z ]
}

# start TIER NAME COMMAND...: leaves the pid in STARTED_PID. Descriptor 9 is the script's lock and not the program's.
# Where setpriv can do it the program is also told when the script itself is killed and can stop nothing any more.
start() {
    local tier=$1 name=$2 record
    shift 2
    if setpriv --pdeathsig TERM -- true 2>/dev/null; then
        set -- setpriv --pdeathsig TERM -- "$@"
    fi
    setsid -- "$@" </dev/null >>"$RUN_DIR/log/$name.log" 2>&1 9>&- &
    STARTED_PID=$!
    disown # or the shell would say a word of its own about each one that is killed
    stat_fields "$STARTED_PID"
    record="$tier $STARTED_PID ${STAT[STAT_START_TIME]:-0} $name"
    STARTED+=("$record")
    printf '%s\n' "$record" >>"$RUN_DIR/pids"
}

# running NAME: it was started and still runs.
running() {
    local record tier pid time name
    for record in "${STARTED[@]}"; do
        read -r tier pid time name <<<"$record"
        [ "$name" = "$1" ] && is_running "$pid" "$time" && return
    done
    return 1
}

# stop_tier TIER SIGNALS SECONDS: sends TERM (that many times), waits that long at most, then KILL to what is left,
# and to the rest of its session: a worker of a killed agent has nobody else to stop it.
stop_tier() {
    local tier=$1 signals=$2 until record of pid time name left
    until=$((SECONDS + $3))
    while [ "$signals" -gt 0 ]; do
        signals=$((signals - 1))
        for record in "${STARTED[@]}"; do
            read -r of pid time name <<<"$record"
            [ "$of" != "$tier" ] || ! is_running "$pid" "$time" || kill -TERM "$pid" 2>/dev/null || true
        done
        [ "$signals" -eq 0 ] || pause 0.3
    done
    while :; do
        left=
        for record in "${STARTED[@]}"; do
            read -r of pid time name <<<"$record"
            [ "$of" != "$tier" ] || ! is_running "$pid" "$time" || left="$left $name"
        done
        if [ -z "$left" ] || [ "$SECONDS" -ge "$until" ]; then
            break
        fi
        pause 0.1
    done
    [ -z "$left" ] || say "did not stop in time, killing:$left"
    kill_sessions "$tier"
}

# kill_sessions TIER: every process of a session that one of the tier's programs led. A session's number is not given
# out again while anybody is in it; a leader by that number with another start time is not ours.
kill_sessions() {
    local record of pid time name sessions=' '
    for record in "${STARTED[@]}"; do
        read -r of pid time name <<<"$record"
        [ "$of" = "$1" ] || continue
        stat_fields "$pid"
        [ ${#STAT[@]} -gt 0 ] && [ "${STAT[STAT_START_TIME]}" != "$time" ] || sessions="$sessions$pid "
    done
    for pid in /proc/[0-9]*; do
        pid=${pid#/proc/}
        stat_fields "$pid"
        [[ $sessions != *" ${STAT[STAT_SESSION]:-none} "* ]] || kill -KILL "$pid" 2>/dev/null || true
    done
}

# stop_leftovers: what an earlier script recorded and could not stop, because it was killed itself.
stop_leftovers() {
    local record tier pid time name
    [ -s "$RUN_DIR/pids" ] || return 0
    while read -r tier pid time name; do
        is_running "$pid" "$time" || continue
        say "stopping $name, left over from an earlier run (pid $pid)"
        STARTED+=("$tier $pid $time $name")
    done <"$RUN_DIR/pids"
    for tier in 4 3 2 1; do
        stop_tier "$tier" 1 10
    done
    STARTED=()
}

# pause SECONDS: a sleep that a trapped signal ends at once.
pause() {
    sleep "$1" 9>&- &
    wait $! 2>/dev/null || true
}

# show_log NAME: its last lines, indented, on stderr.
show_log() {
    say "the end of $RUN_DIR/log/$1.log:"
    tail -n 20 "$RUN_DIR/log/$1.log" 2>/dev/null | sed 's/^/    /' >&2
}

# listening PORT: something on loopback accepts.
listening() { (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# free_port: a port on loopback that nothing listens on, below the range that the kernel gives to clients. It may be
# taken before it is used: whoever starts a program on it tries again when that says the address is in use.
free_port() {
    local port tries
    for tries in {1..200}; do
        port=$((20000 + (RANDOM + tries) % 12000))
        if ! listening "$port"; then
            printf '%s\n' "$port"
            return
        fi
    done
    return 1
}

# http_get PORT PATH: the status code and, after a space, the first line of the body. Empty when nothing answers.
http_get() {
    local line status= body=
    exec 8<>"/dev/tcp/127.0.0.1/$1" || return 0
    printf 'GET %s HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n' "$2" >&8
    if read -r -t 3 line <&8; then
        read -r _ status _ <<<"$line"
        while read -r -t 3 line <&8 && [ -n "${line%$'\r'}" ]; do :; done
        IFS= read -r -t 3 body <&8 || true
    fi
    exec 8>&-
    printf '%s %s\n' "$status" "$body"
} 2>/dev/null
