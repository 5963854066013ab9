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
from visionedge.engine.interface import Engine
from visionedge.errors import ConfigError
from visionedge.frames.types import Detections
from visionedge.model.model import Model, load_model
from visionedge.model.parity import MATCH_CONFIDENCE, compare_detections
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.baseline import PlainLoop, open_network, resolve_clip
from visionedge.ops.bench.pipeline_run import (
    PipelineLoad,
    PipelineRun,
    ResultRecord,
    RunCost,
    cpu_s,
    open_engine_setup,
    rss_mib,
    run_pipeline,
    sum_dropped,
    summarize_run,
)
from visionedge.ops.bench.report import describe_machine, format_camera_count
from visionedge.ops.bench.virtual_cameras import SyntheticSpec
from visionedge.runtime.process_limits import usable_cores

# How many cameras until it is too much? Decided purely: doubling, then halving the gap.


def find_largest_passing(passes: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` of which `holds` says yes, 0 if not even 1; asks about 2 log2 times.

    `holds` is taken to say yes to everything below a yes. Near the edge, where it would say now this and now
    that, the answer is one of the numbers there.
    """
    good, bad = 0, 1
    while bad <= limit and passes(bad):
        good, bad = bad, bad * 2
    if good and bad > limit:
        if good == limit or passes(limit):
            return limit
        bad = limit
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if passes(middle) else (good, middle)
    return good


# Whether the pipeline sees what the plain loop sees: both look at the same pictures of a clip.


_AGREEMENT_STEP = 10


def measure_baseline_agreement(
    source: str, engine: Engine, selection: Selection, plain: PlainLoop, pictures: int = 30
) -> dict[str, Any]:
    """The share of boxes that both see (as `parity.compare` counts them), and how far their scores lie apart.

    They may differ a little: the pipeline brings pictures to the model's size by a shorter way.
    """
    low = replace(selection, confidence=MATCH_CONFIDENCE)
    shown = islice(plain.pictures(), 0, pictures * _AGREEMENT_STEP, _AGREEMENT_STEP)
    pairs = list(
        zip((plain.detect(picture, low) for picture in shown), _ours(source, engine, low), strict=False)
    )
    parity = compare_detections([theirs for theirs, _ in pairs], [ours for _, ours in pairs])
    return {
        "pictures": parity.pictures,
        "boxes": parity.boxes,
        "matched": round(parity.matched, 4),
        "scoreShift": round(parity.score_shift, 4),
    }


def _ours(source: str, engine: Engine, selection: Selection) -> Iterator[Detections]:
    with closing(open_source(parse_camera_uri(resolve_clip(source)))) as played:
        number = 0
        while (decoded := played.read()) is not None:
            if number % _AGREEMENT_STEP == 0:
                image, placement = decoded.fit_to_input(engine.info().model.input)
                ((rows,), _device) = engine.infer([image], selection.confidence)
                yield selection.apply(rows, placement)
            number += 1


# The ceiling of a pipeline on a CPU: what one decoded picture and one run of the network cost by themselves.
#
# No more than cores / (decoding + running) frames a second can come out of a machine, whatever is built
# around the two. Both are measured on one thread, and on as many at once as there are lanes: cores that share
# what is beneath them are slower together than each alone.


_STARTED_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class CeilingMeasurement:
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
        self._clip = resolve_clip(source)
        network = open_network(model, threads=1, device="cpu")
        size = (model.input.height_px, model.input.width_px, 3)
        tensor = network.tensor(np.random.default_rng(0).integers(0, 256, size, np.uint8))
        self._run: Callable[[], object] = lambda: network.run(tensor)

    def measure(self, seconds: float, threads: int) -> CeilingMeasurement:
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

        with ThreadPoolExecutor(threads, "bare") as thread_group:
            done = list(thread_group.map(work, range(threads)))
        count = sum(each[0] for each in done)
        return CeilingMeasurement(
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
        yield from _grab_frames(clip)
        return
    while True:
        with av.open(clip) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            yield from container.decode(stream)


def _grab_frames(clip: str) -> Generator[object, None, None]:
    while True:
        capture = cv2.VideoCapture(clip, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        while capture.grab():
            yield capture
        capture.release()


def build_ceiling_document(
    bare: Sequence[tuple[CeilingMeasurement, CeilingMeasurement]], runs: Sequence[PipelineRun]
) -> dict[str, Any]:
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


def _side(bare: Sequence[CeilingMeasurement], runs: Sequence[PipelineRun]) -> dict[str, float]:
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


def bench_pipeline(load: PipelineLoad, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and give the report as a document. `tell` hears of the progress.

    Raises:
        SourceError: the source cannot be read, or no frame came through.
        ModelError, DeviceError: the engine cannot be had.
    """
    model = load_model(load.model)
    selection = Selection.of(model, load.inference.confidence, load.inference.iou)
    _check(load)
    with ExitStack() as stack:
        largest_load = replace(load, cameras=load.max_cameras if load.saturate else load.cameras)
        setup = stack.enter_context(
            closing(open_engine_setup(largest_load, model, own_process=not load.in_process))
        )
        engine = setup.engine
        progress(f"{engine.info().device.describe()}; {engine.info().plan.reason}")
        found = (
            find_saturation(load, lambda less: run_pipeline(less, setup, selection), progress)
            if load.saturate
            else {}
        )
        load = replace(load, cameras=max(1, found.get("cameras", load.cameras)))
        references = _open_references(load, model, engine, selection, progress) if load.baseline else None
        sides: dict[str, Callable[[], PipelineRun]] = {
            "pipeline": lambda: run_pipeline(load, setup, selection, progress)
        }
        if load.compare_process:
            other = stack.enter_context(
                closing(open_engine_setup(load, model, own_process=load.in_process, like=engine))
            )
            sides[_OTHER[load.in_process]] = lambda: run_pipeline(load, other, selection, progress)
        if references is not None:
            plain = stack.enter_context(closing(references.plain))
            sides["baseline"] = lambda: _plain_run(plain, load.seconds, load.slo_ms)
        runs = _in_turns(sides, load.rounds, progress, references.measure if references else _do_nothing)
        report = _report(load, engine, runs)
        if references is not None:
            report |= _compared(report, runs, references) | {
                "baselineAgreement": measure_baseline_agreement(
                    load.source, engine, selection, references.plain
                )
            }
        return report | {"saturation": found} if found else report


def _check(load: PipelineLoad) -> None:
    """Tell what is wrong with a load before the engine warms up."""
    if SyntheticSpec.parse(load.source) is None:
        with closing(open_source(parse_camera_uri(load.source))):
            return
    if load.baseline:
        raise ConfigError([f"--source {load.source}: the plain loop of --baseline needs a video file"])


def find_saturation(
    load: PipelineLoad, run: Callable[[PipelineLoad], PipelineRun], progress: Callable[[str], None]
) -> dict[str, Any]:
    """How many cameras at the load's rate until the age of what is known passes its objective."""
    trials: list[dict[str, Any]] = []

    def passes_slo(cameras: int) -> bool:
        measured = run(replace(load, cameras=cameras))
        age_ms = measured.age_ms["p99"]
        trials.append(
            {"cameras": cameras, "ageMs": round(age_ms, 1), "framesPerSecond": measured.frames_per_s}
        )
        progress(
            f"{format_camera_count(cameras)}: {measured.frames_per_s:.1f} frames/s, age p99 {age_ms:.0f} ms"
        )
        return age_ms <= load.slo_ms

    # One moment in which the machine was busy with other things is not yet too many cameras.
    cameras = find_largest_passing(lambda number: passes_slo(number) or passes_slo(number), load.max_cameras)
    return {
        "cameras": cameras,
        "most": load.max_cameras,
        "sloMs": load.slo_ms,
        "fps": load.fps,
        "trials": trials,
    }


def _do_nothing() -> None:
    """Nothing else is measured in a round."""


def _in_turns(
    sides: Mapping[str, Callable[[], PipelineRun]],
    rounds: int,
    progress: Callable[[str], None],
    between_rounds: Callable[[], None] = _do_nothing,
) -> dict[str, list[PipelineRun]]:
    """Every side once a round, none is always the first; `also` is called in between."""
    runs: dict[str, list[PipelineRun]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            runs[name].append(sides[name]())
            progress(
                f"round {number + 1}/{rounds}: {_TITLES[name]} {runs[name][-1].frames_per_s:.1f} frames/s"
            )
        between_rounds()
    return runs


# --- the plain loop, and the ceiling ------------------------------------------------------------------------


@dataclass(slots=True)
class _References:
    """What the pipeline is held against: the plain loop in fp32, and in fp32 on a CPU the ceiling."""

    plain: PlainLoop
    ceiling: Ceiling | None
    seconds: float
    lanes: int
    bare: list[tuple[CeilingMeasurement, CeilingMeasurement]] = field(default_factory=list)

    def measure(self) -> None:
        """The ceiling of this round: on one thread, and on as many at once as there are lanes."""
        if self.ceiling is not None:
            alone, at_once = (self.ceiling.measure(self.seconds, threads) for threads in (1, self.lanes))
            self.bare.append((alone, at_once))


def _open_references(
    load: PipelineLoad, model: Model, engine: Engine, selection: Selection, progress: Callable[[str], None]
) -> _References:
    # The ceiling is that of the network as it was given.
    comparable = engine.info().device.effective == "cpu" and engine.info().precision.precision == "fp32"
    ceiling = Ceiling(model, load.source) if comparable else None
    plain = _best_plain(load, model, engine.info().device.effective, selection, progress)
    return _References(plain, ceiling, max(0.5, load.seconds / 4), engine.info().plan.lanes)


def _best_plain(
    load: PipelineLoad, model: Model, device: str, selection: Selection, progress: Callable[[str], None]
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
        progress(f"plain loop, {threads or 'default'} threads: {speed:.1f} frames/s")
        trials.append((speed, loop))
    best = max(trials, key=lambda trial: trial[0])[1]
    for _, loop in trials:
        if loop is not best:
            loop.close()
    return best


def _plain_run(loop: PlainLoop, seconds: float, slo_ms: float) -> PipelineRun:
    loop.step()  # the first frame warms up
    rows: list[ResultRecord] = []
    used_s, began_s = cpu_s(), time.monotonic()
    while time.monotonic() - began_s < seconds:
        began_ns = time.monotonic_ns()
        infer_ns, found = loop.step()
        rows.append(ResultRecord("plain", began_ns, time.monotonic_ns(), infer_ns, found))
    return summarize_run(rows, RunCost(time.monotonic() - began_s, cpu_s() - used_s, {}, rss_mib()), slo_ms)


def _report(load: PipelineLoad, engine: Engine, runs: Mapping[str, list[PipelineRun]]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "schema": "visionedge/bench-pipeline/1",
        "machine": describe_machine(engine.info().device),
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
        "model": engine.info().model.name,
        "device": engine.info().device.describe(),
        "plan": {"lanes": engine.info().plan.lanes, "buckets": list(engine.info().plan.buckets)},
        "precision": engine.info().precision.precision,
        "engineProcess": engine.info().process is not None,
        **{name: _medians(given) for name, given in runs.items()},
    }
    if load.compare_process:
        ours, theirs = runs["pipeline"], runs[_OTHER[load.in_process]]
        report["processRatio"] = _ratio(theirs, ours) if load.in_process else _ratio(ours, theirs)
    return report


def _compared(
    report: Mapping[str, Any], runs: Mapping[str, list[PipelineRun]], references: _References
) -> dict[str, Any]:
    """What the pipeline is to the plain loop and to the ceiling."""
    plain = {"threads": references.plain.threads, "decode": references.plain.decode}
    found = {
        "baseline": report["baseline"] | plain,
        "ratio": _ratio(runs["pipeline"], runs["baseline"]),
    }
    if references.bare:
        found["ceiling"] = build_ceiling_document(references.bare, runs["pipeline"])
    return found


def _ratio(ours: list[PipelineRun], theirs: list[PipelineRun]) -> dict[str, float]:
    """The medians of the rounds' ratios."""
    names = {"framesPerSecond": "frames_per_s", "cpuMsPerFrame": "cpu_ms_per_frame"}
    pairs = list(zip(ours, theirs, strict=True))
    return {
        key: round(statistics.median(getattr(a, name) / getattr(b, name) for a, b in pairs), 3)
        for key, name in names.items()
    }


def _medians(runs: list[PipelineRun]) -> dict[str, Any]:
    return {
        "framesPerSecond": round(_median(runs, "frames_per_s"), 3),
        "framesPerSecondAll": [round(run.frames_per_s, 2) for run in runs],
        "rounds": [_round(run) for run in runs],
        "cpuMsPerFrame": round(_median(runs, "cpu_ms_per_frame"), 3),
        "latencyMs": _median_by_key([run.latency_ms for run in runs]),
        "ageMs": _median_by_key([run.age_ms for run in runs]),
        "goodputPerSecond": round(_median(runs, "goodput_per_s"), 3),
        "stagesMs": _median_by_key([run.stages_ms for run in runs]),
        "dropped": sum_dropped(runs),
        "rssMiB": round(max(run.rss_mib for run in runs), 1),
        "detectionsPerFrame": round(_median(runs, "detections_per_frame"), 3),
        "fairness": round(_median(runs, "fairness"), 4),
    }


def _round(run: PipelineRun) -> dict[str, Any]:
    return {
        "framesPerSecond": round(run.frames_per_s, 3),
        "cpuMsPerFrame": round(run.cpu_ms_per_frame, 3),
        "latencyMs": {key: round(value, 3) for key, value in run.latency_ms.items()},
        "ageMs": {key: round(value, 3) for key, value in run.age_ms.items()},
    }


def _median_by_key(figures: list[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(f[key] for f in figures), 3) for key in figures[0]}


def _median(runs: list[PipelineRun], name: str) -> float:
    return float(statistics.median(getattr(run, name) for run in runs))


def format_report(report: dict[str, Any]) -> str:
    """The report for people."""
    load = report["load"]
    references = "; the plain loop in fp32" if "baseline" in report and report["precision"] != "fp32" else ""
    lines = [
        f"{report['model']} in {report['precision']}, {format_camera_count(load['cameras'])} of"
        f" {load['source']}, {report['device']}{references}"
    ]
    lines.extend(
        f"  {title:<24} {_figures(report[name])}" for name, title in _TITLES.items() if name in report
    )
    if load["fps"] is not None:
        lines.append(_format_latency_bound(report["pipeline"], load["fps"]))
    for key, title in (("ratio", "ratio to the plain loop"), ("processRatio", "ratio, own process/none")):
        if ratio := report.get(key):
            speed, cost = ratio["framesPerSecond"], ratio["cpuMsPerFrame"]
            lines.append(f"  {title:<24} {speed:8.2f} x frames/s  {cost:6.2f} x CPU per frame")
    if ceiling := report.get("ceiling"):
        lines.extend(_format_ceiling(ceiling))
    if agreement := report.get("baselineAgreement"):
        lines.append(
            f"  {agreement['matched']:.1%} of {agreement['boxes']} boxes on {agreement['pictures']} "
            "pictures are the plain"
            f" loop's too; their scores lie {agreement['scoreShift']:.3f} apart"
        )
    if found := report.get("saturation"):
        more = " (no more were tried)" if found["cameras"] == found["most"] else ""
        rate = "flat out" if found["fps"] is None else f"at {found['fps']:g} frames/s"
        lines.append(
            f"  {format_camera_count(found['cameras'])} {rate} keep{'s' if found['cameras'] == 1 else ''}"
            f" an age p99 within {found['sloMs']:g} ms{more}"
        )
    return "\n".join(lines) + "\n"


def _format_latency_bound(ours: Mapping[str, Any], fps: float) -> str:
    """Latency beside what is unavoidable under overload: a batch under way, one's own, and a turn's frame."""
    batch_ms = ours["stagesMs"]["infer"]
    return (
        f"  latency p99 {ours['latencyMs']['p99']:.0f} ms; two batches and a frame's interval are"
        f" {2 * batch_ms + 1000 / fps:.0f} ms"
    )


def _format_ceiling(ceiling: Mapping[str, Any]) -> list[str]:
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
