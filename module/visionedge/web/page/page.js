/* The page: asks for the state every two seconds, follows the frames, and fetches pictures in fair turns. */

const PICTURES_AT_ONCE = 4; // a browser opens six connections to a host; one is the stream, one the state
const $ = (id) => document.getElementById(id);
const tiles = new Map();
let following = null;
let signedOut = false;
let polling = false;
let heard = 0; // when the stream of frames last said anything

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.target.tile.visible = entry.isIntersecting;
  turn();
});

function arrange(cameras) {
  const names = cameras.map((camera) => camera.name);
  for (const [name, tile] of tiles) {
    if (names.includes(name)) continue;
    watcher.unobserve(tile.node);
    tile.node.remove();
    tiles.delete(name);
  }
  for (const camera of cameras) {
    let tile = tiles.get(camera.name);
    if (!tile) {
      tile = new Tile(camera.name);
      tile.node.tile = tile;
      tiles.set(camera.name, tile);
      $("grid").append(tile.node);
      watcher.observe(tile.node);
    }
    tile.tell(camera);
  }
  const widths = cameras.length <= 2 ? "480px" : cameras.length <= 9 ? "370px" : "270px";
  $("grid").style.setProperty("--tile", widths);
  for (const tile of tiles.values()) tile.node.classList.toggle("lone", tiles.size === 1);
  $("empty").hidden = cameras.length > 0;
  $("grid").hidden = cameras.length === 0;
}

const WORDS = { cpu: "CPU", cuda: "CUDA", tensorrt: "TensorRT", auto: "auto" };
const word = (device) => WORDS[device] || device || "none yet";

function banner(tone, title, text) {
  const node = make("div", "banner " + tone);
  if (tone !== "note") node.setAttribute("role", "alert");
  node.append(make("strong", "", title), make("span", "", text));
  return node;
}

function withDoctor(node) {
  const button = make("button", "ask-doctor", "Why?");
  button.type = "button";
  node.append(button);
  return node;
}

const LOOKING = "It is looked for, and put back when it is well.";
const STAGES = {
  waiting: LOOKING,
  probing: LOOKING,
  opening: "It answers again: an engine warms up on it.",
  comparing: "It answers again, and is held against the CPU.",
};

/* What becomes of a device that was lost; without seconds, as every change is read out. */
function outlook(recovery) {
  if (!recovery || !STAGES[recovery.stage]) return "";
  const refused = recovery.reasonCode === "parity-refused" ? ` The last try: ${recovery.reason}.` : "";
  return ` ${STAGES[recovery.stage]}${refused}`;
}

function doubts(engine) {
  const refusals = (engine.parity || []).map((likeness) => likeness.refusal);
  return [engine.pace && engine.pace.doubt, ...refusals].filter(Boolean);
}

function banners(status, readiness) {
  const nodes = [];
  const engine = status.engine || {};
  const degraded = engine.degraded ?? !["auto", engine.effective].includes(engine.requested);
  const reason = engine.reason || "";
  if (engine.effective && degraded) {
    const title = `Degraded: ${word(engine.requested)} was asked for, the ${word(engine.effective)} is used`;
    nodes.push(withDoctor(banner("warn", title, `${reason}.${outlook(engine.recovery)}`)));
  } else if (engine.requested === "auto" && engine.effective === "cpu" && reason) {
    nodes.push(withDoctor(banner("note", "Computing on the CPU", reason)));
  }
  const overload = (status.capacity || {}).overload || { rungs: [] };
  if (overload.rungs.length || overload.exhausted) {
    const title = overload.exhausted ? "Too much, and nothing is left to give up" : "Given up, to keep up";
    nodes.push(banner("warn", title, overload.rungs.map((rung) => rung.what).join("; ")));
  }
  if (engine.effective !== "cpu" && doubts(engine).length) {
    nodes.push(withDoctor(banner("warn", `${word(engine.effective)} is in doubt`, doubts(engine).join("; "))));
  }
  if (readiness.reasons) nodes.push(banner("bad", "Not ready", readiness.reasons.join("; ")));
  const key = JSON.stringify(nodes.map((node) => node.textContent));
  if ($("banners").dataset.key === key) return;
  $("banners").dataset.key = key;
  $("banners").replaceChildren(...nodes);
}

