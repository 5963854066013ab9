"""`visionedge bench engine`: every pair of lanes and batch, beside bare `session.run` and the plain network.

All that is compared is run in turns, round by round, in one process, and told as medians of each round's
ratios: machines are noisy, and what disturbs one trial disturbs its neighbour. What should be equal but for
a few percent, the engine and bare `session.run`, takes turns batch by batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from visionedge.config.schema import InferenceConfig
from visionedge.engine.autotune import Run, Sample, Wanted, fit, measure, paces, run_in_turns
from visionedge.engine.device.devices import PROVIDERS
from visionedge.engine.local_engine import Engine, noise, open_engine
from visionedge.engine.plan import Fit, Measured, Pair, Plan, batch_sizes
from visionedge.engine.precision_choice import contenders
from visionedge.frames.types import Picture
from visionedge.model.compiler.build import ready
from visionedge.model.compiler.compile import ROWS
from visionedge.model.model import Model, load_model
from visionedge.model.quantization.variants import PRECISIONS
from visionedge.ops.bench.baseline import PlainNetwork, can_decode, plain_session
from visionedge.ops.bench.report import machine
from visionedge.runtime.process_limits import usable_cores

Key = tuple[str, Pair]
"""What ran, and lanes and batch: ``engine`` by itself, ``beside`` (the engine) in turns with ``bare``, and in
turns ``compiled``, ``original`` and ``plain``, and ``fp32`` with the precisions that a model comes in."""

_ONE = Pair(1, 1)
_NO_LIMIT = 1_000_000
_QUIET = 0.85


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What to run in fp32, `seconds` each time. `lanes` and `batches` None are those that the plan considers.

    `data` is the folder of compiled graphs; the plan is measured anew in any case.
    """

    model: Path
    lanes: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    seconds: float = 0.4
    rounds: int = 5
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    data: Path | None = None


def bench_engine(load: EngineLoad, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and give the report as a document. `tell` hears of the progress.

    Raises:
        ModelError, DeviceError: the engine cannot be had.
    """
    loaded = load_model(load.model)
    model, graph = ready(loaded, load.data)
    # The engine and the bare session run the same graph; what `auto` would take is another question.
    inference = load.inference.model_copy(update={"precision": "fp32"})
    fixed = model.reading.input.batch
    most = max(load.batches or (load.inference.max_batch,))
    sizes = (fixed,) if fixed else tuple(sorted({*batch_sizes(most), *(load.batches or ())}))
    plan = Plan(1, sizes, "every batch size, to be measured")
    with closing(
        open_engine(loaded, inference, data=load.data, plans=dict.fromkeys(PROVIDERS, plan))
    ) as engine:
        tell(f"{model.name}: {engine.device.describe()}")
        pictures = np.asarray(noise(model.input, engine.plan.max_batch), np.uint8)
        wanted = Wanted(engine.device.effective, engine.plan.max_batch, fixed, usable_cores())
        measured = _measured(engine, pictures, wanted, load.inference.latency_budget_ms)
        tell(f"plan: {measured.reason}")
        pairs = _pairs(load, engine.plan.buckets, wanted, measured.choice)
        works = _works(engine, graph, pictures, pairs, measured.choice)
        works += _one_picture_works(model, graph, pictures[:1], engine.device.effective)
        graphs = {"fp32": graph, **_other_graphs(loaded, engine.device.effective, load.data)}
        works += _precision_works(graphs, pictures, Pair(1, fixed or 1), engine.device.effective)
        samples = _sweep(works, load, tell)
        return _report(load, engine, measured, samples)


def _measured(engine: Engine, pictures: Picture, wanted: Wanted, budget_ms: float | None) -> Measured:
    return measure(
        lambda batch: engine.infer(pictures[:batch]),
        device=wanted.device,
        max_batch=wanted.max_batch,
        fixed_batch=wanted.fixed_batch,
        cores=wanted.cores,
        latency_budget_ms=budget_ms,
    )


def _pairs(load: EngineLoad, buckets: Sequence[int], wanted: Wanted, choice: Pair) -> list[Pair]:
    """The pairs asked for that can be run, and the plan's choice."""
    batches = [size for size in load.batches or wanted.batches() if size in buckets]
    asked = {Pair(lanes, batch) for lanes in load.lanes or wanted.lanes() for batch in batches}
    return sorted(asked | {choice})


# --- what runs ----------------------------------------------------------------------------------------------


Works = Mapping[Key, Run]
"""What computes a batch, by its key; those of one mapping have lanes and batch in common and take turns."""


def _works(
    engine: Engine, graph: bytes, pictures: Picture, pairs: Iterable[Pair], choice: Pair
) -> list[Works]:
    """All that is to run, what is compared side by side."""
    bare = _bare(graph, pictures, engine.device.effective)

    def whole(batch: int) -> object:
        return engine.infer(pictures[:batch])

    works: list[Works] = []
    for pair in pairs:
        works.append({("engine", pair): whole})
        if pair.batch == choice.batch:
            works.append({("beside", pair): whole, ("bare", pair): bare})
    return works


def _bare(graph: bytes, pictures: Picture, device: str) -> Run:
    session = plain_session(graph, 1, device)
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: pictures[:batch]})


