"""The pipeline beside programs that others write, interleaved: their frames/s and processor time.

    python tools/peers.py --source vtest.avi --rounds 5 --json peers.json

- `predict loop`: what a first program does, and `ultralytics` in essence: OpenCV reads, numpy letterboxes, a
  session of onnxruntime with default threads computes, OpenCV suppresses; one camera after the other.
- `openvino`: OpenVINO's own asynchronous loop: its PrePostProcessor, the throughput hint, an AsyncInferQueue;
  in the precision that it takes by itself, and in f32. Skipped without the package `openvino`.

All sides play the same clip with the same model and the same number of readers, in turns, because the speed
of a machine varies within seconds; ratios are medians over the rounds. `bench pipeline --baseline` is apart:
its plain loop has the best thread setting.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np

from visionedge.config.load import parse_config
from visionedge.errors import ConfigError, SourceError, VisionedgeError
from visionedge.frames.types import InputSpec, Picture
from visionedge.model.model import Model, find_bundled_model, load_model
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.baseline import Outputs, PlainNetwork, can_decode, resolve_clip
from visionedge.ops.bench.machine import (
    OTHER_PROCESSES_KEY,
    OtherProcessesLoad,
    describe_machine,
    describe_other_load,
)
from visionedge.ops.bench.pipeline_run import PipelineLoad, cpu_s, open_engine_process, run_pipeline
from visionedge.runtime.measurement import median_ratio, run_in_rounds

PIPELINE = "pipeline"


@dataclass(frozen=True, slots=True)
class PeerRun:
    """One run of a side: its speed, the processor ms of a frame, and the boxes in a frame."""

    frames_per_s: float
    cpu_ms: float
    boxes: float


class ClipReaders:
    """A number of readers of one clip that take turns; each begins again at its end."""

    def __init__(self, path: str, count: int) -> None:
        self._path = path
        self._captures = [self._open() for _ in range(count)]
        self._turn = 0

    def read(self) -> Picture:
        """The next picture of the next reader.

        Raises:
            SourceError: the clip has no picture.
        """
        index, self._turn = self._turn, (self._turn + 1) % len(self._captures)
        good, picture = self._captures[index].read()
        if not good:
            self._captures[index].release()
            self._captures[index] = self._open()
            good, picture = self._captures[index].read()
        if not good:
            raise SourceError(f"{self._path} has no picture")
        return np.asarray(picture, np.uint8)

    def close(self) -> None:
        """Close the files."""
        for capture in self._captures:
            capture.release()

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(self._path)
        if not capture.isOpened():
            raise SourceError(f"{self._path} cannot be opened; use a video file")
        return capture


def letterbox(picture: Picture, spec: InputSpec) -> Picture:
    """A picture at the model's input size, in numpy and OpenCV as a first program does it."""
    place = spec.place(picture.shape[1], picture.shape[0])
    left, top, width, height = map(int, (place.left_px, place.top_px, place.width_px, place.height_px))
    canvas = np.full((spec.height_px, spec.width_px, 3), spec.pad, np.uint8)
    canvas[top : top + height, left : left + width] = cv2.resize(picture, (width, height))
    return canvas


def count_boxes(network: PlainNetwork, outputs: Outputs, selection: Selection) -> int:
    """Decode the outputs of a network, suppress, and count what is left."""
    boxes, scores, ids = network.candidates(outputs, selection.confidence)
    if not len(boxes):
        return 0
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    iou = 1.0 if selection.iou is None else selection.iou
    return len(
        cv2.dnn.NMSBoxesBatched(corners.tolist(), scores.tolist(), ids.tolist(), selection.confidence, iou)
    )


# --- the sides ----------------------------------------------------------------------------------------------


class PredictLoop:
    """One picture after the other on the calling thread, one session with onnxruntime's default threads."""

    def __init__(self, model: Model, selection: Selection, readers: ClipReaders) -> None:
        self._spec, self._selection, self._readers = model.input, selection, readers
        self._network = PlainNetwork(model, threads=0, device="cpu")

    def run(self, seconds: float) -> PeerRun:
        """Run for some seconds."""
        self._step()  # the first picture warms up
        used_s, began_s, boxes = cpu_s(), time.monotonic(), list[int]()
        while time.monotonic() - began_s < seconds:
            boxes.append(self._step())
        return _summarize(boxes, time.monotonic() - began_s, cpu_s() - used_s)

    def _step(self) -> int:
        tensor = self._network.tensor(letterbox(self._readers.read(), self._spec))
        return count_boxes(self._network, self._network.run(tensor), self._selection)


