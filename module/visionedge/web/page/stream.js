"use strict";

/* How the page talks to the module: every request carries the token, and one stream carries all frame objects. */

const TOKEN_KEY = "visionedge.token";

class Refused extends Error {}

const wire = {
  get token() {
    return sessionStorage.getItem(TOKEN_KEY);
  },

  remember(token) {
    if (token) sessionStorage.setItem(TOKEN_KEY, token);
    else sessionStorage.removeItem(TOKEN_KEY);
  },

  async get(path, options = {}) {
    const headers = this.token ? { Authorization: "Bearer " + this.token } : {};
    const answer = await fetch(path, { cache: "no-store", ...options, headers });
    if (answer.status === 401) throw new Refused("the token is missing or wrong");
    return answer;
  },

  async json(path, fine = [200]) {
    const answer = await this.get(path, { signal: AbortSignal.timeout(8000) });
    if (!fine.includes(answer.status)) throw new Error(path + " answered " + answer.status);
    return answer.json();
  },
};

/* Server-sent events through fetch, since EventSource cannot send the token. Calls back with each frame object. */
async function followFrames(signal, onHeard, onFrame) {
  const answer = await wire.get("/api/v1/frames", { signal });
  if (!answer.ok) throw new Error("the stream of frames answered " + answer.status);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    onHeard();
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
      if (data.length) onFrame(JSON.parse(data.join("\n")));
    }
  }
}