def _one_picture_works(model: Model, graph: bytes, pictures: Picture, device: str) -> list[Works]:
    """The compiled graph on one picture, the original network, and that with numpy around it."""
    if not can_decode(model):
        return []
    network = PlainNetwork(model, threads=1, device=device)
    tensor = network.tensor(pictures[0])

    def plain(_: int) -> object:
        return network.rows(network.run(network.tensor(pictures[0])), ROWS)

    one: dict[Key, Run] = {
        ("compiled", _ONE): _bare(graph, pictures, device),
        ("original", _ONE): lambda _: network.run(tensor),
        ("plain", _ONE): plain,
    }
    return [one]


def _other_graphs(loaded: Model, device: str, data: Path | None) -> dict[str, bytes]:
    """The compiled graphs of the variants that may be used on a device, by their precision."""
    found = contenders(loaded, device=device, data=data)
    return {variant.precision: ready(variant.of(loaded), data)[1] for variant in found}


def _precision_works(graphs: Mapping[str, bytes], pictures: Picture, pair: Pair, device: str) -> list[Works]:
    """The compiled graph in fp32 and in other precisions, if there are any."""
    if len(graphs) == 1:
        return []
    return [{(name, pair): _bare(graph, pictures, device) for name, graph in graphs.items()}]


Samples = Mapping[Key, Sequence[Sample]]


def _sweep(works: Sequence[Works], load: EngineLoad, tell: Callable[[str], None]) -> Samples:
    """Every work once a round."""
    samples: dict[Key, list[Sample]] = {key: [] for each in works for key in each}
    for number in range(load.rounds):
        # Backwards every other time: nobody always runs after the same neighbour.
        for each in works[:: 1 if number % 2 else -1]:
            pair = next(iter(each))[1]
            for key, sample in run_in_turns(each, pair, load.seconds, most=_NO_LIMIT).items():
                samples[key].append(sample)
        best = max((samples[key][-1].frames_per_s, key[1]) for key in samples if key[0] == "engine")
        tell(f"round {number + 1}/{load.rounds}: best {best[1]}, {best[0]:.1f} frames/s")
    return samples


# --- figures ------------------------------------------------------------------------------------------------


def _report(load: EngineLoad, engine: Engine, measured: Measured, samples: Samples) -> dict[str, Any]:
    model, choice = engine.model, measured.choice
    speeds = paces({pair: given for (kind, pair), given in samples.items() if kind == "engine"})
    pairs, best = list(speeds), max(speeds, key=lambda pair: speeds[pair])
    return {
        "schema": "visionedge/bench-engine/1",
        "machine": machine(engine.device),
        "load": {"seconds": load.seconds, "rounds": load.rounds},
        "model": {
            "name": model.name,
            "head": model.head,
            "width": model.input.width_px,
            "height": model.input.height_px,
            "fixedBatch": model.reading.input.batch,
        },
        "device": engine.device.describe(),
        "plan": measured.document(),
        "table": [_line(pair, samples["engine", pair]) for pair in pairs],
        "fits": [_fit_line(found) for found in _fits(pairs, samples)],
        "choice": {
            "lanes": choice.lanes,
            "batch": choice.batch,
            "shareOfBest": round(speeds[choice] / speeds[best], 3),
        },
        "processorShare": _processor_share(engine, choice, samples),
        "best": {"lanes": best.lanes, "batch": best.batch},
        "bare": [
            {
                **_line(pair, given),
                "engineToBare": _ratio(samples["beside", pair], given, _by_speed),
                "engineToBareByCpu": _ratio(given, samples["beside", pair], _by_cpu),
            }
            for (kind, pair), given in samples.items()
            if kind == "bare"
        ],
        "onePicture": _one_picture(samples),
        "precisions": _precisions(samples),
        "unplannedShapes": engine.unplanned_shapes,
    }


def _processor_share(engine: Engine, choice: Pair, samples: Samples) -> float | None:
    """What the plan's lanes got of the processor they could use; None on a GPU."""
    if engine.device.effective != "cpu":
        return None
    given = samples["engine", choice]
    busy = median(sample.cpu_ms * sample.frames_per_s / 1000 for sample in given)
    return round(busy / min(choice.lanes, usable_cores()), 3)


def _line(pair: Pair, given: Sequence[Sample]) -> dict[str, Any]:
    return {
        "lanes": pair.lanes,
        "batch": pair.batch,
        "framesPerSecond": round(_speed(given), 2),
        "framesPerSecondAll": [round(sample.frames_per_s, 2) for sample in given],
        "batchMs": round(_batch_ms(given), 3),
        "cpuMs": round(median(sample.cpu_ms for sample in given), 3),
    }


def _fits(pairs: Iterable[Pair], samples: Samples) -> list[Fit]:
    """How long a batch takes, by the number of lanes."""
    points: dict[int, dict[int, float]] = {}
    for pair in pairs:
        points.setdefault(pair.lanes, {})[pair.batch] = _batch_ms(samples["engine", pair])
    return [fit(lanes, given) for lanes, given in points.items() if len(given) > 1]


