"""The ceiling of a pipeline on a CPU: what one decoded picture and one run of the network cost by themselves.

No more than cores / (decoding + running) frames a second can come out of a machine, whatever is built around
the two. Both are measured on one thread, and on as many at once as there are lanes: cores that share what is
beneath them are slower together than each alone.
"""

import statistics
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from visionedge.model.model import Model
from visionedge.ops.bench.baseline import clip_of, network_of
from visionedge.ops.bench.tally import Run
from visionedge.runtime.process_limits import usable_cores

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
