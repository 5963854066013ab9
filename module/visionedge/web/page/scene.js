/* Zones, lines and tracks over a tile's picture, and the list of the newest scene events. */

const TAIL_MS = 2000;
const EVENTS_SHOWN = 50;
const COUNTS_MS = 300; // an event brings more events: their counts are fetched once for all
const COUNTS_STALE_MS = 10000; // without events, too: a rule that was edited begins at 0, and a slow page loses events
const ARROWS = "→↘↓↙←↖↑↗"; // clockwise from the right, as y points downwards

/* The arrow of who crosses a line, with the picture's own width and height. */
function crossingArrow([start, end], direction, width, height) {
  const side = direction === "left-to-right" ? 1 : -1;
  const [x, y] = [-(end[1] - start[1]) * height * side, (end[0] - start[0]) * width * side];
  return ARROWS[Math.round((Math.atan2(y, x) / (2 * Math.PI)) * 8 + 8) % 8];
}

const sumOf = (counts) => Object.values(counts || {}).reduce((sum, count) => sum + count, 0);

/* The zones and lines of one camera with their counts, and the tails of its tracks. */
class SceneOverlay {
  constructor(name) {
    this.name = name;
    this.zones = {}; // name -> polygon
    this.lines = {}; // name -> [start, end]
    this.counts = null; // the answer of /scene
    this.key = "";
    this.timer = 0;
    this.countedAt = 0;
  }

  get hasRules() {
    return this.key !== "";
  }

  /* Use the geometry of a camera's object; called every 2 s. */
  configure({ zones = {}, lines = {} }) {
    const hasAny = Object.keys(zones).length + Object.keys(lines).length > 0;
    const key = hasAny ? JSON.stringify([zones, lines]) : "";
    if (key === this.key) {
      if (performance.now() - this.countedAt > COUNTS_STALE_MS) this.refresh();
      return;
    }
    Object.assign(this, { key, zones, lines, counts: null });
    this.refresh();
  }

  /* Fetch the counts soon. */
  refresh() {
    if (this.timer || !this.hasRules) return;
    this.timer = setTimeout(async () => {
      this.timer = 0;
      this.countedAt = performance.now();
      const path = `api/v1/cameras/${encodeURIComponent(this.name)}/scene`;
      this.counts = await api.json(path).catch(() => this.counts);
    }, COUNTS_MS);
  }

  /* Draw zones and lines below the boxes. */
  drawRules(pen, place, scale) {
    const at = ([x, y]) => [place.x + x * place.w, place.y + y * place.h];
    pen.lineJoin = "round";
    for (const [name, polygon] of Object.entries(this.zones)) {
      const path = new Path2D();
      for (const point of polygon) path.lineTo(...at(point));
      path.closePath();
      const inside = sumOf(this.counts?.zones?.[name]?.inside);
      pen.fillStyle = inside ? "rgb(79 209 192 / 26%)" : "rgb(79 209 192 / 10%)";
      pen.fill(path);
      this.stroke(pen, path, "#4fd1c0", scale);
    }
    for (const [start, end] of Object.values(this.lines)) {
      const path = new Path2D();
      path.moveTo(...at(start));
      path.lineTo(...at(end));
      this.stroke(pen, path, "#ffd27a", scale);
    }
  }

  stroke(pen, path, colour, scale) {
    pen.strokeStyle = "rgb(0 0 0 / 55%)";
    pen.lineWidth = 4 * scale;
    pen.stroke(path);
    pen.strokeStyle = colour;
    pen.lineWidth = 2 * scale;
    pen.stroke(path);
  }

  /* Where the names and counts go: inside the picture, not over each other. */
  placeLabels(pen, place, scale, size) {
    const labels = [];
    const put = (text, [x, y], accent) => {
      pen.font = `600 ${size}px system-ui, sans-serif`;
      const tall = size * 1.5;
      const w = pen.measureText(text).width + size * 0.9;
      const left = Math.max(place.x, Math.min(place.x + x * place.w + 3 * scale, place.x + place.w - w));
      const lowest = place.y + place.h - tall;
      let top = Math.max(place.y, Math.min(place.y + y * place.h + 3 * scale, lowest));
      const hit = () => labels.find((other) =>
        left < other.left + other.w && other.left < left + w && top < other.top + tall && other.top < top + tall);
      for (let other = hit(); other && top < lowest; other = hit()) top = Math.min(other.top + tall + scale, lowest);
      labels.push({ left, top, w, tall, size, text, accent });
    };
    for (const [name, polygon] of Object.entries(this.zones)) {
      const highest = polygon.reduce((best, point) => (point[1] - best[1] || point[0] - best[0]) < 0 ? point : best);
      const counts = this.counts?.zones?.[name];
      put(counts ? `${name} ${sumOf(counts.inside)}` : name, highest, "#4fd1c0");
    }
    for (const [name, line] of Object.entries(this.lines)) {
      const counts = this.counts?.lines?.[name];
      const crossed = (direction) => `${crossingArrow(line, direction, place.w, place.h)} ${sumOf(counts[direction])}`;
      const [[x1, y1], [x2, y2]] = line;
      const text = counts ? `${name} ${crossed("left-to-right")} ${crossed("right-to-left")}` : name;
      put(text, [(x1 + x2) / 2, (y1 + y2) / 2], "#ffd27a");
    }
    return labels;
  }

