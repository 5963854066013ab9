"""The first run of an untrusted model, in a child process: ``python -m visionedge.model.compiler.trial_run``.

A valid graph can still make onnxruntime crash, run forever, or take all memory. So a compiled graph is
opened and run once in a child process. The child also checks that several pictures at once give the results
of each alone, which batching relies on, and that the rows can be detections.

The child reads a JSON line (`TrialTask`) and the graphs from stdin, and writes one JSON line per finding.
"""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from visionedge.errors import ModelError, UnavailableError
from visionedge.runtime.child_process import check_machine_limit, limit_this_child, run_child
from visionedge.runtime.ort import open_cpu_session

_MIN_ROWS = 50  # fewer rows are not judged
_SCORE_TOLERANCE = 1e-3
_MAX_CORNER_SHARE = 1 / 3
_MAX_BACKWARDS_SHARE = 0.5
_MIN_OVERSHOOT = 1.2
_NEARLY_ALL = 0.98
_MIN_CORRELATION = 0.5


def check_plausibility(rows: NDArray[np.float32], width_px: int, height_px: int) -> str:
    """Why the rows (K, 6) of a picture cannot be detections; "" if they can.

    The picture must be noise, on which a detector has low scores everywhere.
    """
    scores, classes = rows[:, 4], rows[:, 5]
    if len(rows) and (scores.min() < -_SCORE_TOLERANCE or scores.max() > 1 + _SCORE_TOLERANCE):
        return f"its scores go from {scores.min():.3g} to {scores.max():.3g}, not from 0 to 1"
    if (np.abs(classes - np.round(classes)) > _SCORE_TOLERANCE).any() or classes.min(
        initial=0
    ) < -_SCORE_TOLERANCE:
        return "its classes are not integers"
    real = rows[scores > 0]
    return _check_boxes(real, width_px, height_px) if len(real) >= _MIN_ROWS else ""


def _check_boxes(real: NDArray[np.float32], width_px: int, height_px: int) -> str:
    backwards = ((real[:, 2] < real[:, 0]) | (real[:, 3] < real[:, 1])).mean()
    if backwards > _MAX_BACKWARDS_SHARE:
        return f"{backwards:.0%} of its boxes end before they begin"
    if _look_like_corners(real, width_px, height_px):
        return (
            "nearly all its boxes are larger than the distance of their centre from the top left, and some"
            " reach far beyond the picture, as if two corners were read as a centre and a size"
        )
    right, bottom = real[:, [0, 2]].max(), real[:, [1, 3]].max()
    if right < width_px * _MAX_CORNER_SHARE and bottom < height_px * _MAX_CORNER_SHARE:
        return (
            f"all its boxes lie within {right:.3g} x {bottom:.3g} at the top left of {width_px} x"
            f" {height_px}, as if their unit were not a pixel of its input"
        )
    return ""


def _look_like_corners(rows: NDArray[np.float32], width_px: int, height_px: int) -> bool:
    """Whether boxes look as if two corners were read as a centre and a size.

    The second corner is always farther out than the first, and the two are correlated. The real size of a box
    does not depend on its centre.
    """
    left, top, right, bottom = rows[:, :4].astype(np.float64).T
    farther = ((right >= 3 * left) & (bottom >= 3 * top)).mean()
    beyond = right.max() > _MIN_OVERSHOOT * width_px or bottom.max() > _MIN_OVERSHOOT * height_px
    together = _are_correlated(left + right, right - left) and _are_correlated(top + bottom, bottom - top)
    return bool(farther >= _NEARLY_ALL and beyond and together)


def _are_correlated(centres: NDArray[np.float64], sizes: NDArray[np.float64]) -> bool:
    if not centres.std() or not sizes.std():
        return False
    return bool(np.corrcoef(centres, sizes)[0, 1] >= _MIN_CORRELATION)


FIRST_PICTURE_TIMEOUT_S = 40
COMPARISON_TIMEOUT_S = 120
_EXTRA_TIMEOUT_S = 30  # for a child that cannot start its own timer

COMPARED_PICTURES = 3
"""How many pictures are computed at once and one by one."""

_TOLERANCE = 1e-4
_FP16_TOLERANCE = 5e-3  # of float16: a few of its smallest steps
_ROW_TOLERANCE = np.array([0.2, 0.2, 0.2, 0.2, 2e-3, 0.5])
_MAX_COMPARED_ROWS = 500  # each row is compared with each
_MIN_MATCHING_SHARE = 0.97  # at the end of a list, rows with nearly equal scores can be exchanged


