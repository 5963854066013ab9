"""`visionedge bench pipeline`: the real cameras, batcher, engine and lanes under load, beside a plain loop.

Machines are noisy, so what is compared is interleaved in rounds of one run and told as medians and ratios.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import cv2
import numpy as np

from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.engine.interface import AnyEngine
from visionedge.errors import ConfigError
from visionedge.frames.types import Detections
from visionedge.model.model import Model, load_model
from visionedge.model.parity import PARTNER_CONFIDENCE, compare
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.baseline import PlainLoop, clip_of, network_of
from visionedge.ops.bench.pipeline_run import (
    Cost,
    Load,
    Row,
    Run,
    cpu_s,
    pipeline_run,
    rig_of,
    rss_mib,
    run_of,
    summed,
)
from visionedge.ops.bench.report import cameras_in_words, machine
from visionedge.ops.bench.virtual_cameras import Synthetic
from visionedge.runtime.process_limits import usable_cores

# How many cameras until it is too much? Decided purely: doubling, then halving the gap.


def most_that_hold(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` of which `holds` says yes, 0 if not even 1; asks about 2 log2 times.

    `holds` is taken to say yes to everything below a yes. Near the edge, where it would say now this and now
    that, the answer is one of the numbers there.
    """
    good, bad = 0, 1
    while bad <= limit and holds(bad):
        good, bad = bad, bad * 2
    if good and bad > limit:
        if good == limit or holds(limit):
            return limit
        bad = limit
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


# Whether the pipeline sees what the plain loop sees: both look at the same pictures of a clip.


_EVERY = 10


def sameness(
    source: str, engine: AnyEngine, selection: Selection, plain: PlainLoop, pictures: int = 30
) -> dict[str, Any]:
    """The share of boxes that both see (as `parity.compare` counts them), and how far their scores lie apart.

    They may differ a little: the pipeline brings pictures to the model's size by a shorter way.
    """
    low = replace(selection, confidence=PARTNER_CONFIDENCE)
    shown = islice(plain.pictures(), 0, pictures * _EVERY, _EVERY)
    pairs = list(
        zip((plain.see(picture, low) for picture in shown), _ours(source, engine, low), strict=False)
    )
    parity = compare([theirs for theirs, _ in pairs], [ours for _, ours in pairs])
    return {
        "pictures": parity.pictures,
        "boxes": parity.boxes,
        "matched": round(parity.matched, 4),
        "scoreShift": round(parity.shift, 4),
    }


def _ours(source: str, engine: AnyEngine, selection: Selection) -> Iterator[Detections]:
    with closing(open_source(parse_camera_uri(clip_of(source)))) as played:
        number = 0
        while (decoded := played.read()) is not None:
            if number % _EVERY == 0:
                image, placement = decoded.fill(engine.model.input)
                (rows,) = engine.infer([image], selection.confidence)
                yield selection.apply(rows, placement)
            number += 1


# The ceiling of a pipeline on a CPU: what one decoded picture and one run of the network cost by themselves.
#
# No more than cores / (decoding + running) frames a second can come out of a machine, whatever is built
# around the two. Both are measured on one thread, and on as many at once as there are lanes: cores that share
# what is beneath them are slower together than each alone.


_STARTED_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Bare:
    """Processor ms of decoding one picture and of one run, and what `threads` of them gave a second."""

    threads: int
    decode_ms: float
    run_ms: float
    frames_per_s: float

    @property
    def frame_ms(self) -> float:
        """Of both."""
        return self.decode_ms + self.run_ms

    @property
    def ceiling_per_s(self) -> float:
        """The frames per second that all cores can give at this price."""
        return usable_cores() * 1000 / self.frame_ms


