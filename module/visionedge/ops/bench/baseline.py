"""What `bench --baseline` compares the pipeline with: a plain loop, and the ceiling of the machine.

`PlainLoop` is the program that people write first: read, resize, convert to float, session.run, decode,
suppress, one camera after the other, all in numpy with the original network. A model whose head it cannot
decode runs as its compiled graph, which makes the loop faster than a user's own.

`Ceiling` measures what decoding one picture and one bare inference cost by themselves: no pipeline gives
more than cores / (decoding + running) frames per second. Both are measured on one thread, and on as many
threads at once as there are lanes, because cores that share memory and caches are slower together.
"""

import statistics
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.camera.sources.open import DEMO_CLIP, open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.engine.autotune import make_noise_pictures
from visionedge.engine.interface import Engine
from visionedge.errors import SourceError
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import Detections, Picture, Placement
from visionedge.model.compiler.compile import compile_model
from visionedge.model.decoding import DenseDecoder
from visionedge.model.heads.nanodet import DflDecoder, NanoDetScale
from visionedge.model.model import Model
from visionedge.model.parity import MATCH_CONFIDENCE, compare_detections
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.pipeline_run import PipelineRun
from visionedge.runtime.installation import find_bundled_file
from visionedge.runtime.ort import import_onnxruntime
from visionedge.runtime.process_limits import usable_cores
from visionedge.runtime.redaction import mask_address

FloatArray = NDArray[np.float32]
Candidates = tuple[FloatArray, FloatArray, NDArray[np.intp]]
"""boxes (n, 4) in input pixels (corners), scores (n,), classes (n,)."""

Outputs = Mapping[str, FloatArray]

_AGREEMENT_STEP = 10
"""Every tenth picture of the clip is compared."""

_STARTED_WITHIN_S = 60.0


# --- the plain loop -----------------------------------------------------------------------------------------


class PlainLoop:
    """One thread that serves all cameras in turn. `threads` is onnxruntime's intra-op setting; 0: default."""

    def __init__(
        self, model: Model, selection: Selection, *, source: str, cameras: int, threads: int, device: str
    ) -> None:
        self.threads = threads
        self._model = model
        self._selection = selection
        self._source = resolve_clip(source)
        self._captures = [_open(self._source) for _ in range(cameras)]
        self._turn = 0
        self._network = open_network(model, threads=threads, device=device)
        self.decode = "numpy" if isinstance(self._network, PlainNetwork) else "compiled graph"

    def step(self) -> tuple[int, int]:
        """Process one frame of the next camera: the ns in `session.run`, and the number of detections."""
        rows, _, infer_ns = self._infer(self._read(), self._selection)
        return infer_ns, len(rows)

    def detect(self, picture: Picture, selection: Selection) -> Detections:
        """The detections of one picture, relative to its size."""
        rows, placement, _ = self._infer(picture, selection)
        return replace(selection, iou=None).apply(rows, placement)

    def _infer(self, picture: Picture, selection: Selection) -> tuple[FloatArray, Placement, int]:
        """The rows (n, 6) after suppression, the place of the picture, and the ns in `session.run`."""
        image, placement = fit_to_input(picture, self._model.input)
        tensor = self._network.tensor(image)
        began_ns = time.monotonic_ns()
        outputs = self._network.run(tensor)
        infer_ns = time.monotonic_ns() - began_ns
        boxes, scores, ids = self._network.candidates(outputs, selection.confidence)
        kept = _suppress(boxes, scores, ids, selection)
        return np.column_stack([boxes, scores, ids])[kept].astype(np.float32), placement, infer_ns

    def pictures(self) -> Iterator[Picture]:
        """The pictures of the clip, once."""
        capture = _open(self._source)
        while (read := capture.read())[0]:
            yield np.asarray(read[1], np.uint8)
        capture.release()

    def close(self) -> None:
        """Close the video files."""
        for capture in self._captures:
            capture.release()

    def _read(self) -> Picture:
        index, self._turn = self._turn, (self._turn + 1) % len(self._captures)
        good, picture = self._captures[index].read()
        if not good:
            self._captures[index].release()
            self._captures[index] = _open(self._source)
            good, picture = self._captures[index].read()
            if not good:
                raise SourceError(f"{mask_address(self._source)} has no picture")
        return np.asarray(picture, np.uint8)