class OpenVinoLoop:
    """OpenVINO's asynchronous loop; `precision` is its INFERENCE_PRECISION_HINT, None: its own choice.

    Raises:
        VisionedgeError: OpenVINO cannot load the network.
    """

    def __init__(
        self, model: Model, selection: Selection, readers: ClipReaders, *, precision: str | None
    ) -> None:
        self._spec, self._selection, self._readers = model.input, selection, readers
        self._decoder = PlainNetwork(model, threads=1, device="cpu")
        openvino: Any = importlib.import_module("openvino")
        properties = {"PERFORMANCE_HINT": "THROUGHPUT"}
        if precision is not None:
            properties["INFERENCE_PRECISION_HINT"] = precision
        try:
            core = openvino.Core()
            self._compiled = core.compile_model(_preprocess(openvino, core, model), "CPU", properties)
        except RuntimeError as error:
            raise VisionedgeError(f"OpenVINO refuses {model.path}: {str(error).strip()[:200]}") from None
        self._names = [output.get_any_name() for output in self._compiled.outputs]
        self._queue = openvino.AsyncInferQueue(self._compiled)
        self._queue.set_callback(self._done)
        self._boxes: list[int] = []

    @property
    def details(self) -> dict[str, Any]:
        """The precision and the number of requests that OpenVINO took."""
        get = self._compiled.get_property
        hint = get("INFERENCE_PRECISION_HINT")
        precision = hint if isinstance(hint, str) else hint.get_type_name()
        return {"precision": precision, "requests": len(self._queue), "streams": str(get("NUM_STREAMS"))}

    def run(self, seconds: float) -> PeerRun:
        """Run for some seconds, until all requests are answered."""
        self._submit()
        self._queue.wait_all()
        self._boxes.clear()
        used_s, began_s = cpu_s(), time.monotonic()
        while time.monotonic() - began_s < seconds:
            self._submit()
        self._queue.wait_all()
        return _summarize(self._boxes, time.monotonic() - began_s, cpu_s() - used_s)

    def _submit(self) -> None:
        self._queue.start_async({0: letterbox(self._readers.read(), self._spec)[None]})

    def _done(self, request: Any, _userdata: object) -> None:
        outputs = {name: np.asarray(request.get_output_tensor(i).data) for i, name in enumerate(self._names)}
        self._boxes.append(count_boxes(self._decoder, outputs, self._selection))


def _preprocess(openvino: Any, core: Any, model: Model) -> Any:
    """The network of a model that takes uint8 BGR (1, H, W, 3), prepared by OpenVINO."""
    network, spec, wanted = core.read_model(str(model.path)), model.input, model.interpretation.preprocess
    network.reshape([1, 3, spec.height_px, spec.width_px])
    prepare = importlib.import_module("openvino.preprocess")
    steps = prepare.PrePostProcessor(network)
    source = steps.input()
    source.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    source.tensor().set_color_format(prepare.ColorFormat.BGR)
    source.model().set_layout(openvino.Layout("NCHW"))
    chain = source.preprocess().convert_element_type(openvino.Type.f32)
    if wanted.color == "rgb":
        chain.convert_color(prepare.ColorFormat.RGB)
    if wanted.scale != 1:
        chain.scale(1 / wanted.scale)
    if any(wanted.mean):
        chain.mean(list(wanted.mean))
    if wanted.std != (1.0, 1.0, 1.0):
        chain.scale(list(wanted.std))
    return steps.build()


def _summarize(boxes: Sequence[int], took_s: float, used_s: float) -> PeerRun:
    return PeerRun(len(boxes) / took_s, used_s * 1000 / max(len(boxes), 1), float(np.mean(boxes or [0])))


# --- the comparison -----------------------------------------------------------------------------------------


