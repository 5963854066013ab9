"""The program that people write first: read, resize, float, session.run, decode, suppress; one loop.

It is the yardstick of `bench --baseline`, so it is written well, only plainly: numpy throughout, the original
network, every camera in turn. Heads it cannot decode go through the compiled graph, which flatters it.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.camera.sources.open import DEMO_CLIP
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import Detections, Picture
from visionedge.model.compiler.compile import compile_model
from visionedge.model.decoding import DenseDecoder
from visionedge.model.heads.nanodet import DflDecoder, NanoDetScale
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.runtime.installation import find_bundled_file
from visionedge.runtime.ort import import_onnxruntime
from visionedge.runtime.redaction import mask_address

# A network as people run it by hand: numpy in front of it, the original graph, numpy behind it.
#
# It is a yardstick, so it is written well, only plainly: whole arrays, nothing done that does nothing.


FloatArray = NDArray[np.float32]
Candidates = tuple[FloatArray, FloatArray, NDArray[np.intp]]
"""boxes (n, 4) in input pixels (corners), scores (n,), classes (n,)."""

Outputs = Mapping[str, FloatArray]


class PlainNetwork:
    """The original network of a model. `threads` is onnxruntime's intra-op setting; 0 leaves it as it comes.

    Only for models that `can_decode` says yes to.
    """

    def __init__(self, model: Model, *, threads: int, device: str) -> None:
        self._model = model
        self._session = open_plain_session(str(model.path), threads, device)
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def tensor(self, image: Picture) -> FloatArray:
        """A picture at the model's input size as the network wants it: float32 (1, 3, H, W)."""
        way = self._model.interpretation.preprocess
        if way.color == "rgb":
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
        tensor = image.astype(np.float32)
        if way.scale != 1:
            tensor = np.multiply(tensor, np.float32(way.scale))
        if any(way.mean):
            tensor = np.subtract(tensor, np.array(way.mean, np.float32))
        if way.std != (1.0, 1.0, 1.0):
            tensor = np.divide(tensor, np.array(way.std, np.float32))
        return np.ascontiguousarray(tensor.transpose(2, 0, 1)[None])

    def run(self, tensor: FloatArray) -> dict[str, FloatArray]:
        """The network itself."""
        outputs = self._session.run(None, {self._input: tensor})
        return dict(zip(self._outputs, outputs, strict=True))

    def candidates(self, outputs: Outputs, confidence: float) -> Candidates:
        """The outputs decoded: what is sure enough, before overlapping boxes are joined."""
        boxes, every, _ = self._decoded(outputs)
        ids, scores = every.argmax(1), every.max(1)
        keep = scores >= confidence
        return boxes[keep], scores[keep], ids[keep]

    def rows(self, outputs: Outputs, limit: int) -> FloatArray:
        """The outputs decoded to what the compiled graph gives: the best rows (K, 6) by falling score."""
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
        """Boxes (n, 4), the scores of all classes (n, C), and whether an anchor counts once."""
        decoder = self._model.interpretation.decoder
        if isinstance(decoder, DflDecoder):
            return *_dfl(outputs, decoder), False
        if isinstance(decoder, DenseDecoder):
            return *_table(outputs, decoder), True
        raise TypeError(f"there is no plain decoder for {self._model.head}")


def can_decode(model: Model) -> bool:
    """Whether a model can be run by hand here."""
    target = model.interpretation.input
    plain = target.dtype == "float32" and target.layout == "NCHW" and target.batch in (None, 1)
    return plain and isinstance(model.interpretation.decoder, DflDecoder | DenseDecoder)


def open_plain_session(graph: str | bytes, threads: int, device: str) -> Any:
    """A session as it comes, on the device or else the CPU. Raises what onnxruntime raises."""
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
    """Boxes of one scale: to each side of the cell's centre the mean bin of a softmax, in strides."""
    weights = bins.reshape(len(bins), 4, -1)
    weights = np.exp(weights - weights.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    distance = weights @ np.arange(weights.shape[2], dtype=np.float32) * scale.stride_px
    row, column = np.divmod(np.arange(len(bins)), scale.columns)
    centre = (np.stack([column, row], axis=1) + cell_offset) * scale.stride_px
    return np.concatenate([centre - distance[:, :2], centre + distance[:, 2:]], axis=1)


def _table(outputs: Outputs, decoder: DenseDecoder) -> tuple[FloatArray, FloatArray]:
    """Boxes (n, 4) and the scores of all classes (n, C): centre, size, perhaps objectness, classes."""
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


class PlainLoop:
    """`threads` is onnxruntime's intra-op setting; 0 leaves it as it comes."""

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
        """One frame of the camera whose turn it is: the ns in `session.run`, and how many were found."""
        picture = self._read()
        image, _ = fit_to_input(picture, self._model.input)
        tensor = self._network.tensor(image)
        began_ns = time.monotonic_ns()
        outputs = self._network.run(tensor)
        infer_ns = time.monotonic_ns() - began_ns
        found = self._network.candidates(outputs, self._selection.confidence)
        return infer_ns, len(_suppress(*found, self._selection))

    def detect(self, picture: Picture, selection: Selection) -> Detections:
        """What it finds on one picture, relative to it."""
        image, placement = fit_to_input(picture, self._model.input)
        outputs = self._network.run(self._network.tensor(image))
        boxes, scores, ids = self._network.candidates(outputs, selection.confidence)
        kept = _suppress(boxes, scores, ids, selection)
        rows = np.column_stack([boxes, scores, ids])[kept].astype(np.float32)
        return replace(selection, iou=None).apply(rows, placement)

    def pictures(self) -> Iterator[Picture]:
        """Its clip, once."""
        capture = _open(self._source)
        while (read := capture.read())[0]:
            yield np.asarray(read[1], np.uint8)
        capture.release()

    def close(self) -> None:
        """Give the files back."""
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
                raise SourceError(f"{mask_address(self._source)} gives no picture")
        return np.asarray(picture, np.uint8)


def resolve_clip(source: str) -> str:
    """The video file that a source plays."""
    uri = parse_camera_uri(source)
    return str(find_bundled_file(DEMO_CLIP)) if uri.kind == "demo" else uri.target


def _suppress(boxes: FloatArray, scores: FloatArray, ids: NDArray[np.intp], wanted: Selection) -> list[int]:
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    iou = 1.0 if wanted.iou is None else wanted.iou
    kept = cv2.dnn.NMSBoxesBatched(corners.tolist(), scores.tolist(), ids.tolist(), wanted.confidence, iou)
    return [int(index) for index in np.asarray(kept).ravel()]


def open_network(model: Model, *, threads: int, device: str) -> "PlainNetwork | CompiledNetwork":
    """The network of a model as it was given; its compiled graph where there is no plain decoder for it."""
    if can_decode(model):
        return PlainNetwork(model, threads=threads, device=device)
    return CompiledNetwork(open_plain_session(compile_model(model), threads, device))


class CompiledNetwork:
    """The compiled graph in the place of a `PlainNetwork`."""

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


def _open(source: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise SourceError(f"{mask_address(source)} cannot be opened by the plain loop; give a video file")
    return capture
