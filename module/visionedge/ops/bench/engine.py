"""`visionedge bench engine`: every pair of lanes and batch, beside the bare runtime and the plain network.

`bench_engine` returns the report as a JSON document; `format_report` makes text of it. All trials run round
by round in one process, and comparisons are medians of the rounds' ratios, because a machine's speed varies
from second to second. Runs that differ by a few percent only, such as the engine and its bare runtime, are
interleaved batch by batch.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

from visionedge.config.schema import InferenceConfig
from visionedge.engine.autotune import (
    AutotuneRequest,
    BatchRunner,
    ThroughputSample,
    autotune_plan,
    compute_relative_speeds,
    make_cpu_clock,
    make_noise_pictures,
    run_interleaved,
)
from visionedge.engine.device.devices import EffectiveDevice
from visionedge.engine.engine_choice import EngineCandidate, EngineChoice
from visionedge.engine.interface import EngineSettings
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.engine.plan import AutotuneResult, OperatingPoint, Plan, list_batch_sizes
from visionedge.frames.types import Picture
from visionedge.model.compiler.build import load_or_compile_with_batch
from visionedge.model.compiler.compile import MAX_ROWS
from visionedge.model.model import Model, load_model
from visionedge.ops.bench.bare import list_bare_graphs, open_bare_runner, open_onnxruntime_runner
from visionedge.ops.bench.baseline import PlainNetwork, can_decode
from visionedge.ops.bench.machine import describe_machine
from visionedge.runtime.measurement import median_ratio, run_in_rounds
from visionedge.runtime.process_limits import usable_cores

RunKey = tuple[str, OperatingPoint]
"""The kind of run, and lanes and batch. Kinds: ``engine``; ``beside`` (the engine) interleaved with ``bare``;
``compiled``, ``original``, ``plain``, interleaved; and the candidates by their names, interleaved."""

RunsByKey = Mapping[RunKey, BatchRunner]
"""Runs that are interleaved batch by batch; all have the same lanes and batch."""

SamplesByKey = Mapping[RunKey, Sequence[ThroughputSample]]

_ONE = OperatingPoint(1, 1)
_NO_LIMIT = 1_000_000


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What to run, each trial for `seconds`. `lanes` and `batches` default to those of the plan.

    `data` is the data folder of the module. The engine that was chosen on this machine is used, and chosen
    now if none was. A plan kept there is not used: the plan is always measured.
    """

    model: Path
    lanes: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    seconds: float = 0.4
    rounds: int = 5
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    data: Path | None = None


