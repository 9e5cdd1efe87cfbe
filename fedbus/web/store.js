// The state of the page, folded from the feed: the last message of each subject, and the newest messages.
//
// The feed's ids are cursors into both streams. The browser sends the last one when it reconnects, so no
// message is lost; folding is by sequence number, so no message counts twice.

const MAX_RECENT = 5000;
const RETRY_MS = [500, 1000, 2000, 4000, 8000];

export class Store extends EventTarget {
  constructor() {
    super();
    this.about = { federation: "", version: "", acts: false, trace_url: "", lifecycles: {} };
    this.link = "connecting";
    this.recent = [];
    this.count = 0;
    this.token = sessionStorage.getItem("fedbus-token") ?? "";
    this.tries = 0;
    this.forget();
  }

  forget() {
    this.subjects = new Map();
    this.clients = new Map();
    this.runs = new Map();
    this.servers = new Map();
    this.codes = new Map();
    this.schedules = new Map();
    this.lastSeen = new Map();
    this.devices = new Map();
    this.cursor = "";
  }

  // --- connection ----------------------------------------------------------

  async begin() {
    try {
      this.about = await this.get("api/about");
      const state = await this.get("api/state");
      const recent = await this.get("api/recent?limit=2000");
      this.forget();
      for (const record of state.records) this.fold(record);
      this.updatePresence(state.presence);
      this.recent = recent;
      this.count = recent.length;
      this.cursor = state.cursor;
      this.notify("reset");
      this.listen();
    } catch (error) {
      this.lost(error.message);
    }
  }

  listen() {
    this.source?.close();
    const source = (this.source = new EventSource(`api/feed?after=${encodeURIComponent(this.cursor)}`));
    source.onopen = () => {
      this.tries = 0;
      this.linked("live");
    };
    source.onmessage = (event) => {
      this.cursor = event.lastEventId;
      this.take(JSON.parse(event.data));
    };
    source.addEventListener("heard", (event) => {
      this.updatePresence(JSON.parse(event.data));
      this.notify("presence");
    });
    source.addEventListener("lost", () => {
      source.close();
      this.begin();
    });
    source.onerror = () => {
      if (source !== this.source) return;
      source.close();
      this.lost("the connection to the gateway is broken");
    };
  }

  lost(reason) {
    if (this.link !== "lost") this.lostAt = new Date().toISOString();
    this.linked("lost", reason);
    const pause = RETRY_MS[Math.min(this.tries++, RETRY_MS.length - 1)];
    clearTimeout(this.retryTimer);
    this.retryTimer = setTimeout(() => (this.cursor ? this.listen() : this.begin()), pause);
  }

  linked(state, reason = "") {
    this.link = state;
    this.reason = reason;
    this.dispatchEvent(new Event("link"));
  }

  async get(path) {
    const response = await fetch(path, { headers: { Accept: "application/json" } });
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(answer.error ?? `${response.status} ${response.statusText}`);
    return answer;
  }

  /** Send a request; throws an Error with the reason of a refusal. */
  async act(name, request) {
    const response = await this.post(`api/actions/${name}`, this.token, request);
    const answer = await response.json().catch(() => ({}));
    if (response.status === 401) this.unlock("");
    if (!response.ok) throw new Error(answer.error ?? `${response.status} ${response.statusText}`);
    return answer;
  }

  post(path, token, body) {
    return fetch(path, { method: "POST", headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` }, body: JSON.stringify(body) });
  }

  /** Why *token* is rejected; "" if it is accepted. */
  async refuses(token) {
    if (!/^[\x21-\x7e]+$/.test(token)) return "Invalid token: only printable ASCII characters are allowed";
    const response = await this.post("api/token", token, {});
    return response.ok ? "" : (await response.json().catch(() => ({}))).error ?? response.statusText;
  }

  unlock(token) {
    this.token = token;
    if (token) sessionStorage.setItem("fedbus-token", token);
    else sessionStorage.removeItem("fedbus-token");
    this.dispatchEvent(new Event("link"));
    this.notify("reset");
  }

  get mayAct() {
    return this.about.acts && this.token !== "";
  }

  /** Take in last-seen times and device reports, which have no sequence number. */
  updatePresence({ heard, devices }) {
    for (const [client, at] of Object.entries(heard)) this.lastSeen.set(client, at);
    for (const [client, report] of Object.entries(devices)) this.devices.set(client, report);
  }

  // --- folding ----------------------------------------------------------------------------------

  take(records) {
    for (const record of records) {
      this.fold(record);
      this.recent.push(record);
    }
    this.count += records.length;
    if (this.recent.length > MAX_RECENT * 1.2) this.recent.splice(0, this.recent.length - MAX_RECENT);
    this.notify("news", records);
  }

  fold(record) {
    const sender = record.source.slice(record.source.lastIndexOf("/") + 1);
    if (record.body.client === sender && !(this.lastSeen.get(sender) > record.at)) this.lastSeen.set(sender, record.at);
    const previous = this.subjects.get(record.subject);
    if (previous && previous.n >= record.n) return;
    if (record.word === "transition") {
      this.subjects.set(record.subject, record);
      this.move(record);
    } else if (record.body.client && record.subject.split(".")[2] === "client" && record.word !== "round_reply") {
      this.subjects.set(record.subject, record);
      this.client(record.body).latest[record.word] = record;
    }
  }

  move(record) {
    const facts = record.body.facts;
    switch (facts.kind) {
      case "client":
      case "fl_client":
      case "inference":
        this.client(facts)[facts.kind] = record;
        break;
      case "run":
        this.runs.set(facts.run, record);
        break;
      case "server":
        this.servers.set(facts.task, record);
        break;
      case "code":
        this.codes.set(facts.task, record);
        break;
      case "schedule":
        this.schedules.set(facts.task, record);
        break;
    }
  }

  client({ client, task }) {
    const key = `${client} ${task}`;
    let view = this.clients.get(key);
    if (!view) this.clients.set(key, (view = { key, name: client, task, latest: {} }));
    return view;
  }

  /** Runs, the newest first. */
  runList() {
    return [...this.runs.values()].sort((a, b) => b.body.facts.requested_at.localeCompare(a.body.facts.requested_at));
  }

  tasks() {
    return [...new Set([...this.servers.keys(), ...this.codes.keys(), ...[...this.runs.values()].map((run) => run.body.task)])].sort();
  }

  /** The run of *task* that has not ended. */
  openRun(task) {
    return this.runList().find((run) => run.body.task === task && !FINAL_STATES.has(run.body.target));
  }

  notify(type, detail = null) {
    this.dispatchEvent(new CustomEvent("change", { detail: { type, records: detail } }));
  }
}

export const FINAL_STATES = new Set(["finished", "failed", "cancelled"]);
