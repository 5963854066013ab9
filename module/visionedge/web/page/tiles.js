/* One tile per camera: its picture with boxes on a canvas, its state, its rate and what was found. */

const MEMORY = 90; // frame objects kept per camera, to find the one that belongs to a picture
const STATES = {
  live: ["good", "live"], waiting: ["warn", "waiting"], connecting: ["warn", "connecting"], reconnecting: ["warn", "reconnecting"],
  stale: ["warn", "stale"], frozen: ["warn", "frozen"], black: ["warn", "black"],
  failed: ["bad", "failed"], ended: ["", "ended"], stopped: ["", "stopped"],
};

const WAITING = { waiting: "Waiting for the engine…", connecting: "Connecting…", reconnecting: "Reconnecting…", failed: "No picture", ended: "No picture", stopped: "Switched off" };

// The same colours as the module draws into its annotated pictures.
const colourOf = (classId) => `hsl(${((classId * 0.381966) % 1) * 360} 85% 60%)`;

function make(kind, className, text) {
  const node = document.createElement(kind);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function put(node, text) {
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

class Tile {
  constructor(name) {
    this.name = name;
    this.frames = new Map(); // sequence -> frame object
    this.newest = -1; // sequence of the newest frame object
    this.shown = -1; // sequence of the picture on the canvas
    this.fetching = false;
    this.visible = true;
    this.notBefore = 0;
    this.build();
  }

  build() {
    this.node = make("article", "tile");
    this.node.setAttribute("aria-label", "Camera " + this.name);
    const view = make("div", "view");
    this.canvas = make("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "Live picture of " + this.name);
    this.hint = make("div", "hint", "Waiting for the first frame");
    this.dim = make("div", "dim");
    this.dim.hidden = true;
    view.append(this.canvas, this.hint, this.dim);
    const head = make("div", "head");
    this.badge = make("span", "badge");
    this.numbers = make("span", "numbers");
    this.fps = make("b");
    this.age = make("span");
    this.numbers.append(this.fps, this.age);
    const title = make("h3", "", this.name);
    title.title = this.name;
    head.append(title, this.badge, this.numbers);
    this.found = make("ul", "found");
    this.error = make("p", "error");
    this.error.hidden = true;
    this.node.append(view, head, this.found, this.error);
    this.view = view;
  }

  /* What /api/v1/cameras says of it. */
  tell(camera) {
    const [tone, word] = STATES[camera.state] || ["warn", camera.state];
    this.badge.className = "badge " + tone;
    put(this.badge, word);
    const gone = tone !== "good" && tone !== "";
    this.dim.hidden = !(gone && this.shown >= 0);
    put(this.dim, "This is the last picture");
    if (this.shown < 0) put(this.hint, WAITING[word] || "Waiting for the first frame");
    if (this.newest < 0 && typeof camera.ageMs === "number") this.catchUp();
    const most = (camera.throttle || {}).fps;
    put(this.fps, (camera.fps || 0).toFixed(1) + " fps" + (most ? `, limit ${most}` : ""));
    put(this.age, camera.ageMs === null || camera.ageMs === undefined ? "" : " · " + duration(camera.ageMs) + " old");
    const error = gone || camera.state === "ended" ? camera.lastError || "" : "";
    this.error.hidden = !error;
    this.found.hidden = Boolean(error);
    put(this.error, error);
  }

  /* A camera that gives nothing new: its last frame is asked for once, the stream will not bring it. */
  async catchUp() {
    this.newest = 0;
    const answer = await wire.get(`/api/v1/cameras/${encodeURIComponent(this.name)}/frame`).catch(() => null);
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
      const path = `/api/v1/cameras/${encodeURIComponent(this.name)}/snapshot.jpg?width=${Math.max(320, width)}`;
      const answer = await wire.get(path, { signal: AbortSignal.timeout(8000) });
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
    if (!frame) return;
    for (const found of [...frame.detections].reverse()) this.drawBox(pen, place, found, scale);
    this.count(frame.detections);
  }

  drawBox(pen, place, found, scale) {
    const line = Math.max(2, 2 * scale);
    const x = place.x + found.box.left * place.w;
    const y = place.y + found.box.top * place.h;
    const w = found.box.width * place.w;
    const h = found.box.height * place.h;
    const colour = colourOf(found.classId);
    const rect = [
      Math.max(x, line / 2), Math.max(y, line / 2),
      Math.min(w, pen.canvas.width - x - line / 2), Math.min(h, pen.canvas.height - y - line / 2),
    ];
    pen.strokeStyle = "rgb(0 0 0 / 55%)";
    pen.lineWidth = line + 2 * scale;
    pen.strokeRect(...rect);
    pen.strokeStyle = colour;
    pen.lineWidth = line;
    pen.strokeRect(...rect);
    const size = 12 * scale;
    pen.font = `600 ${size}px system-ui, sans-serif`;
    const caption = `${found.label} ${Math.round(found.confidence * 100)}%`;
    const wide = pen.measureText(caption).width + size * 0.8;
    const tall = size * 1.5;
    const left = Math.max(0, Math.min(x - line / 2, pen.canvas.width - wide));
    const top = y >= tall ? y - tall : Math.max(0, y);
    pen.fillStyle = colour;
    pen.fillRect(left, top, wide, tall);
    pen.fillStyle = "#0b1210";
    pen.textBaseline = "middle";
    pen.fillText(caption, left + size * 0.4, top + tall / 2 + scale * 0.5);
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
  }
}