def compare(load: PipelineLoad, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run all sides in rounds, and return the report as a document.

    Raises:
        ConfigError: no numpy code here decodes the outputs of the model.
        SourceError: the clip cannot be read.
        ModelError, DeviceError: the engine cannot be opened.
    """
    model = load_model(load.model)
    if not can_decode(model):
        raise ConfigError([f"--model {load.model}: no plain decoder for its head ({model.head})"])
    selection = Selection.of(model, load.inference.confidence, load.inference.iou)
    with (
        closing(ClipReaders(resolve_clip(load.source), load.cameras)) as readers,
        open_engine_process(load, model) as (engine, frame_pool),
    ):
        info = engine.info()
        progress(f"{info.device.describe()}; {info.choice.precision}; {info.plan.reason}")

        def run_ours() -> PeerRun:
            run = run_pipeline(load, engine, frame_pool, selection)
            return PeerRun(run.frames_per_second, run.cpu_ms_per_frame, run.detections_per_frame)

        loop = PredictLoop(model, selection, readers)
        sides = {PIPELINE: run_ours, "predict loop": lambda: loop.run(load.seconds)}
        details: dict[str, dict[str, Any]] = {
            PIPELINE: {
                "device": info.device.effective,
                "precision": info.choice.precision,
                "lanes": info.plan.lanes,
                "batch": info.plan.max_batch,
            },
            "predict loop": {"precision": "fp32"},
        }
        skipped = _add_openvino(
            sides, details, lambda hint: OpenVinoLoop(model, selection, readers, precision=hint), load
        )

        def after_round(number: int, results: Mapping[str, Sequence[PeerRun]]) -> None:
            speeds = ", ".join(f"{name} {runs[-1].frames_per_s:.1f}" for name, runs in results.items())
            progress(f"round {number}/{load.rounds}, frames/s: {speeds}")

        results = run_in_rounds(sides, load.rounds, after_round)
    return make_report(load, model.name, results, details, skipped)


def _add_openvino(
    sides: dict[str, Callable[[], PeerRun]],
    details: dict[str, dict[str, Any]],
    open_loop: Callable[[str | None], OpenVinoLoop],
    load: PipelineLoad,
) -> dict[str, str]:
    """Add OpenVINO's sides; why they are skipped, by name."""
    names = {"openvino": None, "openvino f32": "f32"}
    if importlib.util.find_spec("openvino") is None:
        return dict.fromkeys(names, "the package openvino is not installed")
    skipped = {}
    for name, hint in names.items():
        try:
            opened = open_loop(hint)
        except VisionedgeError as error:
            skipped[name] = str(error)
            continue
        sides[name] = lambda opened=opened: opened.run(load.seconds)  # type: ignore[misc]
        details[name] = opened.details
    return skipped


def make_report(
    load: PipelineLoad,
    model: str,
    results: Mapping[str, Sequence[PeerRun]],
    details: Mapping[str, Mapping[str, Any]],
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    """Medians of the rounds, and the ratios of the pipeline to each side."""
    ours = results[PIPELINE]
    return {
        "schema": "visionedge/peers/1",
        "machine": describe_machine(),
        "load": {
            "source": Path(load.source).name,
            "cameras": load.cameras,
            "seconds": load.seconds,
            "rounds": load.rounds,
        },
        "model": model,
        "sides": {
            name: {
                "framesPerSecond": round(median(run.frames_per_s for run in runs), 2),
                "framesPerSecondAll": [round(run.frames_per_s, 2) for run in runs],
                "cpuMsPerFrame": round(median(run.cpu_ms for run in runs), 3),
                "boxesPerFrame": round(median(run.boxes for run in runs), 2),
                "pipelineToIt": round(median_ratio(ours, runs, lambda run: run.frames_per_s), 3),
                "pipelineToItByCpu": round(median_ratio(runs, ours, lambda run: max(run.cpu_ms, 1e-6)), 3),
                **details[name],
            }
            for name, runs in results.items()
        },
        "skipped": dict(skipped),
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table."""
    load = report["load"]
    lines = [
        f"{report['model']}, {load['cameras']} readers of {load['source']}, {load['rounds']} rounds of"
        f" {load['seconds']:g} s",
        "",
        "| side | precision | frames/s | CPU ms/frame | boxes/frame | pipeline / it | by processor time |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {side['precision']} | {side['framesPerSecond']:.1f} | {side['cpuMsPerFrame']:.2f} |"
        f" {side['boxesPerFrame']:.1f} | {side['pipelineToIt']:.2f} | {side['pipelineToItByCpu']:.2f} |"
        for name, side in report["sides"].items()
    ]
    lines += [f"\n{name}: skipped, {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit codes as those of `visionedge`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--source", default="demo:", metavar="FILE", help="the clip (default: the bundled one)"
    )
    parser.add_argument(
        "--model", type=Path, metavar="FILE", help="an ONNX file (default: the bundled model)"
    )
    parser.add_argument("--cameras", type=int, default=4, metavar="N", help="readers (default: %(default)s)")
    parser.add_argument(
        "--precision", default="auto", help="inference.precision of the pipeline (default: auto)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the report to this file")
    given = parser.parse_args(arguments)
    if min(given.cameras, given.rounds, given.seconds) <= 0:
        parser.error("--cameras, --rounds and --seconds must be greater than 0")
    others = OtherProcessesLoad()
    try:
        inference = {"device": "cpu", "precision": given.precision}
        with tempfile.TemporaryDirectory() as folder:  # as a first start: everything is measured
            load = PipelineLoad(
                model=given.model or find_bundled_model(),
                source=given.source,
                cameras=given.cameras,
                seconds=given.seconds,
                rounds=given.rounds,
                inference=parse_config({"inference": inference}).inference,
                data=Path(folder),
            )
            report = compare(load, lambda line: print(line, file=sys.stderr))
    except VisionedgeError as error:
        print(f"peers: {error}", file=sys.stderr)
        return error.exit_code
    report[OTHER_PROCESSES_KEY] = others.share()
    if given.json:
        Path(given.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(format_report(report) + describe_other_load(report), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
