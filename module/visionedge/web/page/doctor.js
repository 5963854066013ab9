/* The doctor's dialog: the checks of the chain to the GPU, and what to do about the first broken one. */

const MARKS = { ok: "✓", info: "·", warning: "!", broken: "✗", skipped: "–" };
const STATE_LABELS = { ok: "ok", info: "info", warning: "warning", broken: "broken", skipped: "skipped" };

/* Lines to be copied: they may wrap, but not after the hyphen of an option. */
function commandBlock(lines) {
  const block = make("pre");
  for (const word of lines.join("\n").split(/(?<= |\n)/)) {
    block.append(word.startsWith("-") ? make("span", "option", word) : word);
  }
  return block;
}

function remedyList(finding) {
  const list = make("div", "remedies");
  for (const remedy of finding.remedies) {
    list.append(make("p", "", remedy.instruction));
    if (remedy.lines.length) list.append(commandBlock(remedy.lines));
  }
  return list;
}

function findingRow(finding, isFirst) {
  const row = make("li", finding.state);
  const mark = make("span", "mark", MARKS[finding.state] || "·");
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", STATE_LABELS[finding.state] || finding.state);
  const text = make("div", "text");
  text.append(make("span", "what", finding.found));
  if (finding.remedies.length) text.append(remedyList(finding));
  row.append(mark, make("span", "name", finding.title), text);
  row.classList.toggle("first", isFirst);
  return row;
}

function findingList(title, findings, first) {
  const list = make("ol", "chain");
  for (const finding of findings) list.append(findingRow(finding, finding.name === first));
  return [make("h3", "", title), list];
}

function verdict(report) {
  const { requested, effective, reason, reasonCode } = report.device;
  const line = make("p", "verdict");
  line.append(make("strong", "", `${deviceName(requested)} was requested, ${deviceName(effective)} is used`));
  if (reasonCode !== "ok") line.append(make("span", "", `: ${reason} (${reasonCode})`));
  return line;
}

async function openDoctor() {
  const body = $("doctor-body");
  body.replaceChildren(make("p", "quiet", "Looking at this machine…"));
  if (!$("doctor").open) $("doctor").showModal();
  try {
    const answer = await api.get("api/v1/doctor", { signal: AbortSignal.timeout(120000) });
    const report = await answer.json();
    if (!answer.ok) throw new Error(report.error.message);
    body.replaceChildren(
      verdict(report),
      ...findingList("The chain to the GPU", report.chain, report.firstBroken),
      ...findingList("Beside it", report.systemChecks, null),
    );
  } catch (error) {
    if (error instanceof Unauthorized) {
      $("doctor").close();
      return signOut("This token is not the right one.");
    }
    body.replaceChildren(make("p", "problem", "No report: " + error.message));
  }
}

$("doctor-close").addEventListener("click", () => $("doctor").close());
document.addEventListener("click", (event) => {
  if (event.target.closest(".ask-doctor")) openDoctor();
});