  drawLabel(pen, { left, top, w, tall, size, text, accent }, scale) {
    pen.fillStyle = "rgb(5 10 9 / 84%)";
    pen.fillRect(left, top, w, tall);
    pen.fillStyle = accent;
    pen.fillRect(left, top, 2 * scale, tall);
    pen.fillStyle = "#f2f6f5";
    pen.font = `600 ${size}px system-ui, sans-serif`;
    pen.textBaseline = "middle";
    pen.fillText(text, left + size * 0.5, top + tall / 2 + scale * 0.5);
  }

  /* Where the feet of each track were in the last 2 s before a frame; older parts are fainter. */
  drawTails(pen, place, frame, frames, scale) {
    const now = Date.parse(frame.capturedAt);
    const seen = [...frames.values()]
      .filter((each) => each.sequence <= frame.sequence && now - Date.parse(each.capturedAt) <= TAIL_MS)
      .sort((a, b) => a.sequence - b.sequence);
    pen.lineCap = "round";
    for (const { trackId, classId } of frame.detections) {
      if (typeof trackId !== "number") continue;
      const points = seen.flatMap((each) => {
        const box = each.detections.find((found) => found.trackId === trackId)?.box;
        return box ? [[place.x + (box.left + box.width / 2) * place.w, place.y + (box.top + box.height) * place.h]] : [];
      });
      pen.strokeStyle = colourOf(classId);
      pen.lineWidth = 3 * scale;
      for (let n = 1; n < points.length; n += 1) {
        pen.globalAlpha = (0.9 * n) / points.length;
        pen.beginPath();
        pen.moveTo(...points[n - 1]);
        pen.lineTo(...points[n]);
        pen.stroke();
      }
      pen.globalAlpha = 1;
    }
  }
}

/* What a scene event says in a few words. */
const EVENT_WORDS = {
  "zone-entered": (event) => `${event.label} entered ${event.zone}`,
  "zone-left": (event) => `${event.label} left ${event.zone}`,
  "zone-lost": (event) => `${event.label} lost in ${event.zone}`,
  "zone-dwell": (event) => `${event.label} in ${event.zone} for ${Math.round(event.dwellSeconds)} s`,
  "zone-occupied": (event) => `${event.zone} occupied: ${event.count}`,
  "zone-vacated": (event) => `${event.zone} vacated: ${event.count}`,
  "zone-empty": (event) => `${event.zone} empty`,
  "zone-filled": (event) => `${event.zone} filled`,
  "line-crossed": (event, arrow) => `${event.label} crossed ${event.line} ${arrow || event.direction}`,
};

/* The newest events of all cameras. Rows keep their places and change their texts, so that nothing moves. */
class EventList {
  constructor(panel, list, none, arrowOf) {
    Object.assign(this, { panel, list, none, arrowOf });
    this.events = []; // newest first
    this.ids = new Set();
    this.drawing = false;
  }

  show(isShown) {
    const begins = isShown && this.panel.hidden;
    this.panel.hidden = !isShown;
    if (begins) this.fill();
  }

  /* Take what the log has: at the begin, and whenever the stream had been lost. */
  async fill() {
    if (this.panel.hidden) return;
    const { events } = await api.json(`api/v1/events?limit=${EVENTS_SHOWN}`).catch(() => ({ events: [] }));
    this.add(...events);
  }

  add(...events) {
    const fresh = events.filter((event) => !this.ids.has(event.id));
    if (!fresh.length) return;
    this.events = [...fresh, ...this.events].sort((a, b) => (a.at < b.at) - (a.at > b.at)).slice(0, EVENTS_SHOWN);
    this.ids = new Set(this.events.map((event) => event.id));
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.drawing = false;
    this.none.hidden = this.events.length > 0;
    while (this.list.children.length < this.events.length) {
      const row = make("li");
      row.append(make("time"), make("span", "what"), make("span", "where"));
      this.list.append(row);
    }
    const today = new Date().toDateString();
    for (const [place, event] of this.events.entries()) {
      const [time, what, where] = this.list.children[place].children;
      const at = new Date(event.at);
      const words = EVENT_WORDS[event.type];
      setText(time, at.toDateString() === today ? at.toTimeString().slice(0, 8) : at.toLocaleDateString());
      time.dateTime = event.at;
      setText(what, words ? words(event, this.arrowOf(event)) : event.type);
      what.title = `${what.textContent} (${event.type}${event.trackId ? `, track ${event.trackId}` : ""}, ${at.toLocaleString()})`;
      setText(where, event.camera);
      where.title = event.camera;
    }
  }
}
