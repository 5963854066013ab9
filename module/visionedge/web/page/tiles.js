/* One tile per camera: its picture with boxes on a canvas, its state, its rate and what was found. */

const MEMORY = 90; // frame objects kept per camera, to find the one that belongs to a picture

// by state of the API: tone, label, text in place of a picture, text over the last picture (`over`: nothing in it
// is current; `note`: it still is), what to do
const STATES = {
  live: { tone: "good", word: "live", empty: "Waiting for the first frame" },
  connecting: { tone: "warn", word: "connecting", empty: "Connecting…", over: () => "Connecting…" },
  reconnecting: { tone: "warn", word: "reconnecting", empty: "Reconnecting…", over: (for_) => `No picture for ${for_}` },
  stale: { tone: "warn", word: "stale", empty: "No picture", over: (for_) => `Nothing new for ${for_}` },
  frozen: { tone: "warn", word: "frozen", empty: "No picture", note: (for_) => `Unchanged for ${for_}` },
  black: { tone: "warn", word: "black", empty: "No picture", note: (for_) => `Black for ${for_}` },
  failed: { tone: "bad", word: "failed", empty: "No picture", over: (for_) => `No picture for ${for_}` },
  waiting: { tone: "", word: "waiting", empty: "Waiting for the engine", over: () => "Waiting for the engine" },
  ended: {
    tone: "", word: "ended", empty: "Ended", over: (for_) => `Ended ${for_} ago`,
    advice: "To play it again: the direct method restartCamera, or “loop: true” in the configuration.",
  },
  stopped: { tone: "", word: "stopped", empty: "Switched off", over: (for_) => `Switched off ${for_} ago` },
  disabled: { tone: "", word: "disabled", empty: "Switched off in the configuration", over: () => "Switched off in the configuration" },
};
const UNKNOWN = { tone: "warn", empty: "Waiting for the first frame" };
const IDLE = ["ended", "stopped", "disabled"]; // states without a rate
const NO_ANSWER = { tone: "bad", word: "no answer", empty: "No connection to the module", over: (for_) => `No connection to the module for ${for_}` };

// The same colours as the module draws into its annotated pictures.
const hueOf = (classId) => ((classId * 0.381966) % 1) * 360;
const colourOf = (classId) => `hsl(${hueOf(classId)} 85% 60%)`;

/* Black or white, whichever has the higher contrast (WCAG) with a class's colour; it is 4.5 or more. */
function textColourOf(classId) {
  const channel = (n) => {
    const k = (n + hueOf(classId) / 30) % 12;
    const value = 0.6 - 0.34 * Math.max(-1, Math.min(k - 3, 9 - k, 1));
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  };
  const luminance = 0.2126 * channel(0) + 0.7152 * channel(8) + 0.0722 * channel(4);
  return luminance > 0.179 ? "#000" : "#fff";
}