def bench_engine(load: EngineLoad, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the report as a document. `progress` gets a line for each step.

    Raises:
        ModelError, DeviceError: the engine cannot be opened.
    """
    loaded = load_model(load.model)
    model, graph = load_or_compile_with_batch(loaded, load.data)
    fixed = model.interpretation.input.batch
    max_count = max(load.batches or (load.inference.max_batch,))
    sizes = (fixed,) if fixed else tuple(sorted({*list_batch_sizes(max_count), *(load.batches or ())}))
    plan = Plan(1, sizes, "every batch size, to be measured")
    plans = dict.fromkeys(get_args(EffectiveDevice), plan)
    with closing(open_engine(loaded, load.inference, data=load.data, plans=plans)) as engine:
        info = engine.info()
        device = info.device.effective
        progress(f"{model.name}: {info.device.describe()}; {info.choice.candidate}: {info.choice.reason}")
        pictures = make_noise_pictures(model.input, info.plan.max_batch)
        wanted = AutotuneRequest(device, info.plan.max_batch, fixed, usable_cores())
        measured = autotune_plan(
            lambda batch: engine.infer(pictures[:batch]),
            device=device,
            max_batch=wanted.max_batch,
            fixed_batch=fixed,
            cores=wanted.cores,
            latency_budget_ms=load.inference.latency_budget_ms,
            has_own_threads=info.runtime == "openvino",
        )
        progress(f"plan: {measured.reason}")
        pairs = _pairs(load, info.plan.buckets, wanted, measured.choice)
        graphs = list_bare_graphs(loaded, EngineSettings.of(load.inference), info, load.data)
        runners = {each.candidate: open_bare_runner(each, device, pictures) for each in graphs}
        runs = _collect_runs(engine, runners[info.choice.candidate], pictures, pairs, measured.choice)
        runs += _one_picture_runs(model, graph, pictures[:1], device)
        runs += _candidate_runs(runners, measured.choice)
        own_threads = {str(candidate) for candidate in runners if candidate.runtime == "openvino"}
        if info.runtime == "openvino":
            own_threads |= {"engine", "beside", "bare"}
        samples = _sweep(runs, load, own_threads, progress)
        return _report(load, engine, measured, samples)


def _pairs(
    load: EngineLoad, buckets: Sequence[int], wanted: AutotuneRequest, choice: OperatingPoint
) -> list[OperatingPoint]:
    """The requested pairs that the model can run, and the plan's choice."""
    batches = [size for size in load.batches or wanted.batches() if size in buckets]
    asked = {OperatingPoint(lanes, batch) for lanes in load.lanes or wanted.lanes() for batch in batches}
    return sorted(asked | {choice})


# --- the runs -----------------------------------------------------------------------------------------------


def _collect_runs(
    engine: LocalEngine,
    bare: BatchRunner,
    pictures: Picture,
    pairs: Iterable[OperatingPoint],
    choice: OperatingPoint,
) -> list[RunsByKey]:
    """The engine on every pair, and beside its bare runtime where the batch is that of the choice."""

    def run_engine(batch: int) -> object:
        return engine.infer(pictures[:batch])

    runs: list[RunsByKey] = []
    for point in pairs:
        runs.append({("engine", point): run_engine})
        if point.batch == choice.batch:
            runs.append({("beside", point): run_engine, ("bare", point): bare})
    return runs


def _one_picture_runs(model: Model, graph: bytes, pictures: Picture, device: str) -> list[RunsByKey]:
    """One picture on one thread: the compiled graph, the original network, and the latter with numpy."""
    if not can_decode(model):
        return []
    network = PlainNetwork(model, threads=1, device=device)
    tensor = network.tensor(pictures[0])

    def plain(_: int) -> object:
        return network.rows(network.run(network.tensor(pictures[0])), MAX_ROWS)

    one: dict[RunKey, BatchRunner] = {
        ("compiled", _ONE): open_onnxruntime_runner(graph, device, pictures),
        ("original", _ONE): lambda _: network.run(tensor),
        ("plain", _ONE): plain,
    }
    return [one]


def _candidate_runs(runners: Mapping[EngineCandidate, BatchRunner], point: OperatingPoint) -> list[RunsByKey]:
    """All candidates on the lanes and the batch of the plan, if there are several."""
    if len(runners) == 1:
        return []
    return [{(str(candidate), point): run for candidate, run in runners.items()}]


def _sweep(
    runs: Sequence[RunsByKey], load: EngineLoad, own_threads: Collection[str], progress: Callable[[str], None]
) -> SamplesByKey:
    """Every group of runs once a round; those kinds of runs compute on threads of their own."""

    def trial(group: RunsByKey) -> Mapping[RunKey, ThroughputSample]:
        point = next(iter(group))[1]
        own = any(kind in own_threads for kind, _ in group)
        clock = make_cpu_clock(point.lanes, own=own)
        return run_interleaved(group, point, load.seconds, max_count=_NO_LIMIT, cpu_clock=clock)

    def after_round(number: int, results: Mapping[int, Sequence[Mapping[RunKey, ThroughputSample]]]) -> None:
        last = [(key, sample) for given in results.values() for key, sample in given[-1].items()]
        best = max((sample.frames_per_s, point) for (kind, point), sample in last if kind == "engine")
        progress(f"round {number}/{load.rounds}: best {best[1]}, {best[0]:.1f} frames/s")

    trials = {number: partial(trial, group) for number, group in enumerate(runs)}
    results = run_in_rounds(trials, load.rounds, after_round)
    return {key: [each[key] for each in given] for given in results.values() for key in given[0]}


# --- figures ------------------------------------------------------------------------------------------------


def _report(
    load: EngineLoad, engine: LocalEngine, measured: AutotuneResult, samples: SamplesByKey
) -> dict[str, Any]:
    info, choice = engine.info(), measured.choice
    model = info.model
    speeds = compute_relative_speeds(
        {point: given for (kind, point), given in samples.items() if kind == "engine"}
    )
    pairs, best = list(speeds), max(speeds, key=lambda point: speeds[point])
    return {
        "schema": "visionedge/bench-engine/1",
        "machine": describe_machine(info.device),
        "load": {"seconds": load.seconds, "rounds": load.rounds},
        "model": {
            "name": model.name,
            "head": model.head,
            "width": model.input.width_px,
            "height": model.input.height_px,
            "fixedBatch": model.interpretation.input.batch,
        },
        "device": info.device.describe(),
        "engine": str(info.choice.candidate),
        "reason": info.choice.reason,
        "plan": measured.document(),
        "table": [_line(point, samples["engine", point]) for point in pairs],
        "choice": {
            "lanes": choice.lanes,
            "batch": choice.batch,
            "shareOfBest": round(speeds[choice] / speeds[best], 3),
        },
        "best": {"lanes": best.lanes, "batch": best.batch},
        "bare": [
            {
                **_line(point, given),
                "engineToBare": _ratio(samples["beside", point], given, "frames_per_s"),
                "engineToBareByCpu": _ratio(given, samples["beside", point], "cpu_ms"),
            }
            for (kind, point), given in samples.items()
            if kind == "bare"
        ],
        "onePicture": _one_picture(samples),
        "candidates": _candidates(info.choice, samples),
        "unplannedShapes": engine.info().unplanned_shapes,
    }


def _line(point: OperatingPoint, given: Sequence[ThroughputSample]) -> dict[str, Any]:
    return {
        "lanes": point.lanes,
        "batch": point.batch,
        "framesPerSecond": round(_median(given, "frames_per_s"), 2),
        "framesPerSecondAll": [round(sample.frames_per_s, 2) for sample in given],
        "batchMs": round(_median(given, "batch_ms"), 3),
        "cpuMs": round(_median(given, "cpu_ms"), 3),
    }


def _one_picture(samples: SamplesByKey) -> dict[str, Any]:
    """The figures of one picture on one thread, and their ratios."""
    given = {
        kind: samples[kind, _ONE] for kind in ("original", "compiled", "plain") if (kind, _ONE) in samples
    }
    found: dict[str, Any] = {f"{kind}Ms": round(_median(each, "batch_ms"), 3) for kind, each in given.items()}
    for kind, each in given.items() if "compiled" in given else ():
        if kind != "compiled":
            name = f"compiledTo{kind.capitalize()}"
            found[name] = _ratio(given["compiled"], each, "batch_ms")
            found[f"{name}ByCpu"] = _ratio(given["compiled"], each, "cpu_ms")
    return found


def _candidates(choice: EngineChoice, samples: SamplesByKey) -> list[dict[str, Any]]:
    """Every candidate of the choice: its bare speed, in turns with the others, and why it is not used."""
    by_name = {name: (point, given) for (name, point), given in samples.items()}
    first = by_name.get(str(choice.results[0].candidate)) if choice.results else None
    rows = []
    for each in choice.results:
        row = {name: each.document()[name] for name in ("runtime", "precision", "options", "note")}
        found = by_name.get(str(each.candidate))
        if found is not None and first is not None:
            line = _line(*found)
            row |= {name: line[name] for name in ("framesPerSecond", "batchMs", "cpuMs")} | {
                "timesAsFast": _ratio(found[1], first[1], "frames_per_s"),
                "timesAsFastByCpu": _ratio(first[1], found[1], "cpu_ms"),
            }
        rows.append(row)
    return rows


def _median(given: Iterable[ThroughputSample], figure: str) -> float:
    return float(median(getattr(sample, figure) for sample in given))


def _ratio(ours: Sequence[ThroughputSample], theirs: Sequence[ThroughputSample], figure: str) -> float:
    # Processor time varies least on a busy machine; on a GPU it is the host's part only, and may be 0.
    return round(median_ratio(ours, theirs, lambda sample: max(getattr(sample, figure), 1e-6)), 3)


# --- text ---------------------------------------------------------------------------------------------------


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    model, on = report["model"], report["machine"]
    lines = [
        f"{model['name']} ({model['head']}, {model['width']} x {model['height']}), {report['device']}",
        f"{on['cpu']}, {on['usableCores']} usable cores, load average {on['loadAverage']:g}",
        "",
        "  lanes  batch   frames/s   ms/batch   CPU ms/frame",
    ]
    choice = (report["choice"]["lanes"], report["choice"]["batch"])
    for row in report["table"]:
        chosen = (row["lanes"], row["batch"]) == choice
        lines.append(f"{'>' if chosen else ' '} {_row(row)}{'   the plan' if chosen else ''}")
    bare = [
        f"  {_row(row)}   bare {report['engine']}; engine/bare {_both(row, 'engineToBare')}"
        for row in report["bare"]
    ]
    best = report["best"]
    lines += [
        "",
        *bare,
        "",
        f"plan: {report['plan']['reason']}",
        f"plan/best: {report['choice']['shareOfBest']:.3f} of {OperatingPoint(best['lanes'], best['batch'])}",
        *_format_one_picture(report["onePicture"]),
        *_format_candidates(report["candidates"]),
    ]
    return "\n".join(lines) + "\n"


def _row(row: Mapping[str, Any]) -> str:
    return (
        f"{row['lanes']:5}  {row['batch']:5}  {row['framesPerSecond']:9.1f}  {row['batchMs']:9.2f}"
        f"  {row['cpuMs']:13.2f}"
    )


def _both(figures: Mapping[str, Any], name: str) -> str:
    return f"{figures[name]:.3f} (by processor time {figures[f'{name}ByCpu']:.3f})"


def _format_candidates(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["", "engines, bare and in turns:"]
    for row in rows:
        options = "" if row["options"] == "plain" else f" with {row['options']}"
        figures = "not measured"
        if "timesAsFast" in row:
            figures = f"{row['framesPerSecond']:.1f} frames/s, {_both(row, 'timesAsFast')} times as fast"
        note = f"; not used: {row['note']}" if row["note"] else "; in use"
        lines.append(f"  {row['runtime']} {row['precision']}{options}: {figures}{note}")
    return lines


_ONE_PICTURE_TITLES = {
    "original": "in the original network",
    "compiled": "in the compiled graph",
    "plain": "in the original network with numpy to the same rows",
}


def _format_one_picture(one: Mapping[str, Any]) -> list[str]:
    if "compiledToPlain" not in one:
        return ["compiled/original: not measured, because there is no plain decoder for this head"]
    titles = [f"{one[f'{kind}Ms']:.2f} ms {title}" for kind, title in _ONE_PICTURE_TITLES.items()]
    return [
        f"one picture, one thread: {', '.join(titles)}",
        f"compiled/original: {_both(one, 'compiledToOriginal')}",
        f"compiled/plain: {_both(one, 'compiledToPlain')}",
    ]
