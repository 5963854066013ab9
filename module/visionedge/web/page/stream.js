"use strict";

/* Requests to the module, each with the token, and one stream that brings all frame objects and scene events. */

const TOKEN_KEY = "visionedge.token";
/* The path of the page: a reverse proxy may serve the module below a path. */
const BASE = location.pathname.replace(/[^/]*$/, "");

class Unauthorized extends Error {}

const api = {
  aheadMs: 0, // how far this browser's clock is ahead of the module's

  get token() {
    return sessionStorage.getItem(TOKEN_KEY);
  },

  remember(token) {
    if (token) sessionStorage.setItem(TOKEN_KEY, token);
    else sessionStorage.removeItem(TOKEN_KEY);
  },

  /* `path` without a slash in front. */
  async get(path, options = {}) {
    const headers = this.token ? { Authorization: "Bearer " + this.token } : {};
    const answer = await fetch(BASE + path, { cache: "no-store", ...options, headers });
    if (answer.status === 401) throw new Unauthorized("the token is missing or wrong");
    const date = Date.parse(answer.headers.get("Date"));
    if (date) this.aheadMs = Date.now() - date;
    return answer;
  },

  async json(path, fine = [200]) {
    const answer = await this.get(path, { signal: AbortSignal.timeout(8000) });
    if (!fine.includes(answer.status)) throw new Error(path + " answered " + answer.status);
    return answer.json();
  },
};

/* Server-sent events through fetch, since EventSource cannot send the token. Calls back with each frame object
   (kind `frame`) and scene event (kind `scene`). */
async function followFrames(signal, onOpen, onHeard, onItem) {
  const answer = await api.get("api/v1/frames?events=1", { signal });
  if (!answer.ok) throw new Error("the stream of frames answered " + answer.status);
  onOpen();
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    onHeard();
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const valuesOf = (field) => event.split("\n").filter((line) => line.startsWith(field)).map((line) => line.slice(field.length));
      const data = valuesOf("data: ");
      if (data.length) onItem(valuesOf("event: ")[0] || "frame", JSON.parse(data.join("\n")));
    }
  }
}

const SILENT_MS = 40000; // the module sends a comment every 15 s; a stream that is silent for 40 s is lost
const LEADER_GONE_MS = 5000; // the leader announces itself every 2 s
const ANSWER_MS = 400; // so long a window waits for a leader's answer before it leads itself

/* The frames and scene events of all cameras, for all windows of this browser that show this module.

   A browser opens six connections to a host for all of its windows, and a stream keeps one for as long as it
   lasts. So one window, the leader, follows the stream and passes the frames on to the others. A window that is
   hidden resigns; of two leaders the one with the larger id resigns. */
class SharedFrames {
  /* `handlers`: what is done with a `frame`, with a `scene` event, and when a stream has been opened (`open`). */
  constructor(handlers) {
    this.handlers = handlers;
    this.id = Math.random();
    this.stream = null; // the AbortController of the stream, in the leader
    this.leaderHeard = -Infinity;
    this.streamHeard = 0;
    this.channel = new BroadcastChannel("visionedge.frames:" + BASE);
    this.channel.onmessage = ({ data }) => this.receive(data);
    this.wanted = false;
  }

  /* To be called every 2 s: follow the stream while `wanted`, in this window or in another. */
  async keep(wanted) {
    const begins = wanted && !this.wanted;
    this.wanted = wanted;
    if (!wanted) return this.resign();
    const now = performance.now();
    if (this.stream) {
      if (now - this.streamHeard > SILENT_MS) this.stream.abort();
      return this.post("leader");
    }
    if (begins) {
      this.post("who");
      await new Promise((resolve) => setTimeout(resolve, ANSWER_MS * (0.5 + Math.random())));
    }
    if (this.wanted && !this.stream && performance.now() - this.leaderHeard > LEADER_GONE_MS) await this.lead();
  }

  post(kind, item) {
    this.channel.postMessage({ kind, id: this.id, item });
  }

  /* Do what is to be done with an item, in all windows. */
  share(kind, item) {
    this.post(kind, item);
    this.handlers[kind]?.(item);
  }

  receive({ kind, id, item }) {
    if (Object.hasOwn(this.handlers, kind)) this.wanted && this.handlers[kind](item);
    else if (kind === "who" && this.stream) this.post("leader");
    else if (kind === "resigned") this.leaderHeard = -Infinity;
    else if (kind === "leader") {
      this.leaderHeard = performance.now();
      if (this.stream && id < this.id) this.stream.abort();
    }
  }

  resign() {
    if (!this.stream) return;
    this.stream.abort();
    this.post("resigned");
  }

  async lead() {
    const stream = (this.stream = new AbortController());
    this.post("leader");
    this.streamHeard = performance.now();
    const onHeard = () => (this.streamHeard = performance.now());
    try {
      await followFrames(stream.signal, () => this.share("open"), onHeard, (kind, item) => this.share(kind, item));
    } catch (error) {
      // The next poll reports it; the stream is opened again by the next `keep`.
      if (!(error instanceof Unauthorized) && error.name !== "AbortError") console.info(error.message);
    } finally {
      this.stream = null;
    }
  }
}