function make(kind, className, text) {
  const node = document.createElement(kind);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function duration(ms) {
  if (ms < 1000) return Math.round(ms) + " ms";
  if (ms < 60000) return (ms / 1000).toFixed(1) + " s";
  const minutes = Math.floor(ms / 60000);
  if (minutes < 60) return minutes + " min";
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : Math.floor(hours / 24) + " days";
}

/* When the next attempt for a lost camera begins; shown in place of its rate. */
function nextTry({ state, nextTrySeconds }) {
  if (!["reconnecting", "failed"].includes(state)) return "";
  return typeof nextTrySeconds === "number" ? `next try in ${Math.max(1, Math.ceil(nextTrySeconds))} s` : "trying now";
}

/* A relative box in the canvas, of a picture that is drawn at `place`. */
function within(place, box) {
  return { x: place.x + box.left * place.w, y: place.y + box.top * place.h, w: box.width * place.w, h: box.height * place.h };
}

class Tile {
  constructor(name) {
    this.name = name;
    this.frames = new Map(); // sequence -> frame object
    this.newest = -1; // sequence of the newest frame object
    this.shown = -1; // sequence of the picture on the canvas
    this.fetching = false;
    this.visible = true;
    this.notBefore = 0;
    this.scene = new SceneOverlay(name);
    this.build();
  }

  build() {
    this.node = make("article", "tile");
    this.node.setAttribute("aria-label", "Camera " + this.name);
    const view = make("div", "view");
    this.canvas = make("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "Live picture of " + this.name);
    this.hint = make("div", "hint", UNKNOWN.empty);
    this.note = make("div", "note");
    this.note.hidden = true;
    view.append(this.canvas, this.hint, this.note);
    const head = make("div", "head");
    this.badge = make("span", "badge");
    const title = make("h2", "", this.name);
    title.title = this.name;
    head.append(title, this.badge);
    this.numbers = make("p", "numbers");
    this.fps = make("b");
    this.age = make("span");
    this.numbers.append(this.fps, this.age);
    const foot = make("div", "foot"); // of a fixed height: what it holds changes with every frame
    this.found = make("ul", "found");
    this.error = make("p", "error");
    this.error.hidden = true;
    this.advice = make("p", "advice");
    this.advice.hidden = true;
    foot.append(this.found, this.error, this.advice);
    this.node.append(view, head, this.numbers, foot);
    this.view = view;
  }

  /* Show a camera's object of /api/v1/cameras. */
  update(camera) {
    this.since = Date.parse(camera.since) + api.aheadMs;
    this.scene.configure(camera);
    this.node.classList.toggle("tall", (camera.height || 0) > (camera.width || 0) * 1.1);
    const state = STATES[camera.state] || UNKNOWN;
    this.show({ word: camera.state, ...state });
    if (this.newest < 0 && typeof camera.ageMs === "number") this.catchUp();
    const most = (camera.throttle || {}).fps;
    const rate = (camera.fps || 0).toFixed(1) + " fps" + (most ? `, limit ${most}` : "");
    const aged = typeof camera.ageMs === "number" ? " · " + duration(camera.ageMs) + " old" : "";
    const idle = IDLE.includes(camera.state);
    setText(this.fps, idle ? "" : nextTry(camera) || rate);
    setText(this.age, idle ? "" : aged);
    const error = camera.state === "live" ? "" : camera.lastError || "";
    this.found.hidden = Boolean(error || state.over);
    this.say(this.error, error);
    this.say(this.advice, error ? "" : state.advice || "");
  }

  /* The module does not answer, so the camera's state is unknown. */
  showNoAnswer(since) {
    this.since = since;
    this.show(NO_ANSWER);
    setText(this.fps, "");
    setText(this.age, "");
    this.found.hidden = true;
    this.say(this.advice, "");
  }

  /* A line below the picture, in full in its tooltip; none without a text. */
  say(line, text) {
    line.hidden = !text;
    line.title = text;
    setText(line, text);
  }

  show(state) {
    this.badge.className = "badge " + state.tone;
    setText(this.badge, state.word);
    setText(this.hint, state.empty);
    const words = state.over || state.note;
    const seen = this.shown >= 0;
    this.note.hidden = !(seen && words);
    this.canvas.classList.toggle("old", Boolean(state.over));
    // In whole seconds: the clock of the answer is no finer.
    if (words) setText(this.note, words(this.since ? duration(Math.max(1000, Date.now() - this.since)) : "some time"));
  }

  /* Fetch the last frame object once: the stream sends none while a camera sends no new pictures. */
  async catchUp() {
    this.newest = 0;
    const answer = await api.get(`api/v1/cameras/${encodeURIComponent(this.name)}/frame`).catch(() => null);
    if (answer && answer.ok) this.remember(await answer.json());
  }

  remember(frame) {
    this.frames.set(frame.sequence, frame);
    if (this.frames.size > MEMORY) this.frames.delete(this.frames.keys().next().value);
    this.newest = Math.max(this.newest, frame.sequence);
    if (this.awaited && this.awaited.sequence === frame.sequence) this.awaited.resolve(frame);
  }

  wants(now) {
    return this.visible && !this.fetching && this.newest > this.shown && now >= this.notBefore;
  }

  /* Fetch the newest picture and draw it with the boxes of that very frame. */
  async refresh(leastMs) {
    this.fetching = true;
    this.notBefore = performance.now() + leastMs;
    try {
      const width = Math.min(1920, Math.ceil((this.view.clientWidth * Math.min(devicePixelRatio, 2)) / 160) * 160);
      const path = `api/v1/cameras/${encodeURIComponent(this.name)}/snapshot.jpg?width=${Math.max(320, width)}`;
      const answer = await api.get(path, { signal: AbortSignal.timeout(8000) });
      if (!answer.ok) {
        this.notBefore = performance.now() + 1000;
        return;
      }
      const sequence = Number(answer.headers.get("X-Visionedge-Sequence"));
      const picture = await createImageBitmap(await answer.blob());
      const frame = await this.frameOf(sequence);
      this.draw(picture, frame);
      picture.close();
      this.shown = sequence;
    } finally {
      this.fetching = false;
    }
  }

  /* The frame object of a picture; it may be a moment behind on the stream. */
  frameOf(sequence) {
    const known = this.frames.get(sequence);
    if (known) return known;
    return new Promise((resolve) => {
      this.awaited = { sequence, resolve };
      setTimeout(() => resolve(null), 400);
    });
  }

  draw(picture, frame) {
    const { canvas } = this;
    const scale = Math.min(devicePixelRatio, 2);
    const width = Math.round(this.view.clientWidth * scale);
    const height = Math.round(this.view.clientHeight * scale);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#070a09";
    pen.fillRect(0, 0, width, height);
    const fit = Math.min(width / picture.width, height / picture.height);
    const place = { w: picture.width * fit, h: picture.height * fit };
    place.x = (width - place.w) / 2;
    place.y = (height - place.h) / 2;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(picture, place.x, place.y, place.w, place.h);
    this.hint.hidden = true;
    this.scene.drawRules(pen, place, scale);
    const labels = this.scene.placeLabels(pen, place, scale, this.captionSize(scale));
    if (frame) {
      this.scene.drawTails(pen, place, frame, this.frames, scale);
      this.drawDetections(pen, place, frame.detections, scale, labels);
    }
    for (const label of labels) this.scene.drawLabel(pen, label, scale);
  }

  /* Boxes, and their captions where no label of a zone or line is. */
  drawDetections(pen, place, detections, scale, labels) {
    const captions = [...labels];
    for (const found of detections) this.placeCaption(pen, place, found, scale, captions);
    // The surest last, so that they lie on top.
    for (const found of [...detections].reverse()) this.drawBox(pen, place, found, scale);
    for (const caption of captions.slice(labels.length).reverse()) this.drawCaption(pen, caption, scale);
    this.count(detections);
  }

  captionSize(scale) {
    return (this.view.clientWidth < 320 ? 10 : 12) * scale;
  }

  drawBox(pen, place, found, scale) {
    const line = Math.max(2, 2 * scale);
    const { x, y, w, h } = within(place, found.box);
    const rect = [
      Math.max(x, line / 2), Math.max(y, line / 2),
      Math.min(w, pen.canvas.width - x - line / 2), Math.min(h, pen.canvas.height - y - line / 2),
    ];
    pen.strokeStyle = "rgb(0 0 0 / 55%)";
    pen.lineWidth = line + 2 * scale;
    pen.strokeRect(...rect);
    pen.strokeStyle = colourOf(found.classId);
    pen.lineWidth = line;
    pen.strokeRect(...rect);
  }

  /* Inside the picture and, where there is room at its box or beside that, not over a caption of a surer detection. */
  placeCaption(pen, place, found, scale, captions) {
    const size = this.captionSize(scale);
    pen.font = `600 ${size}px system-ui, sans-serif`;
    const answers = Object.entries(found.attributes ?? {}).map(([model, label]) => ` ${model}: ${label}`);
    const text = `${found.label} ${Math.round(found.confidence * 100)}%${answers.join("")}`;
    const { x, y, h } = within(place, found.box);
    const w = pen.measureText(text).width + size * 0.8;
    const tall = size * 1.5;
    const held = (left) => Math.max(place.x, Math.min(left, place.x + place.w - w));
    const usual = held(x - scale);
    const lefts = [0, -1, 1].map((widths) => held(usual + widths * w));
    const tops = [y - tall, y, y + h, y + tall, y + h - tall, y + 2 * tall];
    const inside = tops.filter((top) => top >= place.y && top + tall <= place.y + place.h);
    const free = ({ left, top }) => !captions.some((other) =>
      left < other.left + other.w && other.left < left + w && top < other.top + tall && other.top < top + tall);
    const spots = lefts.flatMap((left) => inside.map((top) => ({ left, top })));
    const spot = spots.find(free) ?? spots[0] ?? { left: lefts[0], top: place.y };
    captions.push({ ...spot, w, tall, size, text, classId: found.classId });
  }

  drawCaption(pen, { left, top, w, tall, size, text, classId }, scale) {
    pen.fillStyle = colourOf(classId);
    pen.fillRect(left, top, w, tall);
    pen.fillStyle = textColourOf(classId);
    pen.textBaseline = "middle";
    pen.fillText(text, left + size * 0.4, top + tall / 2 + scale * 0.5);
  }

  count(detections) {
    const counts = new Map();
    for (const { label, classId } of detections) {
      const item = counts.get(label) || { classId, n: 0 };
      item.n += 1;
      counts.set(label, item);
    }
    const key = JSON.stringify([...counts]);
    if (key === this.counted) return;
    this.counted = key;
    const items = [...counts].sort((a, b) => b[1].n - a[1].n).map(([label, { classId, n }]) => {
      const item = make("li");
      const dot = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      dot.setAttribute("viewBox", "0 0 10 10");
      dot.setAttribute("aria-hidden", "true");
      const circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
      for (const [name, value] of [["cx", 5], ["cy", 5], ["r", 5], ["fill", colourOf(classId)]]) circle.setAttribute(name, value);
      dot.append(circle);
      item.append(dot, n > 1 ? `${n} × ${label}` : label);
      return item;
    });
    this.found.replaceChildren(...(items.length ? items : [make("li", "nothing", "Nothing found")]));
    this.fitChips(items);
  }

  /* One line of chips: those that do not fit are counted. */
  fitChips(items) {
    const most = this.found.clientWidth;
    if (this.found.scrollWidth <= most) return;
    const more = make("li", "more");
    this.found.append(more);
    for (let hidden = 1; hidden < items.length; hidden += 1) {
      items[items.length - hidden].remove();
      setText(more, `+${hidden}`);
      if (this.found.scrollWidth <= most) break;
    }
    more.title = items.map((item) => item.textContent).join(", ");
  }
}
