# shellcheck shell=bash
# Sourced by scripts/up: a small fleet of real processes with something wrong with most of them, and what the fleet's
# event stream says of it. Uses what scripts/up has set: BIN_DIR, NATS_URL, HTTP_PORT, AGENTS, STATE_DIR, ROOT.

# Everything is noticed sooner than with the defaults, which are made for agents that beat every five seconds.
DEMO_SETTINGS=(
    ROLLCALL_HEARTBEAT_INTERVAL_MS=1000
    ROLLCALL_DISPATCH_GRACE_MS=3000
    ROLLCALL_LOST_AFTER_MS=2000
    ROLLCALL_TERMINATE_GRACE_MS=1000
)
# Which recovery each misbehaviour must lead to, and by when, from the first one on.
declare -A DEMO_EXPECTED=(
    [demo-hung]=timed_out [demo-forgetful]=orphaned [demo-doomed]=agent_lost [demo-restarted]=agent_restarted
)
DEMO_AGENTS=(demo-steady demo-hung demo-forgetful demo-doomed demo-restarted)
DEMO_SECONDS=60
DEMO_SUBMIT_SECONDS=20

# demo_agent NAME COMMAND...: starts it with the credentials of the agent NAME.
demo_agent() {
    local name=$1 credentials
    shift
    mapfile -t credentials <"$STATE_DIR/credentials/agents/$name.env"
    start "$AGENTS" "$name" env "${DEMO_SETTINGS[@]}" "${credentials[@]}" ROLLCALL_NATS_URL="$NATS_URL" "$@"
}

demo_command_agent() { demo_agent "$1" "$BIN_DIR/rollcall" agent run --id "$1" --capacity 2 -- "$ROOT/scripts/demo/work"; }

# demo_submit AGENT INPUT TIMEOUT_MS: until it is accepted; the agent may not have been heard of yet.
demo_submit() {
    local credentials until=$((SECONDS + DEMO_SUBMIT_SECONDS)) answer
    mapfile -t credentials <"$STATE_DIR/credentials/submitter.env"
    until answer=$(env "${credentials[@]}" ROLLCALL_NATS_URL="$NATS_URL" \
        "$BIN_DIR/rollcall" submit --agent "$1" --input "$2" --timeout-ms "$3" 2>&1 9>&-); do
        [ "$SECONDS" -lt "$until" ] || die "work for $1 is not accepted: $answer"
        pause 0.3
    done
}

# The reason itself, and not one of the same name inside the evidence.
demo_reason() {
    grep --only-matching --extended-regexp \
        '"reason" *: *"(orphaned|timed_out|stalled|agent_lost|agent_restarted|agent_gone|dispatch_lost|stale)"' <<<"$event" |
        head -n 1 | cut -d '"' -f 4
}

# demo_show: one line for the recovery in $event; takes what was expected off the list.
demo_show() {
    local agent reason after
    agent=$(grep --only-matching '"agent_id" *: *"[^"]*"' <<<"$event" | head -n 1 | cut -d '"' -f 4)
    after=$(grep --only-matching '"detected_after_ms" *: *[0-9]*' <<<"$event" | head -n 1 | sed 's/.*[^0-9]//')
    reason=$(demo_reason)
    printf '  %-16s %-16s noticed after %6s ms  %s\n' "$reason" "$agent" "${after:-?}" \
        "$(sed -n 's/.*"message" *: *"\([^"]*\)".*/\1/p' <<<"$event")"
    if [ "${DEMO_EXPECTED[$agent]:-}" = "$reason" ]; then
        unset "DEMO_EXPECTED[$agent]"
    fi
}

# demo_misbehave: the work, and what happens to those who do it.
demo_misbehave() {
    local doomed restarted
    demo_submit demo-steady '{"do": "sleep", "seconds": 2}' 30000
    demo_submit demo-steady '{"do": "sleep", "seconds": 3}' 30000
    demo_submit demo-hung '{"do": "hang"}' 3000
    demo_submit demo-forgetful '{"do": "sleep", "seconds": 1}' 30000
    demo_submit demo-doomed '{"do": "sleep", "seconds": 50}' 60000
    demo_submit demo-restarted '{"do": "sleep", "seconds": 50}' 60000
    pause 1.5 # a heartbeat that lists it
    doomed=$(demo_pid demo-doomed)
    restarted=$(demo_pid demo-restarted)
    kill -KILL "$doomed" "$restarted"
    demo_command_agent demo-restarted
    printf '  killed -9: demo-doomed (pid %s), and demo-restarted (pid %s, started again as pid %s)\n' \
        "$doomed" "$restarted" "$STARTED_PID"
}

# demo_pid NAME: of the process that was started last under that name.
demo_pid() {
    local record tier pid time name found=
    for record in "${STARTED[@]}"; do
        read -r tier pid time name <<<"$record"
        [ "$name" != "$1" ] || found=$pid
    done
    printf '%s\n' "$found"
}

# demo_run: leaves in DEMO_MISSED how many of the expected recoveries did not come.
demo_run() {
    local name event line='' piece until since=$SECONDS
    "$ROOT/scripts/credentials" agent "${DEMO_AGENTS[@]}"
    cat <<'TEXT'
The demo's fleet: demo-steady just works; demo-hung never finishes; demo-forgetful accepts work and forgets it;
demo-doomed is killed with -9 and stays away; demo-restarted is killed with -9 and comes back at once.
TEXT
    for name in demo-steady demo-hung demo-doomed demo-restarted; do
        demo_command_agent "$name"
    done
    demo_agent demo-forgetful "$ROOT/scripts/demo/forgetful-agent" demo-forgetful 2

    exec 7<>"/dev/tcp/127.0.0.1/$HTTP_PORT"
    printf 'GET /events?type=execution.recovered HTTP/1.0\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n' >&7
    demo_misbehave
    until=$((SECONDS + DEMO_SECONDS))
    while [ ${#DEMO_EXPECTED[@]} -gt 0 ] && [ "$SECONDS" -lt "$until" ]; do
        check_services
        # A line may come in pieces when the wait ends in the middle of it.
        if IFS= read -r -t 1 piece <&7; then
            event=${line}${piece%$'\r'}
            line=
            case $event in data:*) demo_show ;; esac
        elif [ $? -gt 128 ]; then
            line=$line$piece
        else
            die "the event stream ended"
        fi
    done
    exec 7>&-
    DEMO_MISSED=${#DEMO_EXPECTED[@]}
    for name in "${!DEMO_EXPECTED[@]}"; do
        say "not seen within $DEMO_SECONDS s: ${DEMO_EXPECTED[$name]} of $name"
    done
    [ "$DEMO_MISSED" -gt 0 ] ||
        printf 'Every one of them was recovered, %s after the demo began.\n' "$(elapsed "$since")"
}