function head(status, cameras) {
  const engine = status.engine || {};
  put($("version"), status.version || "");
  const to = make("span", "to", "→");
  to.setAttribute("aria-label", "in effect");
  $("device").replaceChildren(word(engine.requested), to, word(engine.effective));
  put($("model"), (status.model && status.model.name) || "–");
  const capacity = status.capacity || {};
  const limited = ["decode", "engine", "others"].includes(capacity.bottleneck);
  const demanded = limited ? ` of ${capacity.demandedPerSecond.toFixed(1)}` : "";
  put($("rate"), `${cameras.reduce((sum, camera) => sum + (camera.fps || 0), 0).toFixed(1)}${demanded} fps`);
  $("rate").title = capacity.sentence || "";
  put($("hub"), (status.hub && status.hub.state) || "–");
  put($("uptime"), duration((status.uptimeSeconds || 0) * 1000));
}

async function poll() {
  if (polling || document.hidden || signedOut) return;
  polling = true;
  try {
    const status = await wire.json("/api/v1/status");
    const { cameras } = await wire.json("/api/v1/cameras");
    const readiness = await wire.json("/readyz", [200, 503]);
    head(status, cameras);
    banners(status, readiness);
    arrange(cameras);
    put($("link"), "Connected");
    $("forget").hidden = !wire.token;
  } catch (error) {
    if (error instanceof Refused) return signOut(wire.token ? "This token is not the right one." : "");
    put($("link"), "No answer from the module; trying again");
    $("banners").dataset.key = "";
    $("banners").replaceChildren(banner("bad", "No connection", "The module does not answer; what you see may be old."));
  } finally {
    polling = false;
  }
}

function signOut(problem) {
  signedOut = true;
  wire.remember(null);
  if (following) following.abort();
  put($("sign-in-problem"), problem);
  if (!$("sign-in").open) $("sign-in").showModal();
}

async function follow() {
  if (following || document.hidden || signedOut) return;
  following = new AbortController();
  heard = performance.now();
  const onHeard = () => (heard = performance.now());
  try {
    await followFrames(following.signal, onHeard, (frame) => {
      const tile = tiles.get(frame.camera);
      if (tile) tile.remember(frame);
      turn();
    });
  } catch (error) {
    // Told by the next poll; the stream is opened again by `tick`.
    if (!(error instanceof Refused) && error.name !== "AbortError") console.info(error.message);
  } finally {
    following = null;
  }
}

/* Give the free places to the tiles that waited longest; with many cameras each gets fewer pictures. */
function turn() {
  const now = performance.now();
  const leastMs = tiles.size <= 4 ? 66 : tiles.size <= 9 ? 150 : 300;
  const busy = [...tiles.values()].filter((tile) => tile.fetching).length;
  const waiting = [...tiles.values()].filter((tile) => tile.wants(now)).sort((a, b) => a.notBefore - b.notBefore);
  for (const tile of waiting.slice(0, Math.max(0, PICTURES_AT_ONCE - busy))) {
    tile.refresh(leastMs).then(turn, () => (tile.notBefore = performance.now() + 1000));
  }
}

/* With a token a plain link would be refused: fetch it and show it here. */
async function openPaper(event) {
  const link = event.target.closest("footer nav a");
  if (!link || !wire.token) return;
  event.preventDefault();
  const answer = await wire.get(link.getAttribute("href"));
  const text = await answer.text();
  put($("paper-title"), link.textContent);
  const isJson = (answer.headers.get("Content-Type") || "").includes("json");
  put($("paper-text"), isJson ? JSON.stringify(JSON.parse(text), null, 2) : text);
  $("paper").showModal();
}

$("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  wire.remember($("token").value.trim());
  $("token").value = "";
  signedOut = false;
  $("sign-in").close();
  tick();
});
$("sign-in").addEventListener("cancel", (event) => event.preventDefault());
$("forget").addEventListener("click", () => signOut(""));
$("paper-close").addEventListener("click", () => $("paper").close());
document.addEventListener("click", openPaper);
document.addEventListener("visibilitychange", () => {
  if (document.hidden && following) following.abort();
  tick();
});

async function tick() {
  // The module says something every 15 s; a connection that is silent for longer is dead.
  if (following && performance.now() - heard > 40000) following.abort();
  await poll();
  follow();
}
setInterval(tick, 2000);
setInterval(turn, 250);
tick();