@dataclass(frozen=True, slots=True)
class TrialTask:
    """Bytes of the graph that is run, its pictures at a time, and of one with an open batch (0: none).

    `outputs` are further tensors to compare, beside the rows. `declared`: the model itself declares its batch
    as open, so only the rows must be the same. `first_s` and `comparison_s` limit the time.
    """

    fixed_graph: int
    batch: int
    dynamic_graph: int
    outputs: tuple[str, ...]
    declared: bool
    first_s: int
    comparison_s: int


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The result. `batchable`: pictures in one batch have the results of each alone; `reason` explains it.

    `rows` is K, the most rows per picture.
    """

    rows: int
    batchable: bool
    reason: str


def run_trial(
    fixed_graph: bytes, batch: int, dynamic_graph: bytes | None, outputs: Sequence[str], *, declared: bool
) -> TrialResult:
    """Run `fixed_graph` (uint8 [batch, H, W, 3] → rows, `outputs`) once, and compare it with `dynamic_graph`.

    Raises:
        ModelError: it crashes, runs too long, outputs NaN or infinity, or cannot be run.
        UnavailableError: onnxruntime cannot be used at all.
    """
    limits_s = (FIRST_PICTURE_TIMEOUT_S, COMPARISON_TIMEOUT_S)
    task = TrialTask(len(fixed_graph), batch, len(dynamic_graph or b""), tuple(outputs), declared, *limits_s)
    sent = b"".join((json.dumps(asdict(task)).encode(), b"\n", fixed_graph, dynamic_graph or b""))
    purpose = "try the model"
    timeout_s = sum(limits_s) + _EXTRA_TIMEOUT_S
    done = run_child("visionedge.model.compiler.trial_run", sent, timeout_s, purpose=purpose)
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    errors = "\n".join(str(finding.get("error", "")) for finding in findings).encode() + done.stderr
    clean = len(findings) == 1 + bool(dynamic_graph) and not any(finding.get("error") for finding in findings)
    if not clean:
        check_machine_limit(errors, purpose=purpose)
    return _evaluate(findings, done.returncode)


def _evaluate(findings: list[dict[str, Any]], code: int) -> TrialResult:
    if not findings:
        raise ModelError(_describe_exit(code))
    first = findings[0]
    if first.get("unavailable"):
        raise UnavailableError(first["unavailable"])
    if first["error"]:
        raise ModelError(f"cannot be run: {first['error']}")
    if not first["finite"]:
        raise ModelError("its output contains NaN or infinity for an ordinary picture")
    if first.get("doubt"):
        raise ModelError(
            f"was recognised by its shapes and nodes, but {first['doubt']}; if it is another kind of model, "
            "state its head in MODEL.yaml beside it"
        )
    if len(findings) > 1:
        return TrialResult(first["rows"], bool(findings[1]["stacks"]), str(findings[1]["words"]))
    return TrialResult(
        first["rows"], False, f"comparing several pictures with one by one: {_describe_exit(code)}"
    )


def _describe_exit(code: int) -> str:
    if code == -signal.SIGALRM:
        return f"does not finish a picture within {FIRST_PICTURE_TIMEOUT_S} s"
    if code < 0:
        return (
            f"makes onnxruntime crash ({signal.Signals(-code).name}); export it again, or with another opset"
        )
    return f"its first run ended with code {code} and no answer"


# --- the child ----------------------------------------------------------------------------------------------


def main(source: BinaryIO) -> None:
    """Carry out the task on `source`; each finding is a line on stdout."""
    task = TrialTask(**json.loads(source.readline()))
    fixed_graph, dynamic_graph = source.read(task.fixed_graph), source.read(task.dynamic_graph)
    limit_this_child(task.first_s)
    try:
        _run_task(task, fixed_graph, dynamic_graph)
    except UnavailableError as error:
        _write_finding({"unavailable": str(error)})


def _run_task(task: TrialTask, fixed_graph: bytes, dynamic_graph: bytes) -> None:
    try:
        session = open_cpu_session(fixed_graph)
        images = make_test_pictures(*session.get_inputs()[0].shape[1:3])
        first = _run(session, task, images[np.arange(task.batch) % COMPARED_PICTURES])
    except UnavailableError:
        raise
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions have no common base but this
        _write_finding({"error": _describe_error(error), "finite": False})
        return
    finite = bool(np.isfinite(first[0]).all())
    height_px, width_px = images.shape[1:3]
    noise = first[0][0]  # the first picture is noise, see `check_plausibility`
    doubts = check_plausibility(noise, width_px, height_px) if finite else ""
    _write_finding({"error": "", "finite": finite, "doubt": doubts, "rows": len(noise)})
    if not dynamic_graph:
        return
    signal.alarm(task.comparison_s)
    try:
        together = _run(open_cpu_session(dynamic_graph), task, images)
        alone = [_run(session, task, images[i : i + 1]) for i in range(COMPARED_PICTURES)]
    except Exception as error:  # noqa: BLE001 - as above
        _write_finding({"stacks": False, "words": f"several pictures at once fail: {_describe_error(error)}"})
        return
    batchable, reason = compare_outputs(task.outputs, together[1:], [outputs[1:] for outputs in alone])
    share = compute_matching_share(together[0], np.concatenate([outputs[0] for outputs in alone]))
    if share < _MIN_MATCHING_SHARE or (task.declared and not batchable):
        # A network that sorts a list may exchange rows, but the rows must be the same.
        batchable = share >= _MIN_MATCHING_SHARE
        reason = f"{share:.0%} of the rows are the same for {COMPARED_PICTURES} pictures at once"
    _write_finding({"stacks": batchable, "words": reason})


def _write_finding(finding: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(finding) + "\n")
    sys.stdout.flush()


def _describe_error(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rsplit("[ONNXRuntimeError] : ", 1)[-1][:300]


def _run(session: Any, task: TrialTask, images: NDArray[np.uint8]) -> list[NDArray[Any]]:
    """The rows, then the further outputs."""
    rows = next(o.name for o in session.get_outputs() if o.name not in task.outputs)
    return list(session.run([rows, *task.outputs], {session.get_inputs()[0].name: images}))


def make_test_pictures(height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Three different pictures: noise, soft blobs, and a scene of edges. Deterministic."""
    random = np.random.default_rng(0)
    size = (height_px, width_px, 3)
    noise = random.integers(0, 256, size, np.uint8)
    coarse = random.integers(0, 256, (height_px // 16 + 1, width_px // 16 + 1, 3), np.uint8)
    soft = coarse.repeat(16, 0).repeat(16, 1)[:height_px, :width_px]
    scene = np.full(size, 90, np.uint8)
    scene[: height_px // 2] = np.linspace(120, 255, width_px, dtype=np.uint8)[:, None]
    for _ in range(12):
        top, left = random.integers(0, height_px), random.integers(0, width_px)
        bottom, right = top + random.integers(4, height_px + 5), left + random.integers(4, width_px // 2 + 5)
        scene[top:bottom, left:right] = random.integers(0, 256, 3, np.uint8)
    return np.stack([noise, soft, scene])


def compare_outputs(
    names: Sequence[str], together: Sequence[NDArray[Any]], alone: Sequence[Sequence[NDArray[Any]]]
) -> tuple[bool, str]:
    """Whether outputs of several pictures at once equal those of each alone, and the explanation.

    The tolerance allows for another order of summation.
    """
    worst = 0.0
    for index, (name, whole) in enumerate(zip(names, together, strict=True)):
        expected = np.concatenate([np.atleast_1d(outputs[index]) for outputs in alone])
        if whole.shape != expected.shape:
            shape = list(whole.shape)
            return False, f"'{name}' has the shape {shape} for {COMPARED_PICTURES} pictures at once"
        away, allowed = _compute_difference(whole, expected)
        if not away <= allowed:  # NaN is not
            return False, f"'{name}' differs by {away:.2g} for {COMPARED_PICTURES} pictures at once"
        worst = max(worst, away)
    how = "identical values" if worst == 0 else f"values equal to {worst:.1g}"
    return True, f"{COMPARED_PICTURES} pictures at once and one by one give {how}"


def _compute_difference(values: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """(largest difference, allowed difference), relative to the largest value if that is above 1."""
    if expected.dtype.kind != "f":
        return float((values != expected).any()), 0.0
    exact = expected.astype(np.float64)
    scale = max(1.0, float(np.abs(exact).max(initial=0)))
    away = float(np.abs(values.astype(np.float64) - exact).max(initial=0)) / scale
    return away, _FP16_TOLERANCE if expected.dtype == np.float16 else _TOLERANCE


def compute_matching_share(
    rows: NDArray[np.float32],
    expected: NDArray[np.float32],
    tolerance: NDArray[np.float64] = _ROW_TOLERANCE,
) -> float:
    """The share of matching rows (n, K, 6), in the picture with the fewest.

    Their order does not matter, because nearly equal scores change it. `tolerance`: the allowed difference
    of each of the six values.
    """
    shares = []
    for some, others in zip(rows[:, :_MAX_COMPARED_ROWS], expected[:, :_MAX_COMPARED_ROWS], strict=True):
        away = np.abs(some[:, None] - others[None]) / tolerance
        shares.append(float((away.max(axis=2) <= 1).any(axis=1).mean()) if len(some) else 1.0)
    return min(shares)


if __name__ == "__main__":
    main(sys.stdin.buffer)