class Ceiling:
    """Decodes `source`, a video file, and runs the network of `model` as it was given: nothing else."""

    def __init__(self, model: Model, source: str) -> None:
        self._clip = clip_of(source)
        network = network_of(model, threads=1, device="cpu")
        size = (model.input.height_px, model.input.width_px, 3)
        tensor = network.tensor(np.random.default_rng(0).integers(0, 256, size, np.uint8))
        self._run: Callable[[], object] = lambda: network.run(tensor)

    def measure(self, seconds: float, threads: int) -> Bare:
        """Let so many threads work for so long, each on its own decoder."""
        together = threading.Barrier(threads)

        def work(_: int) -> tuple[int, int, int, int]:
            pictures = _decoded(self._clip)
            next(pictures), self._run()  # what is done once
            together.wait(_STARTED_WITHIN_S)
            began_ns, decode_ns, run_ns, count = time.monotonic_ns(), 0, 0, 0
            while not count or time.monotonic_ns() - began_ns < seconds * 1e9:
                before_ns = time.thread_time_ns()
                next(pictures)
                between_ns = time.thread_time_ns()
                self._run()
                decode_ns += between_ns - before_ns
                run_ns += time.thread_time_ns() - between_ns
                count += 1
            pictures.close()
            return count, decode_ns, run_ns, time.monotonic_ns() - began_ns

        with ThreadPoolExecutor(threads, "bare") as crew:
            done = list(crew.map(work, range(threads)))
        count = sum(each[0] for each in done)
        return Bare(
            threads,
            decode_ms=sum(each[1] for each in done) / 1e6 / count,
            run_ms=sum(each[2] for each in done) / 1e6 / count,
            frames_per_s=sum(each[0] * 1e9 / each[3] for each in done),
        )


def _decoded(clip: str) -> Generator[object, None, None]:
    """The pictures of a clip, again and again, decoded on the thread that asks and not looked at."""
    try:
        import av
    except ImportError:
        yield from _grabbed(clip)
        return
    while True:
        with av.open(clip) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            yield from container.decode(stream)


