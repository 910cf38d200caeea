#!/usr/bin/env python3
"""What scripts/test-compose asks of the event stream, over HTTP and with nothing but the standard library.

    audit.py URL wait SECONDS REASON:AGENT...   until each of these recoveries was on the stream
    audit.py URL run SECONDS ID...              until each of these executions runs
    audit.py URL settle SECONDS ID...           until each of these executions has ended
    audit.py URL check ID...                    reads the whole log and checks what must hold of it
"""

import json
import sys
import time
import urllib.error
import urllib.request

READ_SECONDS = 20  # the stream sends a comment every 15 s
CHECK_SECONDS = 60  # for the whole log, some thousand events
PAUSE_SECONDS = 0.5
FINAL = {"completed", "failed", "cancelled", "expired", "quarantined"}


def fail(text):
    print(f"audit: {text}", file=sys.stderr)
    sys.exit(1)


def stream(url, after, deadline):
    """Events after a sequence number, from SSE, across reconnects, until the deadline."""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/events?after={after}", timeout=READ_SECONDS) as answer:
                sequence = None
                for raw in answer:
                    line = raw.decode().rstrip("\r\n")
                    if line.startswith("id:"):
                        sequence = int(line[3:])
                    elif line.startswith("data:"):
                        event = json.loads(line[5:])
                        if sequence is None or sequence <= after:
                            fail(f"the stream went from {after} to {sequence}")
                        after = sequence
                        yield sequence, event
                    if time.monotonic() >= deadline:
                        return
        except (OSError, urllib.error.URLError):
            time.sleep(PAUSE_SECONDS)


def get(url):
    with urllib.request.urlopen(url, timeout=READ_SECONDS) as answer:
        return json.load(answer)


def wait(url, seconds, wanted):
    """Until each wanted reason:agent was seen."""
    missing, since = set(wanted), time.monotonic()
    for _, event in stream(url, 0, since + seconds):
        data = event["data"]
        if event["type"].endswith("execution.recovered"):
            missing.discard(f"{data['reason']}:{data['agent_id']}")
        if not missing:
            print(f"audit: all of {', '.join(wanted)} after {time.monotonic() - since:.1f} s", file=sys.stderr)
            return
    fail(f"not recovered within {seconds} s: {', '.join(sorted(missing))}")


def reach(url, seconds, states, ids):
    """Until each execution is in one of these states."""
    deadline, waiting = time.monotonic() + seconds, dict.fromkeys(ids, "never seen")
    while waiting and time.monotonic() < deadline:
        for execution in list(waiting):
            try:
                state = get(f"{url}/api/executions/{execution}")["state"]
            except (OSError, KeyError):
                continue
            waiting[execution] = state
            if state in states:
                del waiting[execution]
        time.sleep(PAUSE_SECONDS)
    if waiting:
        fail(f"not {' or '.join(sorted(states))}: " + ", ".join(f"{execution} ({state})" for execution, state in waiting.items()))


def check(url, ids):
    """One end for each execution, one recovery for each attempt, and nothing that was submitted is missing."""
    newest = get(f"{url}/api/summary")["log"]["seq"]
    submitted, recovered, ended, event_ids, sequence = set(), {}, {}, set(), 0
    for sequence, event in stream(url, 0, time.monotonic() + CHECK_SECONDS):
        if event["id"] in event_ids:
            fail(f"event {event['id']} is in the log twice")
        event_ids.add(event["id"])
        kind, data = event["type"].removeprefix("rollcall."), event["data"]
        execution = event["subject"]
        if kind == "execution.submitted":
            submitted.add(execution)
        elif kind == "execution.recovered":
            key = (execution, data["attempt"])
            if key in recovered:
                fail(f"{key} was recovered twice, at {recovered[key]} and {sequence}")
            recovered[key] = sequence
        late = bool(data.get("late"))
        final = kind.removeprefix("execution.") in FINAL or data.get("action") in ("failed", "quarantined")
        if kind.startswith("execution.") and final and not late:
            if execution in ended:
                fail(f"{execution} ended twice, at {ended[execution]} and {sequence}")
            ended[execution] = sequence
        if sequence >= newest:
            break
    if sequence < newest:
        fail(f"the stream reached {sequence} of {newest} in {CHECK_SECONDS} s")
    lost = [execution for execution in ids if execution not in submitted or execution not in ended]
    if lost:
        fail(f"accepted, and not in the log with an end: {', '.join(lost)}")
    print(f"audit: {len(event_ids)} events, {len(submitted)} executions, {len(recovered)} recoveries, one end each", file=sys.stderr)


def main(arguments):
    url, command, rest = arguments[0].rstrip("/"), arguments[1], arguments[2:]
    if command == "wait":
        wait(url, float(rest[0]), rest[1:])
    elif command == "run":
        reach(url, float(rest[0]), {"running"}, rest[1:])
    elif command == "settle":
        reach(url, float(rest[0]), FINAL, rest[1:])
    elif command == "check":
        check(url, rest)
    else:
        fail(f"no such command: {command}")


if __name__ == "__main__":
    main(sys.argv[1:])
