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
from visionedge.frames.letterbox import fit
from visionedge.frames.types import Detections, Picture
from visionedge.model.compiler.compile import compile_model
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.plain_network import Candidates, Floats, PlainNetwork, can_decode, plain_session
from visionedge.runtime.installation import bundled
from visionedge.runtime.redaction import masked_address


class PlainLoop:
    """`threads` is onnxruntime's intra-op setting; 0 leaves it as it comes."""

    def __init__(
        self, model: Model, selection: Selection, *, source: str, cameras: int, threads: int, device: str
    ) -> None:
        self.threads = threads
        self._model = model
        self._selection = selection
        self._source = clip_of(source)
        self._captures = [_open(self._source) for _ in range(cameras)]
        self._turn = 0
        self._network = network_of(model, threads=threads, device=device)
        self.decode = "numpy" if isinstance(self._network, PlainNetwork) else "compiled graph"

    def step(self) -> tuple[int, int]:
        """One frame of the camera whose turn it is: the ns in `session.run`, and how many were found."""
        picture = self._read()
        image, _ = fit(picture, self._model.input)
        tensor = self._network.tensor(image)
        began_ns = time.monotonic_ns()
        outputs = self._network.run(tensor)
        infer_ns = time.monotonic_ns() - began_ns
        found = self._network.candidates(outputs, self._selection.confidence)
        return infer_ns, len(_suppressed(*found, self._selection))

    def see(self, picture: Picture, selection: Selection) -> Detections:
        """What it finds on one picture, relative to it."""
        image, placement = fit(picture, self._model.input)
        outputs = self._network.run(self._network.tensor(image))
        boxes, scores, ids = self._network.candidates(outputs, selection.confidence)
        kept = _suppressed(boxes, scores, ids, selection)
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
                raise SourceError(f"{masked_address(self._source)} gives no picture")
        return np.asarray(picture, np.uint8)


def clip_of(source: str) -> str:
    """The video file that a source plays."""
    uri = parse_camera_uri(source)
    return str(bundled(DEMO_CLIP)) if uri.kind == "demo" else uri.target


def _suppressed(boxes: Floats, scores: Floats, ids: NDArray[np.intp], wanted: Selection) -> list[int]:
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    iou = 1.0 if wanted.iou is None else wanted.iou
    kept = cv2.dnn.NMSBoxesBatched(corners.tolist(), scores.tolist(), ids.tolist(), wanted.confidence, iou)
    return [int(index) for index in np.asarray(kept).ravel()]


def network_of(model: Model, *, threads: int, device: str) -> "PlainNetwork | CompiledNetwork":
    """The network of a model as it was given; its compiled graph where there is no plain decoder for it."""
    if can_decode(model):
        return PlainNetwork(model, threads=threads, device=device)
    return CompiledNetwork(plain_session(compile_model(model), threads, device))


class CompiledNetwork:
    """The compiled graph in the place of a `PlainNetwork`."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name

    def tensor(self, image: Picture) -> Any:
        return image[None]

    def run(self, tensor: Any) -> Mapping[str, Floats]:
        return {"rows": self._session.run(None, {self._input: tensor})[0]}

    def candidates(self, outputs: Mapping[str, Floats], confidence: float) -> Candidates:
        rows = outputs["rows"][0]
        rows = rows[rows[:, 4] >= confidence]
        return rows[:, :4], rows[:, 4], rows[:, 5].astype(np.intp)


def _open(source: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise SourceError(f"{masked_address(source)} cannot be opened by the plain loop; give a video file")
    return capture