def _fit_line(found: Fit) -> dict[str, Any]:
    return {
        "lanes": found.lanes,
        "msPerPicture": round(found.ms_per_picture, 3),
        "msFixed": round(found.ms_fixed, 3),
    }


def _one_picture(samples: Samples) -> dict[str, Any]:
    """One picture at a time on one thread: the compiled graph beside the network it was made from."""
    given = {
        kind: samples[kind, _ONE] for kind in ("original", "compiled", "plain") if (kind, _ONE) in samples
    }
    found: dict[str, Any] = {f"{kind}Ms": round(_batch_ms(each), 3) for kind, each in given.items()}
    for kind, each in given.items() if "compiled" in given else ():
        if kind != "compiled":
            name = f"compiledTo{kind.capitalize()}"
            found[name] = _ratio(given["compiled"], each, _by_duration)
            found[f"{name}ByCpu"] = _ratio(given["compiled"], each, _by_cpu)
    return found


def _precisions(samples: Samples) -> list[dict[str, Any]]:
    """The precisions of the model beside fp32: a batch on one thread, and how many times as fast."""
    fp32 = next((given for (kind, _), given in samples.items() if kind == "fp32"), ())
    return [
        {
            "precision": kind,
            "batch": pair.batch,
            "ms": round(_batch_ms(given), 3),
            "fp32Ms": round(_batch_ms(fp32), 3),
            "timesAsFast": _ratio(fp32, given, _by_duration),
            "timesAsFastByCpu": _ratio(fp32, given, _by_cpu),
        }
        for (kind, pair), given in samples.items()
        if kind in PRECISIONS
    ]


def _speed(given: Iterable[Sample]) -> float:
    return float(median(sample.frames_per_s for sample in given))


def _batch_ms(given: Iterable[Sample]) -> float:
    return float(median(sample.batch_ms for sample in given))


def _by_speed(sample: Sample) -> float:
    return sample.frames_per_s


def _by_duration(sample: Sample) -> float:
    return sample.batch_ms


def _by_cpu(sample: Sample) -> float:
    # What a busy machine spoils least; on a GPU it is the host's part only.
    return max(sample.cpu_ms, 1e-6)


def _ratio(ours: Sequence[Sample], theirs: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    """The median of the rounds' ratios."""
    return round(float(np.median([figure(a) / figure(b) for a, b in zip(ours, theirs, strict=True)])), 3)


# --- words --------------------------------------------------------------------------------------------------


def caution(report: Mapping[str, Any]) -> str:
    """What to know before anybody believes the figures; nothing if the machine was quiet."""
    share = report["processorShare"]
    if share is None or share > _QUIET:
        return ""
    return (
        f"The machine was busy with other things: the plan's lanes got {share:.0%} of the processor. Speeds"
        " are too low, and of the ratios only those by processor time can be trusted."
    )


def words(report: Mapping[str, Any]) -> str:
    """The report for people."""
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
        f"  {_row(row)}   bare session.run; engine/bare {_both(row, 'engineToBare')}"
        for row in report["bare"]
    ]
    best = report["best"]
    lines += [
        "",
        *bare,
        "",
        f"plan: {report['plan']['reason']}",
        f"plan/best: {report['choice']['shareOfBest']:.3f} of {Pair(best['lanes'], best['batch'])}",
        *_one_picture_words(report["onePicture"]),
        *map(_precision_words, report["precisions"]),
        *filter(None, [caution(report)]),
    ]
    return "\n".join(lines) + "\n"


def _row(row: Mapping[str, Any]) -> str:
    return (
        f"{row['lanes']:5}  {row['batch']:5}  {row['framesPerSecond']:9.1f}  {row['batchMs']:9.2f}"
        f"  {row['cpuMs']:13.2f}"
    )


def _both(figures: Mapping[str, Any], name: str) -> str:
    return f"{figures[name]:.3f} (by processor time {figures[f'{name}ByCpu']:.3f})"


def _precision_words(found: Mapping[str, Any]) -> str:
    return (
        f"{found['precision']}: {found['ms']:.2f} ms on one thread, {_both(found, 'timesAsFast')} times as"
        f" fast as fp32 with {found['fp32Ms']:.2f} ms"
    )


_WAYS = {
    "original": "in the original network",
    "compiled": "in the compiled graph",
    "plain": "in the original network with numpy before it and behind it, to the same rows",
}


def _one_picture_words(one: Mapping[str, Any]) -> list[str]:
    if "compiledToPlain" not in one:
        return ["compiled/original: not measured; there is no plain decoder for this head"]
    ways = [f"{one[f'{kind}Ms']:.2f} ms {words}" for kind, words in _WAYS.items()]
    return [
        f"one picture, one thread: {', '.join(ways)}",
        f"compiled/original: {_both(one, 'compiledToOriginal')}",
        f"compiled/plain: {_both(one, 'compiledToPlain')}",
    ]
