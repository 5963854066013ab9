/* The page: polls the status every 2 s, follows the frames, and fetches the pictures of the tiles in turn. */

const PICTURES_AT_ONCE = 4; // a browser opens six connections to a host; one is the stream, one the state
const $ = (id) => document.getElementById(id);
const tiles = new Map();
let signedOut = false;
let polling = false;
let lostSince = 0; // when the module stopped answering; 0 while it answers

const events = new EventList($("events"), $("event-list"), $("no-events"), (event) => {
  const tile = tiles.get(event.camera);
  const line = tile?.scene.lines[event.line];
  return line && crossingArrow(line, event.direction, tile.view.clientWidth, tile.view.clientHeight);
});

const frames = new SharedFrames({
  frame(frame) {
    const tile = tiles.get(frame.camera);
    if (tile) tile.remember(frame);
    refreshTiles();
  },
  scene(event) {
    events.add(event);
    tiles.get(event.camera)?.scene.refresh();
  },
  // What came while there was no stream.
  open() {
    events.fill();
    for (const tile of tiles.values()) tile.scene.refresh();
  },
});

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.target.tile.visible = entry.isIntersecting;
  refreshTiles();
}, { rootMargin: "60% 0px" }); // a tile that is about to be scrolled to has its picture already

function updateTiles(cameras) {
  const names = cameras.map((camera) => camera.name);
  for (const [name, tile] of tiles) {
    if (names.includes(name)) continue;
    watcher.unobserve(tile.node);
    tile.node.remove();
    tiles.delete(name);
  }
  for (const [place, camera] of cameras.entries()) {
    let tile = tiles.get(camera.name);
    if (!tile) {
      tile = new Tile(camera.name);
      tile.node.tile = tile;
      tiles.set(camera.name, tile);
      watcher.observe(tile.node);
    }
    // In the order of the configuration, whenever a camera came to it.
    if ($("grid").children[place] !== tile.node) $("grid").insertBefore(tile.node, $("grid").children[place] || null);
    tile.update(camera);
  }
  const widths = cameras.length <= 2 ? "480px" : cameras.length <= 9 ? "370px" : "270px";
  $("grid").style.setProperty("--tile", widths);
  for (const tile of tiles.values()) tile.node.classList.toggle("lone", tiles.size === 1);
  const hasRules = [...tiles.values()].some((tile) => tile.scene.hasRules);
  $("board").classList.toggle("with-events", hasRules);
  $("event-list").classList.toggle("one-camera", tiles.size === 1);
  events.show(hasRules);
  $("empty").hidden = cameras.length > 0;
  $("grid").hidden = cameras.length === 0;
}

const DEVICE_NAMES = { cpu: "CPU", cuda: "CUDA", tensorrt: "TensorRT", remote: "remote server", auto: "auto" };
const deviceName = (device) => DEVICE_NAMES[device] || device || "none yet";

function banner(tone, title, text) {
  const node = make("div", "banner " + tone);
  if (tone !== "note") node.setAttribute("role", "alert");
  node.append(make("strong", "", title), make("span", "", text));
  return node;
}

const HIDDEN_KEY = "visionedge.hidden";

/* A note that can be hidden; another note is shown again. */
function hideable(node) {
  const text = node.textContent;
  if (localStorage.getItem(HIDDEN_KEY) === text) return null;
  const button = make("button", "hide", "Hide");
  button.type = "button";
  button.addEventListener("click", () => {
    localStorage.setItem(HIDDEN_KEY, text);
    node.remove();
  });
  node.append(button);
  return node;
}

/* What a CPU deployment needs to know, without the names of onnxruntime's parts; `Why?` has those. */
const NO_GPU = {
  "no-gpu-build": "This installation has no GPU support.",
  "driver-missing": "This machine has no NVIDIA driver.",
  "no-device": "This machine has no NVIDIA GPU.",
};

function withDoctor(node) {
  const button = make("button", "ask-doctor", "Why?");
  button.type = "button";
  node.append(button);
  return node;
}

const PROBING = "The module probes for it, and uses it again when it works.";
const RECOVERY_STAGES = {
  waiting: PROBING,
  probing: PROBING,
  opening: "It answers again: an engine warms up on it.",
  comparing: "It answers again, and is compared with the CPU.",
};

/* The state of the recovery of a lost device; without seconds, because a screen reader reads every change. */
function describeRecovery(recovery) {
  if (!recovery || !RECOVERY_STAGES[recovery.stage]) return "";
  const refused = recovery.reasonCode === "parity-refused" ? ` The last try: ${recovery.reason}.` : "";
  return ` ${RECOVERY_STAGES[recovery.stage]}${refused}`;
}

function deviceDoubts(engine) {
  const refusals = (engine.parity || []).map((result) => result.refusal);
  return [engine.speedCheck && engine.speedCheck.doubt, ...refusals].filter(Boolean);
}