def resolve_clip(source: str) -> str:
    """The path of the video file of a source."""
    uri = parse_camera_uri(source)
    return str(find_bundled_file(DEMO_CLIP)) if uri.kind == "demo" else uri.target


def _suppress(boxes: FloatArray, scores: FloatArray, ids: NDArray[np.intp], wanted: Selection) -> list[int]:
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    iou = 1.0 if wanted.iou is None else wanted.iou
    kept = cv2.dnn.NMSBoxesBatched(corners.tolist(), scores.tolist(), ids.tolist(), wanted.confidence, iou)
    return [int(index) for index in np.asarray(kept).ravel()]


def _open(source: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise SourceError(f"{mask_address(source)} cannot be opened by the plain loop; use a video file")
    return capture


# --- its network --------------------------------------------------------------------------------------------


def open_network(model: Model, *, threads: int, device: str) -> "PlainNetwork | CompiledNetwork":
    """The original network of a model, or its compiled graph if `PlainNetwork` cannot run it."""
    if can_decode(model):
        return PlainNetwork(model, threads=threads, device=device)
    return CompiledNetwork(open_plain_session(compile_model(model), threads, device))


class PlainNetwork:
    """The original network of a model, for which `can_decode` is true, with pre- and postprocessing in numpy.

    `threads` is onnxruntime's intra-op setting; 0 is its default.
    """

    def __init__(self, model: Model, *, threads: int, device: str) -> None:
        self._model = model
        self._session = open_plain_session(str(model.path), threads, device)
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def tensor(self, image: Picture) -> FloatArray:
        """A picture at the model's input size as the network's input: float32 (1, 3, H, W)."""
        preprocess = self._model.interpretation.preprocess
        if preprocess.color == "rgb":
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
        tensor = image.astype(np.float32)
        if preprocess.scale != 1:
            tensor = np.multiply(tensor, np.float32(preprocess.scale))
        if any(preprocess.mean):
            tensor = np.subtract(tensor, np.array(preprocess.mean, np.float32))
        if preprocess.std != (1.0, 1.0, 1.0):
            tensor = np.divide(tensor, np.array(preprocess.std, np.float32))
        return np.ascontiguousarray(tensor.transpose(2, 0, 1)[None])

    def run(self, tensor: FloatArray) -> dict[str, FloatArray]:
        """The outputs of the network by name."""
        outputs = self._session.run(None, {self._input: tensor})
        return dict(zip(self._outputs, outputs, strict=True))

    def candidates(self, outputs: Outputs, confidence: float) -> Candidates:
        """The outputs decoded: candidates from a confidence on, before suppression."""
        boxes, every, _ = self._decoded(outputs)
        ids, scores = every.argmax(1), every.max(1)
        keep = scores >= confidence
        return boxes[keep], scores[keep], ids[keep]

    def rows(self, outputs: Outputs, limit: int) -> FloatArray:
        """The outputs decoded to the rows of the compiled graph: the `limit` best (K, 6) by score."""
        boxes, every, one_class = self._decoded(outputs)
        if one_class:
            ids, scores = every.argmax(1), every.max(1)
            anchors = np.argsort(-scores)[:limit]
            return np.column_stack([boxes[anchors], scores[anchors], ids[anchors]]).astype(np.float32)
        flat = every.ravel()
        best = np.argpartition(flat, -limit)[-limit:] if len(flat) > limit else np.arange(len(flat))
        best = best[np.argsort(-flat[best])]
        anchors, ids = np.divmod(best, every.shape[1])
        return np.column_stack([boxes[anchors], flat[best], ids]).astype(np.float32)

    def _decoded(self, outputs: Outputs) -> tuple[FloatArray, FloatArray, bool]:
        """Boxes (n, 4), the scores of all classes (n, C), and whether only an anchor's best class counts."""
        decoder = self._model.interpretation.decoder
        if isinstance(decoder, DflDecoder):
            return *_dfl(outputs, decoder), False
        if isinstance(decoder, DenseDecoder):
            return *_table(outputs, decoder), True
        raise TypeError(f"there is no plain decoder for {self._model.head}")


def can_decode(model: Model) -> bool:
    """Whether `PlainNetwork` can run a model."""
    target = model.interpretation.input
    plain = target.dtype == "float32" and target.layout == "NCHW" and target.batch in (None, 1)
    return plain and isinstance(model.interpretation.decoder, DflDecoder | DenseDecoder)


def open_plain_session(graph: str | bytes, threads: int, device: str) -> Any:
    """A session with default options on the device, else on the CPU. Raises what onnxruntime raises."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    if device != "cpu":
        providers.insert(0, "CUDAExecutionProvider")
    return onnxruntime.InferenceSession(graph, options, providers=providers)


def _dfl(outputs: Outputs, decoder: DflDecoder) -> tuple[FloatArray, FloatArray]:
    """Boxes (n, 4) and the scores of all classes (n, C): pairs of maps [1, n, C] and [1, n, 4 * bins]."""
    scores = np.concatenate([outputs[scale.scores][0] for scale in decoder.scales])
    boxes = np.concatenate([_distances(outputs[s.boxes][0], s, decoder.cell_offset) for s in decoder.scales])
    return boxes.astype(np.float32), 1 / (1 + np.exp(-scores)) if decoder.sigmoid else scores


def _distances(bins: FloatArray, scale: NanoDetScale, cell_offset: float) -> FloatArray:
    """Boxes of one scale: the distance to a side is the mean bin of a softmax, in strides."""
    weights = bins.reshape(len(bins), 4, -1)
    weights = np.exp(weights - weights.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    distance = weights @ np.arange(weights.shape[2], dtype=np.float32) * scale.stride_px
    row, column = np.divmod(np.arange(len(bins)), scale.columns)
    centre = (np.stack([column, row], axis=1) + cell_offset) * scale.stride_px
    return np.concatenate([centre - distance[:, :2], centre + distance[:, 2:]], axis=1)


def _table(outputs: Outputs, decoder: DenseDecoder) -> tuple[FloatArray, FloatArray]:
    """Boxes (n, 4) and the scores of all classes (n, C) of rows (centre, size[, objectness], classes)."""
    table = outputs[decoder.output][0]
    if decoder.columns:
        table = table.T
    centre, size = table[:, :2], table[:, 2:4]
    if (cells := decoder.cells) is not None:
        grids, strides = [], []
        for stride_px in cells.strides_px:
            columns, rows = -(-cells.width_px // stride_px), -(-cells.height_px // stride_px)
            y, x = np.divmod(np.arange(rows * columns), columns)
            grids.append(np.stack([x, y], axis=1))
            strides.append(np.full((rows * columns, 1), stride_px))
        spans_px = np.concatenate(strides)
        centre, size = (centre + np.concatenate(grids)) * spans_px, np.exp(size) * spans_px
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1).astype(np.float32)
    return boxes, table[:, 5:] * table[:, 4:5] if decoder.objectness else table[:, 4:]


class CompiledNetwork:
    """The compiled graph with the methods of `PlainNetwork`."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name

    def tensor(self, image: Picture) -> Any:
        return image[None]

    def run(self, tensor: Any) -> Mapping[str, FloatArray]:
        return {"rows": self._session.run(None, {self._input: tensor})[0]}

    def candidates(self, outputs: Mapping[str, FloatArray], confidence: float) -> Candidates:
        rows = outputs["rows"][0]
        rows = rows[rows[:, 4] >= confidence]
        return rows[:, :4], rows[:, 4], rows[:, 5].astype(np.intp)


# --- agreement of the pipeline with the plain loop ----------------------------------------------------------


def measure_baseline_agreement(
    source: str, engine: Engine, selection: Selection, plain: PlainLoop, pictures: int = 30
) -> dict[str, Any]:
    """The share of boxes that both find (see `compare_detections`), and the difference of their scores.

    The pipeline resizes from the decoder's planes, the plain loop from BGR pictures, so they differ slightly.
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


# --- the ceiling --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CeilingMeasurement:
    """Processor ms of decoding one picture and of one run, and the frames/s of `threads` threads together."""

    threads: int
    decode_ms: float
    run_ms: float
    frames_per_s: float

    @property
    def frame_ms(self) -> float:
        """Processor ms of both."""
        return self.decode_ms + self.run_ms

    @property
    def ceiling_per_s(self) -> float:
        """The frames per second that all cores can give at this cost."""
        return usable_cores() * 1000 / self.frame_ms


def make_network_runner(model: Model) -> Callable[[], object]:
    """A function that runs the original network of a model on one picture, in onnxruntime on the CPU."""
    network = open_network(model, threads=1, device="cpu")
    tensor = network.tensor(make_noise_pictures(model.input, 1)[0])
    return lambda: network.run(tensor)


class Ceiling:
    """Decodes `source`, a video file, and calls `run`, a bare inference: nothing else."""

    def __init__(self, run: Callable[[], object], source: str) -> None:
        self._clip = resolve_clip(source)
        self._run = run

    def measure(self, seconds: float, threads: int) -> CeilingMeasurement:
        """Run `threads` threads for `seconds`, each with its own decoder.

        A run has all of the process's time that is not decoding: OpenVINO computes on threads of its own.
        """
        began_cpu_ns: list[int] = []
        together = threading.Barrier(threads, lambda: began_cpu_ns.append(time.process_time_ns()))

        def work(_: int) -> tuple[int, int, int]:
            pictures = _decoded(self._clip)
            next(pictures), self._run()  # warm up
            together.wait(_STARTED_WITHIN_S)
            began_ns, decode_ns, count = time.monotonic_ns(), 0, 0
            while not count or time.monotonic_ns() - began_ns < seconds * 1e9:
                before_ns = time.thread_time_ns()
                next(pictures)
                decode_ns += time.thread_time_ns() - before_ns
                self._run()
                count += 1
            pictures.close()
            return count, decode_ns, time.monotonic_ns() - began_ns

        with ThreadPoolExecutor(threads, "bare") as thread_group:
            done = list(thread_group.map(work, range(threads)))
        count, decode_ns = sum(each[0] for each in done), sum(each[1] for each in done)
        return CeilingMeasurement(
            threads,
            decode_ms=decode_ns / 1e6 / count,
            run_ms=(time.process_time_ns() - began_cpu_ns[0] - decode_ns) / 1e6 / count,
            frames_per_s=sum(each[0] * 1e9 / each[2] for each in done),
        )


def _decoded(clip: str) -> Generator[object, None, None]:
    """The pictures of a clip in a loop, decoded on the calling thread and not converted."""
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
    """Medians of the ceiling and of the runs' ratios to it, for one thread and for one thread per lane.

    `bare` has (one thread, one per lane) of each round, beside its run. `measuredPerSecond` is the speed of
    the bare threads in the same rounds: on a busy machine it is below the ceiling, as the pipeline is.
    """
    alone, together = ([pair[index] for pair in bare] for index in (0, 1))
    ratios = [run.frames_per_second / each.frames_per_s for run, each in zip(runs, together, strict=True)]
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
        "speedToCeiling": [run.frames_per_second / each.ceiling_per_s for run, each in pairs],
        "cpuToBare": [run.cpu_ms_per_frame / each.frame_ms for run, each in pairs],
    }
    return {name: round(statistics.median(values), 3) for name, values in figures.items()}
