"use strict";
(() => {
  // Bounds of a page that stays open for days.
  const FEED_MAX = 200, ROWS_STEP = 50, ROWS_MAX = 1000, AGENTS_SHOWN = 100;
  const POLL_MS = 1000, AGENTS_POLL_LARGE_MS = 5000, AGENTS_LARGE = 200, RECONNECT_MAX_MS = 15000, FETCH_TIMEOUT_MS = 12000;

  const $ = (id) => document.getElementById(id);
  const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };
  // Everything shown goes through text nodes: nothing an agent sends is ever markup.
  const el = (tag, className, ...children) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    for (const child of children) if (child !== null && child !== undefined) node.append(child);
    return node;
  };

  // ---- words -------------------------------------------------------------------------------------------------
  const STATUS = {
    connected: ["Connected", "good", ""], degraded: ["Degraded", "warn", "open"], disconnected: ["Disconnected", "warn", ""],
    error: ["Error", "bad", "square"], draining: ["Draining", "wait", "open"], gone: ["Gone", "gone", "open"],
  };
  const STATE = {
    queued: ["Queued", "wait", "open"], dispatching: ["Dispatching", "sea", "open"], running: ["Running", "work", ""],
    cancelling: ["Cancelling", "warn", "open"], completed: ["Completed", "good", ""], failed: ["Failed", "bad", "square"],
    cancelled: ["Cancelled", "gone", "open"], expired: ["Expired", "warn", "square"], quarantined: ["Quarantined", "lost", "square"],
  };
  const OPEN = ["queued", "dispatching", "running", "cancelling"];
  const ENDED = ["completed", "failed", "cancelled", "expired", "quarantined"];
  const REASON = {
    orphaned: ["Orphaned", "its agent is alive and does not know it"], timed_out: ["Timed out", "its time was up"],
    stalled: ["Stalled", "its progress stood still"], agent_lost: ["Agent lost", "its agent fell silent"],
    agent_restarted: ["Agent restarted", "its agent runs as a new process"], agent_gone: ["Agent gone", "its agent left or handed it back"],
    dispatch_lost: ["Dispatch lost", "its agent never confirmed it"], stale: ["Stale", "nothing else settled it in time"],
  };
  const REASON_TONE = { orphaned: "lost", timed_out: "warn", stalled: "wait", agent_lost: "bad", agent_restarted: "work", agent_gone: "rose", dispatch_lost: "sea", stale: "gone" };
  const EVENT_TONE = {
    submitted: "gone", queued: "wait", dispatched: "work", started: "work", cancel_requested: "warn", completed: "good",
    failed: "bad", cancelled: "gone", expired: "warn", recovered: "lost", retried: "work", late_result: "gone",
    connected: "good", degraded: "warn", disconnected: "warn", error: "bad", draining: "wait", gone: "gone", registered: "work",
    superseded: "gone", flapping: "warn", settled: "good", quarantined: "lost", released: "good", updated: "gone",
  };
  const words = (name) => { const text = String(name).replaceAll("_", " "); return text.charAt(0).toUpperCase() + text.slice(1); };
  const ended = (text) => /[.!?]$/.test(text ?? "") ? text : `${text ?? ""}.`;
  const number = new Intl.NumberFormat("en");
  const count = (n) => number.format(n ?? 0);
  const span = (ms) => {
    if (!Number.isFinite(ms)) return "";
    const s = Math.max(0, ms) / 1000;
    if (s < 1) return `${Math.round(Math.max(0, ms))} ms`;
    if (s < 10) return `${s.toFixed(1)} s`;
    if (s < 60) return `${Math.floor(s)} s`;
    if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
    if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
    return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
  };
  const clock = (at) => {
    const date = new Date(at);
    if (Number.isNaN(date.getTime())) return "";
    const time = date.toLocaleTimeString("en-GB");
    return date.toDateString() === new Date().toDateString() ? time : `${date.toLocaleDateString("en-CA")} ${time}`;
  };
  // The server's clock counts: ages and times left must not depend on this machine's.
  let skew = 0;
  const now = () => Date.now() + skew;
  const ago = (at) => { const ms = now() - Date.parse(at); return ms < 1000 ? "just now" : `${span(ms)} ago`; };
  const badge = ([label, tone, shape]) => el("span", `badge ${tone} ${shape}`, label);
  const named = (table, key) => table[key] ?? [words(key ?? "unknown"), "gone", "open"];

  // ---- the server ----------------------------------------------------------------------------------------------
  class HttpError extends Error { constructor(status, error) { super(error?.message ?? `HTTP ${status}`); this.status = status; this.code = error?.code; } }
  const get = async (path) => {
    const asked = Date.now();
    const response = await fetch(path, { signal: AbortSignal.timeout(FETCH_TIMEOUT_MS), cache: "no-store" });
    const date = Date.parse(response.headers.get("date"));
    const half = (asked + Date.now()) / 2;
    // The header has whole seconds: only a real difference counts.
    if (!Number.isNaN(date)) skew = Math.abs(date + 500 - half) > 2000 ? date + 500 - half : 0;
    const body = await response.json().catch(() => null);
    if (!response.ok) throw new HttpError(response.status, body?.error);
    return body;
  };

  const connection = { stream: "waiting", api: true, tries: 0, since: Date.now(), notReady: "", bus: true };
  const showConnection = () => {
    const pill = $("connection");
    let state = "live", text = "Live";
    if (connection.notReady) { state = "waiting"; text = "Starting"; }
    else if (connection.stream !== "live" || !connection.api) {
      const away = Date.now() - connection.since;
      state = away > 5000 ? "off" : "waiting";
      text = connection.tries === 0 ? "Connecting" : `Reconnecting for ${span(away)}`;
    }
    pill.dataset.state = state;
    setText($("connection-text"), text);
    let notice = "";
    if (connection.notReady) notice = `The notifier has just started and is ${connection.notReady}. This page goes on by itself.`;
    else if (state === "off") notice = `No connection to the notifier since ${clock(connection.since)}. What is shown is from then; the page reconnects by itself and misses nothing.`;
    else if (!connection.bus) notice = "The notifier can't reach the event log now. What is shown may be old.";
    $("notice").hidden = !notice;
    setText($("notice"), notice);
  };
  const lost = () => { if (connection.stream === "live" && connection.api) connection.since = Date.now(); connection.tries += 1; };

  // ---- tiles ---------------------------------------------------------------------------------------------------
  const tile = (name, total, parts) => {
    const big = $(`${name}-total`);
    if (big.textContent !== total.join("")) big.replaceChildren(total[0], ...(total[1] ? [el("small", "", total[1])] : []));
    const sum = parts.reduce((all, part) => all + part.n, 0);
    const bar = $(`${name}-bar`), legend = $(`${name}-legend`);
    const key = JSON.stringify(parts);
    if (bar.dataset.key === key) return;
    bar.dataset.key = key;
    bar.replaceChildren(...parts.filter((part) => part.n > 0 && !part.plain).map((part) => {
      const piece = el("i", part.tone);
      piece.style.width = `${(100 * part.n) / Math.max(1, part.of ?? sum)}%`;
      return piece;
    }));
    legend.replaceChildren(...parts.map((part) => {
      const item = el("li", part.n === 0 ? "none" : "");
      if (!part.plain) item.append(el("span", `sw ${part.tone}`));
      item.append(`${part.label} `, el("b", "", count(part.n)));
      return item;
    }));
  };
  const showSummary = (summary) => {
    const parts = (table, names, counts) => names.map((name) => ({ label: named(table, name)[0], tone: named(table, name)[1], n: counts[name] ?? 0 }));
    const { agents, executions, recoveries, log } = summary;
    const marks = [["Flapping", agents.flapping], ["Quarantined", agents.quarantined]].filter(([, n]) => n > 0);
    tile("agents", [count(agents.total)], [...parts(STATUS, Object.keys(STATUS), agents.by_status), ...marks.map(([label, n]) => ({ label, n, tone: "warn", plain: true }))]);
    const free = Math.max(0, agents.capacity - agents.held);
    tile("slots", [count(agents.held), ` of ${count(agents.capacity)}`], [
      { label: "Held", tone: "work", n: agents.held, of: Math.max(agents.capacity, agents.held) },
      { label: "Free", tone: "good", n: free, plain: true },
    ]);
    const open = parts(STATE, OPEN, executions.by_state), ended = parts(STATE, ENDED, executions.by_state);
    const total = (list) => list.reduce((sum, part) => sum + part.n, 0);
    tile("open", [count(total(open))], open);
    tile("ended", [count(total(ended))], ended);
    const reasons = Object.entries(recoveries.by_reason).map(([name, n]) => ({ label: (REASON[name] ?? [words(name)])[0], tone: REASON_TONE[name] ?? "gone", n }));
    reasons.sort((a, b) => b.n - a.n);
    const late = recoveries.late_completions;
    tile("recoveries", [count(recoveries.total), late > 0 ? ` ${count(late)} completed after all` : ""], reasons.filter((part, index) => part.n > 0 || index < 3));
    setText($("log-position"), `event ${count(log.seq)}${log.last_event_at ? `, ${ago(log.last_event_at)}` : ""}`);
    connection.bus = log.connected;
    showChips(executions.by_state);
    const broken = agents.by_status.error ?? 0;
    document.title = broken > 0 ? `${count(broken)} in error · Rollcall` : "Rollcall";
  };

  // ---- rows, kept by key so that a selection or a focus survives ------------------------------------------------
  const rows = (body, items, keyOf, make, update, empty) => {
    const known = new Map();
    for (const row of [...body.children]) { if (row.dataset.key) known.set(row.dataset.key, row); else row.remove(); }
    let place = body.firstChild;
    for (const item of items) {
      const key = keyOf(item);
      let row = known.get(key);
      if (row) known.delete(key); else { row = make(item); row.dataset.key = key; }
      update(row, item);
      if (row === place) place = place.nextSibling; else body.insertBefore(row, place);
    }
    for (const row of known.values()) row.remove();
    if (items.length === 0) {
      const cell = el("td", "", empty);
      cell.colSpan = 8;
      body.append(el("tr", "empty", cell));
    }
  };
  const cell = (row, index, key, make) => {
    const target = row.children[index];
    if (target.dataset.v === key) return;
    target.dataset.v = key;
    target.replaceChildren(...[make()].flat().filter((part) => part !== null));
  };
  const blankRow = (classes) => el("tr", "", ...classes.map((name) => el("td", name)));
  const idText = (id) => { const node = el("span", "id mono", id); node.title = id; return node; };
  const executionLink = (id) => { const link = el("a", "", idText(id)); link.href = `#/execution/${encodeURIComponent(id)}`; return link; };

  // ---- executions ------------------------------------------------------------------------------------------------
  let chosenState = "open", chosenAgent = "", rowLimit = ROWS_STEP, stateCounts = {};
  const statesOf = (choice) => choice === "all" ? [] : choice === "open" ? OPEN : [choice];
  const showChips = (counts) => {
    stateCounts = counts;
    const sum = (names) => names.reduce((all, name) => all + (counts[name] ?? 0), 0);
    const choices = [["open", "Open", sum(OPEN)], ["all", "All", sum([...OPEN, ...ENDED])], ...[...OPEN, ...ENDED].map((name) => [name, STATE[name][0], counts[name] ?? 0])];
    const box = $("state-chips");
    for (const [index, [value, label, n]] of choices.entries()) {
      let chip = box.children[index];
      if (!chip) {
        chip = el("button", "chip", `${label} `, el("b"));
        chip.type = "button";
        chip.addEventListener("click", () => { chosenState = value; rowLimit = ROWS_STEP; showChips(stateCounts); loadExecutions(); });
        box.append(chip);
      }
      chip.setAttribute("aria-pressed", String(chosenState === value));
      setText(chip.lastChild, count(n));
    }
  };
  const timeOf = (row) => {
    if (row.ended_at) return row.dispatched_at ? `took ${span(Date.parse(row.ended_at) - Date.parse(row.dispatched_at))}` : "never started";
    if (row.state === "queued") return "waiting";
    if (!row.deadline) return "";
    const left = Date.parse(row.deadline) - now();
    return left >= 0 ? `${span(left)} left` : `${span(-left)} over`;
  };
  let executionRows = [];
  const paintTimes = () => {
    for (const [body, list, index, text] of [[$("executions"), executionRows, 5, (r) => ago(r.submitted_at)], [$("executions"), executionRows, 6, timeOf], [$("agents"), agentRows, 2, (a) => ago(a.since)]]) {
      for (const [at, item] of list.entries()) { const target = body.children[at]?.children[index]; if (target) setText(target, text(item)); }
    }
    for (const node of document.querySelectorAll("#feed time")) setText(node, ago(node.dateTime));
  };
  const showExecutions = (answer) => {
    executionRows = answer.executions;
    rows($("executions"), executionRows, (row) => row.execution_id, () => blankRow(["", "", "", "r", "wide-only", "", "", "why wide-only"]), (node, row) => {
      cell(node, 0, row.execution_id, () => executionLink(row.execution_id));
      cell(node, 1, `${row.state}${row.late ? "+" : ""}`, () => [badge(named(STATE, row.state)), row.late ? el("span", "mark", "late") : null]);
      cell(node, 2, row.agent_id ?? "", () => row.agent_id ? agentButton(row.agent_id) : el("span", "quiet", "any"));
      cell(node, 3, String(row.attempt), () => String(row.attempt));
      cell(node, 4, row.pool, () => row.pool);
      cell(node, 7, `${row.reason ?? ""}|${row.failure?.message ?? ""}`, () => row.failure?.message ?? (row.reason ? words(row.reason) : ""));
      node.children[5].title = clock(row.submitted_at);
    }, chosenAgent ? `No such executions of ${chosenAgent}.` : chosenState === "open" ? "Nothing is open." : "None.");
    const more = answer.next !== null && rowLimit < ROWS_MAX;
    $("executions-more").hidden = !more;
    const forgotten = answer.forgotten > 0 && !OPEN.includes(chosenState) && chosenState !== "open" ? ` ${count(answer.forgotten)} older ones are found by their id.` : "";
    setText($("executions-note"), `${count(executionRows.length)} shown, the last submitted first.${forgotten}`);
    paintTimes();
  };
  let executionsAsked = 0;
  const loadExecutions = async () => {
    const query = new URLSearchParams({ limit: String(rowLimit) });
    const states = statesOf(chosenState);
    if (states.length) query.set("state", states.join(","));
    if (chosenAgent) query.set("agent", chosenAgent);
    const asked = ++executionsAsked;
    const answer = await guarded(get(`/api/executions?${query}`));
    // A slower, older answer must not replace a newer one.
    if (answer && asked === executionsAsked) showExecutions(answer);
  };
  const chooseAgent = (id) => {
    chosenAgent = id;
    rowLimit = ROWS_STEP;
    $("agent-filter").hidden = !id;
    setText($("agent-filter-text"), id ? `Only executions of ${id}.` : "");
    loadExecutions();
  };
  const agentButton = (id) => {
    const button = el("button", "link", idText(id));
    button.type = "button";
    button.title = `Only executions of ${id}`;
    button.addEventListener("click", () => { chooseAgent(id); $("executions-title").scrollIntoView({ block: "nearest" }); });
    return button;
  };

  // ---- agents ------------------------------------------------------------------------------------------------------
  const ORDER = ["error", "disconnected", "degraded", "draining", "connected", "gone"];
  let allAgents = [], agentRows = [], showAllAgents = false;
  const showAgents = () => {
    const wanted = $("agent-search").value.trim().toLowerCase();
    const matches = (agent) => !wanted || [agent.agent_id, agent.pool, agent.status, agent.version, ...Object.entries(agent.labels).flat()].some((text) => String(text ?? "").toLowerCase().includes(wanted));
    const rank = (agent) => (agent.quarantined ? 0 : 1) + 2 * Math.max(0, ORDER.indexOf(agent.status));
    const found = allAgents.filter(matches).sort((a, b) => rank(a) - rank(b) || (a.agent_id < b.agent_id ? -1 : 1));
    agentRows = showAllAgents ? found : found.slice(0, AGENTS_SHOWN);
    rows($("agents"), agentRows, (agent) => agent.agent_id, () => blankRow(["", "", "", "", "wide-only", "wide-only", "why"]), (node, agent) => {
      cell(node, 0, agent.agent_id, () => agentButton(agent.agent_id));
      const marks = [agent.flapping && "flapping", agent.quarantined && "quarantined", agent.draining && agent.status !== "draining" && "draining"].filter(Boolean);
      cell(node, 1, `${agent.status}|${marks}`, () => [badge(agent.status ? named(STATUS, agent.status) : ["Registered", "gone", "open"]), ...marks.map((mark) => el("span", "mark", mark))]);
      cell(node, 3, `${agent.executions}/${agent.capacity}`, () => {
        const meter = el("meter");
        meter.max = Math.max(1, agent.capacity);
        meter.value = Math.min(agent.executions, agent.capacity);
        meter.setAttribute("aria-hidden", "true");
        return el("span", "slots", `${agent.executions} of ${agent.capacity}`, meter);
      });
      cell(node, 4, agent.pool, () => agent.pool);
      cell(node, 5, agent.version ?? "", () => agent.version ?? "");
      const why = agent.quarantined ?? agent.failure?.message ?? agent.draining?.reason ?? words(agent.reason || "");
      cell(node, 6, why, () => why);
      node.children[2].title = clock(agent.since);
    }, wanted ? "No agent matches." : "No agent has been heard of yet. The first heartbeat registers it.");
    $("agents-more").hidden = showAllAgents || found.length <= AGENTS_SHOWN;
    setText($("agents-note"), `${count(agentRows.length)} of ${count(allAgents.length)} shown, those in trouble first.`);
    paintTimes();
  };
  let agentsAt = 0;
  const loadAgents = async () => {
    agentsAt = Date.now();
    const answer = await guarded(get("/api/agents"));
    if (answer) { allAgents = answer.agents; showAgents(); }
  };

  // ---- the feed ------------------------------------------------------------------------------------------------------
  const KINDS = [["recoveries", "Recoveries", "execution.recovered"], ["alarms", "Alarms", "system."], ["health", "Health", "agent."]];
  const hiddenKinds = new Set();
  const kindOf = (type) => (KINDS.find(([, , prefix]) => type.startsWith(prefix)) ?? ["alarms"])[0];
  let lastSeq = 0;
  const becameOf = (data) => data.action === "requeued" ? `queued again as attempt ${data.next_attempt}` : data.action === "quarantined" ? "set aside until an operator retries it" : "ended as failed";
  const certain = { confirmed: "its death is confirmed", not_running: "it was not running", not_attempted: "nobody was there to ask", failed: "its end is not confirmed" };
  const entryOf = (type, event) => {
    const data = event.data ?? {};
    const time = el("time", "feed-time", ago(event.time));
    time.dateTime = event.time;
    time.title = clock(event.time);
    const head = (title, tone, shape = "square") => el("div", "feed-top", badge([title, tone, shape]), time);
    if (type === "execution.recovered") {
      const [title, words_] = REASON[data.reason] ?? [words(data.reason), ""];
      const what = el("p", "feed-what", executionLink(String(data.execution_id)), " on ", agentButton(String(data.agent_id)), ` ${becameOf(data)}.`);
      const noticed = `Noticed ${span(data.detected_after_ms)} after it became true; ${certain[data.terminate] ?? words(data.terminate)}.`;
      return [head(title, REASON_TONE[data.reason] ?? "lost"), what, el("p", "feed-more", data.message || words_), el("p", "feed-more", noticed)];
    }
    const name = type.split(".")[1] ?? type;
    if (type.startsWith("agent.")) {
      const from = data.previous ? ` after ${named(STATUS, data.previous)[0].toLowerCase()}` : "";
      const why = data.message ?? (data.reason ? words(data.reason) : data.by_instance_id ? `Instance ${data.by_instance_id} took over` : "");
      return [head(words(name), EVENT_TONE[name] ?? "gone", ""), el("p", "feed-what", agentButton(String(data.agent_id)), from), why ? el("p", "feed-more", why) : null].filter(Boolean);
    }
    const facts = Object.entries(data).map(([key, value]) => `${words(key)}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");
    return [head(words(name), "warn"), facts ? el("p", "feed-more", facts.length > 300 ? `${facts.slice(0, 300)}…` : facts) : null].filter(Boolean);
  };
  const feedNote = () => {
    const list = $("feed");
    const visible = [...list.children].some((item) => !item.hidden && item.dataset.kind);
    const note = list.querySelector(".nothing");
    if (visible && note) note.remove();
    if (!visible && !note) list.append(el("li", "nothing", "Nothing yet. Recoveries, alarms and changes of health appear here as they happen."));
  };
  const addToFeed = (seq, type, event, fresh) => {
    if (seq <= lastSeq) return;
    lastSeq = seq;
    const list = $("feed");
    const item = el("li", fresh && !document.hidden ? "fresh" : "", ...entryOf(type, event));
    item.dataset.kind = kindOf(type);
    item.hidden = hiddenKinds.has(item.dataset.kind);
    // Somebody who reads further down keeps his place.
    const reading = list.scrollTop > 4 ? list.scrollHeight : 0;
    list.prepend(item);
    while (list.children.length > FEED_MAX) list.lastChild.remove();
    if (reading) list.scrollTop += list.scrollHeight - reading;
    feedNote();
  };
  for (const [kind, label] of KINDS) {
    const chip = el("button", "chip", label);
    chip.type = "button";
    chip.setAttribute("aria-pressed", "true");
    chip.addEventListener("click", () => {
      if (!hiddenKinds.delete(kind)) hiddenKinds.add(kind);
      chip.setAttribute("aria-pressed", String(!hiddenKinds.has(kind)));
      for (const item of $("feed").children) if (item.dataset.kind) item.hidden = hiddenKinds.has(item.dataset.kind);
      feedNote();
    });
    $("feed-chips").append(chip);
  }

  // ---- the stream ------------------------------------------------------------------------------------------------------
  const FEED_TYPES = "execution.recovered,agent.*,system.*";
  const NAMES = ["execution.recovered", ...["registered", "updated", "connected", "degraded", "disconnected", "error", "draining", "gone", "superseded", "flapping", "settled", "quarantined", "released"].map((n) => `agent.${n}`),
    ...["recovery_suspended", "recovery_resumed", "recovery_failing", "slot_leak_repaired", "capacity_rebuilt", "log_regressed", "invalid_entry", "report_refused"].map((n) => `system.${n}`)];
  let source = null, started = false, resumeAfter = 0;
  const onEvent = (message) => {
    resumeAfter = Math.max(resumeAfter, Number(message.lastEventId) || 0);
    let event;
    try { event = JSON.parse(message.data); } catch { return; }
    addToFeed(Number(message.lastEventId), message.type, event, true);
    if (message.type.startsWith("agent.")) agentsAt = 0;
    soon();
  };
  const follow = () => {
    source?.close();
    source = new EventSource(`/events?type=${encodeURIComponent(FEED_TYPES)}&after=${resumeAfter}`);
    for (const name of NAMES) source.addEventListener(name, onEvent);
    source.onopen = () => { connection.stream = "live"; connection.tries = 0; showConnection(); soon(); };
    source.onerror = () => {
      lost();
      connection.stream = "waiting";
      showConnection();
      // The browser retries by itself after a cut, but not after an error answer.
      if (source.readyState === EventSource.CLOSED) setTimeout(begin, Math.min(RECONNECT_MAX_MS, 500 * 2 ** Math.min(connection.tries, 6)));
    };
  };
  // The last entries, then everything after them: no gap between the two.
  const begin = async () => {
    try {
      const answer = await get(`/api/events?limit=${FEED_MAX}&type=${encodeURIComponent(FEED_TYPES)}`);
      // The log is shorter than what was seen: it was replaced, and so is everything here.
      if (answer.next < resumeAfter) { lastSeq = 0; $("feed").replaceChildren(); }
      connection.notReady = "";
      for (const { seq, event } of answer.events) addToFeed(seq, String(event.type).replace(/^rollcall\./, ""), event, started);
      started = true;
      resumeAfter = answer.next;
      feedNote();
      follow();
    } catch (error) {
      lost();
      connection.stream = "waiting";
      connection.notReady = error.code === "not_ready" ? error.message.replace("still ", "") : "";
      showConnection();
      setTimeout(begin, Math.min(RECONNECT_MAX_MS, 500 * 2 ** Math.min(connection.tries, 5)));
    }
  };

  // ---- polling: numbers and tables follow the log's position ----------------------------------------------------------
  const guarded = async (promise) => {
    try {
      const value = await promise;
      connection.api = true;
      return value;
    } catch (error) {
      // An answer that says no is an answer.
      if (!(error instanceof HttpError) || error.status >= 500) { lost(); connection.api = error.code === "not_ready"; }
      showConnection();
      return null;
    }
  };
  let polling = false, again = false, seenSeq = -1;
  const poll = async () => {
    if (polling) { again = true; return; }
    polling = true;
    try {
      const summary = await guarded(get("/api/summary"));
      if (summary) {
        showSummary(summary);
        const moved = summary.log.seq !== seenSeq;
        seenSeq = summary.log.seq;
        const large = allAgents.length > AGENTS_LARGE ? AGENTS_POLL_LARGE_MS : 0;
        if (moved) await Promise.all([loadExecutions(), Date.now() - agentsAt >= large ? loadAgents() : null, refreshDetail()]);
      }
      showConnection();
    } finally { polling = false; }
  };
  let last = 0, timer = 0;
  // At most once in POLL_MS, at once when it is due.
  const soon = () => {
    if (timer || document.hidden) return;
    timer = setTimeout(async () => { timer = 0; last = Date.now(); again = false; await poll(); if (again) soon(); }, Math.max(0, POLL_MS - (Date.now() - last)));
  };
  setInterval(() => { if (!document.hidden) { soon(); paintTimes(); showConnection(); } }, POLL_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) { paintTimes(); soon(); } });

  // ---- one execution -----------------------------------------------------------------------------------------------------
  const dialog = $("detail");
  let shown = "", shownSeq = -1;
  const sentence = (name, data) => {
    switch (name) {
      case "submitted": return `to ${data.agent_id ?? `pool ${data.pool}`}, priority ${data.priority}, ${data.on_loss === "requeue" ? `queued again when lost, at most ${data.max_attempts} attempts` : "fails when lost"}`;
      case "queued": return `at place ${data.position}${data.agent_id ? ` of ${data.agent_id}` : ""}${data.reason ? `, because ${words(data.reason).toLowerCase()}` : ""}`;
      case "dispatched": return `to ${data.agent_id}, attempt ${data.attempt}, ${span(data.timeout_ms)} until ${clock(data.deadline)}`;
      case "started": return `on ${data.agent_id}, attempt ${data.attempt}`;
      case "cancel_requested": return `by ${data.by}: ${data.reason}`;
      case "completed": return `${data.agent_id ? `on ${data.agent_id}` : ""}${data.result ? `, result of ${count(data.result.bytes)} bytes` : ""}${data.late ? ", after it had been recovered" : ""}`.replace(/^, /, "");
      case "failed": return `${data.error?.code ?? ""}: ${data.error?.message ?? ""}`;
      case "cancelled": return `${data.reason} (${words(data.confirmed_by).toLowerCase()})`;
      case "expired": return `after waiting ${span(data.waited_ms)}`;
      case "recovered": return `${(REASON[data.reason] ?? [words(data.reason)])[0]}: ${ended(data.message)} ${words(becameOf(data))}. Noticed ${span(data.detected_after_ms)} after it became true; ${certain[data.terminate] ?? ""}.`;
      case "retried": return `by ${data.by}, as attempt ${data.attempt}`;
      case "late_result": return `${data.outcome} of attempt ${data.attempt} no longer counts: ${data.because}`;
      default: return "";
    }
  };
  const fact = (label, ...value) => el("div", "", el("dt", "", label), el("dd", "", ...value));
  const showDetail = (view) => {
    if (view.seq === shownSeq && shown === view.execution_id) return;
    shownSeq = view.seq;
    setText($("detail-title"), view.execution_id);
    $("detail-state").replaceChildren(badge(named(STATE, view.state)), view.late ? el("span", "mark", "late") : "");
    const labels = Object.entries(view.labels ?? {}).map(([key, value]) => `${key}=${value}`).join(" ");
    $("detail-facts").replaceChildren(...[
      fact("Agent", view.agent_id ?? "any of its pool"), fact("Pool", view.pool), fact("Attempt", String(view.attempt)),
      fact("Losses that count", String(view.losses)), fact("Submitted", clock(view.submitted_at)),
      view.dispatched_at ? fact("Dispatched", clock(view.dispatched_at)) : null, view.deadline ? fact("Deadline", clock(view.deadline)) : null,
      view.ended_at ? fact("Ended", clock(view.ended_at)) : null, view.instance_id ? fact("Instance", el("span", "mono", view.instance_id)) : null,
      view.failure ? fact("Error", `${view.failure.code}: ${view.failure.message}`) : view.reason ? fact("Reason", words(view.reason)) : null,
      labels ? fact("Labels", el("span", "mono", labels)) : null,
    ].filter(Boolean));
    const opened = new Set([...document.querySelectorAll("#detail-history details[open]")].map((node) => node.dataset.seq));
    let before = null;
    $("detail-history").replaceChildren(...view.history.map(({ seq, event }) => {
      const name = String(event.type).split(".").pop();
      const at = Date.parse(event.time);
      const after = before === null ? "" : `+${span(at - before)}`;
      before = at;
      const raw = el("details", "", el("summary", "", `Event ${seq}`), el("pre", "mono", JSON.stringify(event, null, 2)));
      raw.dataset.seq = String(seq);
      raw.open = opened.has(String(seq));
      return el("li", EVENT_TONE[name] ?? "gone", el("div", "h-top", el("b", "", words(name)), el("span", "quiet num", clock(event.time)), el("span", "quiet num", after)), el("p", "", sentence(name, event.data ?? {})), raw);
    }));
  };
  const refreshDetail = async () => {
    if (!shown) return;
    const asked = shown;
    try {
      const view = await get(`/api/executions/${encodeURIComponent(asked)}`);
      if (shown === asked) showDetail(view);
    } catch (error) {
      if (shown === asked && shownSeq < 0) {
        setText($("detail-title"), asked);
        $("detail-state").replaceChildren(error.status === 404 ? "There is no such execution." : `It can't be shown now: ${error.message}`);
        $("detail-facts").replaceChildren();
        $("detail-history").replaceChildren();
      }
    }
  };
  const route = () => {
    const match = location.hash.match(/^#\/execution\/(.+)$/);
    let id = "";
    try { id = match ? decodeURIComponent(match[1]) : ""; } catch { id = ""; }
    shown = id;
    shownSeq = -1;
    if (!id) { if (dialog.open) dialog.close(); return; }
    setText($("detail-title"), id);
    $("detail-state").replaceChildren("Reading its history");
    $("detail-facts").replaceChildren();
    $("detail-history").replaceChildren();
    if (!dialog.open) dialog.showModal();
    refreshDetail();
  };
  dialog.addEventListener("close", () => { if (shown) { shown = ""; history.replaceState(null, "", location.pathname); } });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  $("detail-close").addEventListener("click", () => dialog.close());
  window.addEventListener("hashchange", route);

  // ---- the rest ----------------------------------------------------------------------------------------------------------
  $("agent-search").addEventListener("input", showAgents);
  $("agents-more").addEventListener("click", () => { showAllAgents = true; showAgents(); });
  $("executions-more").addEventListener("click", () => { rowLimit = Math.min(ROWS_MAX, rowLimit * 2); loadExecutions(); });
  $("agent-filter-clear").addEventListener("click", () => chooseAgent(""));
  const THEMES = { auto: ["◐ Auto", "as the system"], light: ["○ Light", "light"], dark: ["● Dark", "dark"] };
  const remember = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } }, set: (value) => { try { localStorage.setItem("theme", value); } catch { /* a private window: not remembered */ } } };
  const setTheme = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = theme;
    setText($("theme"), THEMES[theme][0]);
    $("theme").setAttribute("aria-label", `Colours: ${THEMES[theme][1]}`);
    $("theme").dataset.theme = theme;
  };
  $("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf($("theme").dataset.theme) + 1) % names.length];
    remember.set(next);
    setTheme(next);
  });
  setTheme(remember.get() in THEMES ? remember.get() : "auto");
  showConnection();
  route();
  begin();
  poll();
})();
