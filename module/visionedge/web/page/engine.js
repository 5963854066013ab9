/* The engine's dialog: which engine computes each model, and what the others that were measured gave. */

const COLUMNS = ["Engine", "Alone, ms", "All lanes, frames/s", "Times as fast", ""];

function candidateRow(candidate) {
  const row = make("tr", candidate.note ? "" : "used");
  const options = candidate.options === "plain" ? "" : ` with ${candidate.options}`;
  const name = make("th", "", `${candidate.runtime} ${candidate.precision}${options}`);
  name.scope = "row";
  const figures = [candidate.ms, candidate.framesPerSecond].map((figure) => (figure == null ? "–" : figure.toFixed(1)));
  const speedup = candidate.timesAsFast == null ? "–" : candidate.timesAsFast.toFixed(2);
  const cells = [...figures, speedup].map((text) => make("td", "number", text));
  row.append(name, ...cells, make("td", "", candidate.note || "in use"));
  return row;
}

function candidateTable(candidates) {
  const head = make("tr");
  for (const column of COLUMNS) {
    const cell = make("th", "", column);
    cell.scope = "col";
    head.append(cell);
  }
  const table = make("table", "candidates");
  const body = make("tbody");
  body.append(...candidates.map(candidateRow));
  table.append(make("thead"), body);
  table.tHead.append(head);
  return table;
}

function engineFacts(engine) {
  if (!engine.precision) return [make("p", "quiet", engine.reason || "No engine yet")];
  const lanes = `${engine.plan.lanes} ${engine.plan.lanes === 1 ? "lane" : "lanes"}, batches of ${engine.plan.buckets.join(", ")}`;
  const nodes = [
    make("p", "verdict", `${deviceName(engine.effective)}, ${engine.runtime} ${engine.precision.precision}, ${lanes}`),
  ];
  if (engine.candidates.length) nodes.push(candidateTable(engine.candidates));
  nodes.push(make("p", "quiet", engine.precision.reason), make("p", "quiet", engine.plan.reason));
  return nodes;
}

/* The engines of all models; one alone needs no heading. */
function allEngines(status) {
  const engines = { [(status.model && status.model.name) || "model"]: status.engine || {} };
  for (const [name, model] of Object.entries(status.models || {})) engines[name] = model.engine;
  const entries = Object.entries(engines);
  if (entries.length === 1) return engineFacts(entries[0][1]);
  return entries.flatMap(([name, engine]) => [make("h3", "", name), ...engineFacts(engine)]);
}

async function openEngine() {
  try {
    const status = await api.json("api/v1/status");
    $("engine-body").replaceChildren(...allEngines(status));
  } catch (error) {
    if (error instanceof Unauthorized) return signOut("This token is not the right one.");
    $("engine-body").replaceChildren(make("p", "problem", "No status: " + error.message));
  }
  if (!$("engine").open) $("engine").showModal();
}

$("engine-open").addEventListener("click", openEngine);
$("engine-close").addEventListener("click", () => $("engine").close());