def _grabbed(clip: str) -> Generator[object, None, None]:
    while True:
        capture = cv2.VideoCapture(clip, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        while capture.grab():
            yield capture
        capture.release()


def ceiling_document(bare: Sequence[tuple[Bare, Bare]], runs: Sequence[Run]) -> dict[str, Any]:
    """The ceiling and how near the runs came: medians, by one thread alone and by as many as lanes at once.

    `bare` are (alone, at once) of each round, beside its run. On a machine that others use as well nothing
    comes near a ceiling; what bare threads gave in the same rounds (`measuredPerSecond`) had no more of it.
    """
    alone, together = ([pair[index] for pair in bare] for index in (0, 1))
    ratios = [run.frames_per_s / each.frames_per_s for run, each in zip(runs, together, strict=True)]
    measured = {
        "threads": together[0].threads,
        "measuredPerSecond": round(statistics.median(each.frames_per_s for each in together), 3),
        "toMeasured": round(statistics.median(ratios), 3),
    }
    return {
        "cores": usable_cores(),
        "alone": _side(alone, runs),
        "atOnce": _side(together, runs) | measured,
    }


def _side(bare: Sequence[Bare], runs: Sequence[Run]) -> dict[str, float]:
    pairs = list(zip(runs, bare, strict=True))
    figures = {
        "decodeCpuMs": [each.decode_ms for each in bare],
        "runCpuMs": [each.run_ms for each in bare],
        "framesPerSecond": [each.ceiling_per_s for each in bare],
        "speedToCeiling": [run.frames_per_s / each.ceiling_per_s for run, each in pairs],
        "cpuToBare": [run.cpu_ms_per_frame / each.frame_ms for run, each in pairs],
    }
    return {name: round(statistics.median(values), 3) for name, values in figures.items()}


_TITLES = {
    "pipeline": "pipeline",
    "inProcess": "engine in this process",
    "ownProcess": "engine in its own",
    "baseline": "plain loop",
}
_OTHER = {False: "inProcess", True: "ownProcess"}
"""The way that is compared with, by whether the pipeline's engine runs in this process."""


def bench_pipeline(load: Load, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and give the report as a document. `tell` hears of the progress.

    Raises:
        SourceError: the source cannot be read, or no frame came through.
        ModelError, DeviceError: the engine cannot be had.
    """
    model = load_model(load.model)
    selection = Selection.of(model, load.inference.confidence, load.inference.iou)
    _check(load)
    with ExitStack() as stack:
        room = replace(load, cameras=load.most if load.saturate else load.cameras)
        rig = stack.enter_context(closing(rig_of(room, model, own_process=not load.in_process)))
        engine = rig.engine
        tell(f"{engine.device.describe()}; {engine.plan.reason}")
        found = (
            saturation(load, lambda less: pipeline_run(less, rig, selection), tell) if load.saturate else {}
        )
        load = replace(load, cameras=max(1, found.get("cameras", load.cameras)))
        beside = _beside(load, model, engine, selection, tell) if load.baseline else None
        sides: dict[str, Callable[[], Run]] = {"pipeline": lambda: pipeline_run(load, rig, selection, tell)}
        if load.compare_process:
            other = stack.enter_context(
                closing(rig_of(load, model, own_process=load.in_process, like=engine))
            )
            sides[_OTHER[load.in_process]] = lambda: pipeline_run(load, other, selection, tell)
        if beside is not None:
            plain = stack.enter_context(closing(beside.plain))
            sides["baseline"] = lambda: _plain_run(plain, load.seconds, load.slo_ms)
        runs = _in_turns(sides, load.rounds, tell, beside.measure if beside else _nothing)
        report = _report(load, engine, runs)
        if beside is not None:
            report |= _compared(report, runs, beside) | {
                "sameness": sameness(load.source, engine, selection, beside.plain)
            }
        return report | {"saturation": found} if found else report


def _check(load: Load) -> None:
    """Tell what is wrong with a load before the engine warms up."""
    if Synthetic.parse(load.source) is None:
        with closing(open_source(parse_camera_uri(load.source))):
            return
    if load.baseline:
        raise ConfigError([f"--source {load.source}: the plain loop of --baseline needs a video file"])


def saturation(load: Load, run: Callable[[Load], Run], tell: Callable[[str], None]) -> dict[str, Any]:
    """How many cameras at the load's rate until the age of what is known passes its objective."""
    trials: list[dict[str, Any]] = []

    def once(cameras: int) -> bool:
        measured = run(replace(load, cameras=cameras))
        age_ms = measured.age_ms["p99"]
        trials.append(
            {"cameras": cameras, "ageMs": round(age_ms, 1), "framesPerSecond": measured.frames_per_s}
        )
        tell(f"{cameras_in_words(cameras)}: {measured.frames_per_s:.1f} frames/s, age p99 {age_ms:.0f} ms")
        return age_ms <= load.slo_ms

    # One moment in which the machine was busy with other things is not yet too many cameras.
    cameras = most_that_hold(lambda number: once(number) or once(number), load.most)
    return {"cameras": cameras, "most": load.most, "sloMs": load.slo_ms, "fps": load.fps, "trials": trials}


def _nothing() -> None:
    """Nothing else is measured in a round."""


def _in_turns(
    sides: Mapping[str, Callable[[], Run]],
    rounds: int,
    tell: Callable[[str], None],
    also: Callable[[], None] = _nothing,
) -> dict[str, list[Run]]:
    """Every side once a round, none is always the first; `also` is called in between."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            runs[name].append(sides[name]())
            tell(f"round {number + 1}/{rounds}: {_TITLES[name]} {runs[name][-1].frames_per_s:.1f} frames/s")
        also()
    return runs


# --- the plain loop, and the ceiling ------------------------------------------------------------------------


@dataclass(slots=True)
class _Beside:
    """What the pipeline is held against: the plain loop in fp32, and in fp32 on a CPU the ceiling."""

    plain: PlainLoop
    ceiling: Ceiling | None
    seconds: float
    lanes: int
    bare: list[tuple[Bare, Bare]] = field(default_factory=list)

    def measure(self) -> None:
        """The ceiling of this round: on one thread, and on as many at once as there are lanes."""
        if self.ceiling is not None:
            alone, at_once = (self.ceiling.measure(self.seconds, threads) for threads in (1, self.lanes))
            self.bare.append((alone, at_once))


def _beside(
    load: Load, model: Model, engine: AnyEngine, selection: Selection, tell: Callable[[str], None]
) -> _Beside:
    # The ceiling is that of the network as it was given.
    comparable = engine.device.effective == "cpu" and engine.precision.precision == "fp32"
    ceiling = Ceiling(model, load.source) if comparable else None
    plain = _best_plain(load, model, engine.device.effective, selection, tell)
    return _Beside(plain, ceiling, max(0.5, load.seconds / 4), engine.plan.lanes)


def _best_plain(
    load: Load, model: Model, device: str, selection: Selection, tell: Callable[[str], None]
) -> PlainLoop:
    """The plain loop at its best thread setting: whoever compares with a bad setting fools himself."""
    cores = os.cpu_count() or 1
    trials: list[tuple[float, PlainLoop]] = []
    for threads in sorted({1, cores, 0}):
        loop = PlainLoop(
            model,
            selection,
            source=load.source,
            cameras=load.cameras,
            threads=threads,
            device=device,
        )
        speed = _plain_run(loop, max(1.0, load.seconds / 4), load.slo_ms).frames_per_s
        tell(f"plain loop, {threads or 'default'} threads: {speed:.1f} frames/s")
        trials.append((speed, loop))
    best = max(trials, key=lambda trial: trial[0])[1]
    for _, loop in trials:
        if loop is not best:
            loop.close()
    return best


def _plain_run(loop: PlainLoop, seconds: float, slo_ms: float) -> Run:
    loop.step()  # the first frame warms up
    rows: list[Row] = []
    used_s, began_s = cpu_s(), time.monotonic()
    while time.monotonic() - began_s < seconds:
        began_ns = time.monotonic_ns()
        infer_ns, found = loop.step()
        rows.append(Row("plain", began_ns, time.monotonic_ns(), infer_ns, found))
    return run_of(rows, Cost(time.monotonic() - began_s, cpu_s() - used_s, {}, rss_mib()), slo_ms)


def _report(load: Load, engine: AnyEngine, runs: Mapping[str, list[Run]]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "schema": "visionedge/bench-pipeline/1",
        "machine": machine(engine.device),
        "load": {
            "source": load.source,
            "cameras": load.cameras,
            "fps": load.fps,
            "jitterMs": load.jitter_ms,
            "dropoutsSeconds": load.dropouts_s,
            "sloMs": load.slo_ms,
            "seconds": load.seconds,
            "rounds": load.rounds,
            "precision": load.inference.precision,
        },
        "model": engine.model.name,
        "device": engine.device.describe(),
        "plan": {"lanes": engine.plan.lanes, "buckets": list(engine.plan.buckets)},
        "precision": engine.precision.precision,
        "engineProcess": engine.process is not None,
        **{name: _medians(given) for name, given in runs.items()},
    }
    if load.compare_process:
        ours, theirs = runs["pipeline"], runs[_OTHER[load.in_process]]
        report["processRatio"] = _ratio(theirs, ours) if load.in_process else _ratio(ours, theirs)
    return report


def _compared(report: Mapping[str, Any], runs: Mapping[str, list[Run]], beside: _Beside) -> dict[str, Any]:
    """What the pipeline is to the plain loop and to the ceiling."""
    plain = {"threads": beside.plain.threads, "decode": beside.plain.decode}
    found = {
        "baseline": report["baseline"] | plain,
        "ratio": _ratio(runs["pipeline"], runs["baseline"]),
    }
    if beside.bare:
        found["ceiling"] = ceiling_document(beside.bare, runs["pipeline"])
    return found


def _ratio(ours: list[Run], theirs: list[Run]) -> dict[str, float]:
    """The medians of the rounds' ratios."""
    names = {"framesPerSecond": "frames_per_s", "cpuMsPerFrame": "cpu_ms_per_frame"}
    pairs = list(zip(ours, theirs, strict=True))
    return {
        key: round(statistics.median(getattr(a, name) / getattr(b, name) for a, b in pairs), 3)
        for key, name in names.items()
    }


def _medians(runs: list[Run]) -> dict[str, Any]:
    return {
        "framesPerSecond": round(_median(runs, "frames_per_s"), 3),
        "framesPerSecondAll": [round(run.frames_per_s, 2) for run in runs],
        "rounds": [_round(run) for run in runs],
        "cpuMsPerFrame": round(_median(runs, "cpu_ms_per_frame"), 3),
        "latencyMs": _middle([run.latency_ms for run in runs]),
        "ageMs": _middle([run.age_ms for run in runs]),
        "goodputPerSecond": round(_median(runs, "goodput_per_s"), 3),
        "stagesMs": _middle([run.stages_ms for run in runs]),
        "dropped": summed(runs),
        "rssMiB": round(max(run.rss_mib for run in runs), 1),
        "detectionsPerFrame": round(_median(runs, "detections_per_frame"), 3),
        "fairness": round(_median(runs, "fairness"), 4),
    }


def _round(run: Run) -> dict[str, Any]:
    return {
        "framesPerSecond": round(run.frames_per_s, 3),
        "cpuMsPerFrame": round(run.cpu_ms_per_frame, 3),
        "latencyMs": {key: round(value, 3) for key, value in run.latency_ms.items()},
        "ageMs": {key: round(value, 3) for key, value in run.age_ms.items()},
    }


def _middle(figures: list[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(f[key] for f in figures), 3) for key in figures[0]}


def _median(runs: list[Run], name: str) -> float:
    return float(statistics.median(getattr(run, name) for run in runs))


def words(report: dict[str, Any]) -> str:
    """The report for people."""
    load = report["load"]
    beside = "; the plain loop in fp32" if "baseline" in report and report["precision"] != "fp32" else ""
    lines = [
        f"{report['model']} in {report['precision']}, {cameras_in_words(load['cameras'])} of"
        f" {load['source']}, {report['device']}{beside}"
    ]
    lines.extend(
        f"  {title:<24} {_figures(report[name])}" for name, title in _TITLES.items() if name in report
    )
    if load["fps"] is not None:
        lines.append(_bound_words(report["pipeline"], load["fps"]))
    for key, title in (("ratio", "ratio to the plain loop"), ("processRatio", "ratio, own process/none")):
        if ratio := report.get(key):
            speed, cost = ratio["framesPerSecond"], ratio["cpuMsPerFrame"]
            lines.append(f"  {title:<24} {speed:8.2f} x frames/s  {cost:6.2f} x CPU per frame")
    if ceiling := report.get("ceiling"):
        lines.extend(_ceiling_words(ceiling))
    if same := report.get("sameness"):
        lines.append(
            f"  {same['matched']:.1%} of {same['boxes']} boxes on {same['pictures']} pictures are the plain"
            f" loop's too; their scores lie {same['scoreShift']:.3f} apart"
        )
    if found := report.get("saturation"):
        more = " (no more were tried)" if found["cameras"] == found["most"] else ""
        rate = "flat out" if found["fps"] is None else f"at {found['fps']:g} frames/s"
        lines.append(
            f"  {cameras_in_words(found['cameras'])} {rate} keep{'s' if found['cameras'] == 1 else ''}"
            f" an age p99 within {found['sloMs']:g} ms{more}"
        )
    return "\n".join(lines) + "\n"


def _bound_words(ours: Mapping[str, Any], fps: float) -> str:
    """Latency beside what is unavoidable under overload: a batch under way, one's own, and a turn's frame."""
    batch_ms = ours["stagesMs"]["infer"]
    return (
        f"  latency p99 {ours['latencyMs']['p99']:.0f} ms; two batches and a frame's interval are"
        f" {2 * batch_ms + 1000 / fps:.0f} ms"
    )


def _ceiling_words(ceiling: Mapping[str, Any]) -> list[str]:
    """The ceiling, and how near it the pipeline is, by one thread alone and by as many at once as lanes."""
    at_once = ceiling["atOnce"]
    more = (
        f"; they gave {at_once['measuredPerSecond']:.1f} frames/s, the pipeline {at_once['toMeasured']:.2f} x"
    )
    sides = {"one thread": (ceiling["alone"], ""), f"{at_once['threads']} at once": (at_once, more)}
    return [
        f"  {f'ceiling, {title}':<24} {side['framesPerSecond']:8.1f} frames/s  "
        f"{side['decodeCpuMs'] + side['runCpuMs']:6.2f} CPU ms/frame  (decoding {side['decodeCpuMs']:.2f},"
        f" session.run {side['runCpuMs']:.2f}); the pipeline has {side['speedToCeiling']:.2f} x the frames/s"
        f" at {side['cpuToBare']:.2f} x the CPU{rest}"
        for title, (side, rest) in sides.items()
    ]


def _figures(figures: Mapping[str, Any]) -> str:
    latency = "  ".join(f"{key} {value:.1f}" for key, value in figures["latencyMs"].items())
    return (
        f"{figures['framesPerSecond']:8.1f} frames/s  {figures['cpuMsPerFrame']:6.2f} CPU ms/frame  "
        f"latency ms {latency}  age p99 {figures['ageMs']['p99']:.0f}  fairness {figures['fairness']:.3f}  "
        f"goodput {figures['goodputPerSecond']:.1f}/s  {figures['rssMiB']:.0f} MiB  "
        f"dropped {figures['dropped'] or 'none'}"
    )