function banners(status, readiness) {
  const nodes = [];
  const engine = status.engine || {};
  const degraded = engine.degraded ?? !["auto", engine.effective].includes(engine.requested);
  const reason = engine.reason || "";
  if (engine.effective && degraded) {
    const title = `Degraded: ${deviceName(engine.requested)} was requested, the ${deviceName(engine.effective)} is used`;
    nodes.push(withDoctor(banner("warn", title, `${reason}.${describeRecovery(engine.recovery)}`)));
  } else if (engine.requested === "auto" && engine.effective === "cpu" && reason) {
    const words = NO_GPU[engine.reasonCode] || "No GPU can be used.";
    nodes.push(hideable(withDoctor(banner("note", "Computing on the CPU", words))));
  }
  if (engine.remote && engine.effective === "remote") {
    nodes.push(hideable(banner("note", "Computing on a server", engine.remote.sentence)));
  }
  const overload = (status.capacity || {}).overload || { levels: [] };
  if (overload.levels.length || overload.exhausted) {
    const title = overload.exhausted ? "Overloaded, and nothing is left to reduce" : "Overloaded: the load is reduced";
    nodes.push(banner("warn", title, overload.levels.map((level) => level.what).join("; ")));
  }
  if (engine.effective !== "cpu" && deviceDoubts(engine).length) {
    nodes.push(withDoctor(banner("warn", `${deviceName(engine.effective)} may not compute correctly`, deviceDoubts(engine).join("; "))));
  }
  if (readiness.reasons) nodes.push(banner("bad", "Not ready", readiness.reasons.join("; ")));
  const shown = nodes.filter(Boolean);
  const key = JSON.stringify(shown.map((node) => node.textContent));
  if ($("banners").dataset.key === key) return;
  $("banners").dataset.key = key;
  $("banners").replaceChildren(...shown);
}

function head(status, cameras) {
  const engine = status.engine || {};
  setText($("version"), status.build?.text ?? status.version ?? "");
  const to = make("span", "to", "→");
  to.setAttribute("aria-label", "in effect");
  $("device").replaceChildren(deviceName(engine.requested), to, deviceName(engine.effective));
  const names = [status.model && status.model.name, ...Object.keys(status.models || {})].filter(Boolean);
  setText($("model"), names.join(", ") || "–");
  const capacity = status.capacity || {};
  // Both of the same window of time: else more could seem to be analysed than was asked for.
  const limited = ["quota", "decode", "engine", "others"].includes(capacity.bottleneck);
  const sum = cameras.reduce((total, camera) => total + (camera.fps || 0), 0);
  const rate = limited ? `${capacity.deliveredPerSecond.toFixed(1)} of ${capacity.demandedPerSecond.toFixed(1)}` : sum.toFixed(1);
  setText($("rate"), rate + " fps");
  $("rate").title = capacity.sentence || "";
  setText($("hub"), (status.hub && status.hub.state) || "–");
  setText($("uptime"), duration((status.uptimeSeconds || 0) * 1000));
}

async function poll() {
  if (polling || document.hidden || signedOut) return;
  polling = true;
  try {
    const status = await api.json("api/v1/status");
    const { cameras } = await api.json("api/v1/cameras");
    const readiness = await api.json("readyz", [200, 503]);
    head(status, cameras);
    banners(status, readiness);
    updateTiles(cameras);
    setText($("link"), "Connected");
    lostSince = 0;
    $("forget").hidden = !api.token;
  } catch (error) {
    if (error instanceof Unauthorized) return signOut(api.token ? "This token is not the right one." : "");
    setText($("link"), "No answer from the module; trying again");
    $("banners").dataset.key = "";
    $("banners").replaceChildren(banner("bad", "No connection", "The module does not answer; what you see is out of date."));
    lostSince = lostSince || Date.now();
    for (const tile of tiles.values()) tile.showNoAnswer(lostSince);
  } finally {
    polling = false;
    document.body.classList.remove("starting");
  }
}

function signOut(problem) {
  signedOut = true;
  api.remember(null);
  frames.keep(false);
  setText($("sign-in-problem"), problem);
  if (!$("sign-in").open) $("sign-in").showModal();
}

/* Fetch pictures for the tiles that have waited longest; with many cameras each gets fewer pictures. */
function refreshTiles() {
  const now = performance.now();
  const leastMs = tiles.size <= 4 ? 66 : tiles.size <= 9 ? 150 : 300;
  const busy = [...tiles.values()].filter((tile) => tile.fetching).length;
  const waiting = [...tiles.values()].filter((tile) => tile.wants(now)).sort((a, b) => a.notBefore - b.notBefore);
  for (const tile of waiting.slice(0, Math.max(0, PICTURES_AT_ONCE - busy))) {
    tile.refresh(leastMs).then(refreshTiles, () => (tile.notBefore = performance.now() + 1000));
  }
}

/* With a token a plain link would be refused: fetch the document and show it in a dialog. */
async function openLinkedDocument(event) {
  const link = event.target.closest("footer nav a");
  if (!link || !api.token) return;
  event.preventDefault();
  const answer = await api.get(link.dataset.path);
  const text = await answer.text();
  setText($("viewer-title"), link.textContent);
  const isJson = (answer.headers.get("Content-Type") || "").includes("json");
  setText($("viewer-text"), isJson ? JSON.stringify(JSON.parse(text), null, 2) : text);
  $("viewer").showModal();
}

$("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.remember($("token").value.trim());
  $("token").value = "";
  signedOut = false;
  $("sign-in").close();
  tick();
});
$("sign-in").addEventListener("cancel", (event) => event.preventDefault());
$("forget").addEventListener("click", () => signOut(""));
$("viewer-close").addEventListener("click", () => $("viewer").close());
document.addEventListener("click", openLinkedDocument);
document.addEventListener("visibilitychange", tick);
window.addEventListener("pagehide", () => frames.keep(false));
for (const link of document.querySelectorAll("a[data-path]")) link.href = BASE + link.dataset.path;

// What would be moved by the first answer is shown with it. Without a script all of it is shown.
document.body.classList.add("starting");

async function tick() {
  await poll();
  frames.keep(!document.hidden && !signedOut);
}
setInterval(tick, 2000);
setInterval(refreshTiles, 250);
tick();
