"""Pictures outside the river: fit, compute, give the result. For `detect` and `POST /api/v1/detect`."""

import time

from visionedge.engine.interface import SupportsInfer
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import Frame, FrameResult, Picture, Timing, utc_now
from visionedge.model.postprocess import Selection


def make_frame(picture: Picture, engine: SupportsInfer, sequence: int = 1, epoch: int = 1) -> Frame:
    """The picture as a frame of no camera, at the size the engine's model wants."""
    captured_ns, captured_utc = time.monotonic_ns(), utc_now()
    image, placement = fit_to_input(picture, engine.model.input)
    height_px, width_px = picture.shape[:2]
    return Frame(
        "", sequence, epoch, captured_ns, captured_utc, width_px, height_px, image, placement, lambda: picture
    )  # fmt: skip


def infer_frames(frames: list[Frame], engine: SupportsInfer, selection: Selection) -> list[FrameResult]:
    """Compute frames as one batch, on the calling thread.

    Raises:
        EngineError: the engine failed on them.
    """
    taken_ns = time.monotonic_ns()
    rows, device = engine.compute([frame.image for frame in frames], selection.confidence)
    done_ns = time.monotonic_ns()
    return [
        FrameResult(
            frame,
            selection.apply(row, frame.placement),
            Timing(
                taken_ns - frame.captured_ns,
                done_ns - taken_ns,
                time.monotonic_ns() - frame.captured_ns,
                len(frames),
            ),
            device,
            engine.model.name,
            engine.model.labels,
        )
        for frame, row in zip(frames, rows, strict=True)
    ]
