"""The first run of a model from outside, in a process that may be lost: ``python -m …inference.first_run``.

A file can be a sound graph and still make its runtime crash, never end, or take all memory. So a compiled
graph is opened and run once where that harms nobody. In the same process it is found out whether several
pictures at once get the same answers as one by one, which is what a batch relies on.

The child reads a JSON line (`TrialTask`) and the graphs from stdin and writes a JSON line for each finding.
"""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from visionedge.errors import ModelError, UnavailableError
from visionedge.runtime.child_process import compute_address_space_bytes, explain_machine_limit, run_child
from visionedge.runtime.ort import import_onnxruntime

# Whether rows can be detections at all: the last check of a reading, on what the model really gives.
#
# Shapes and nodes may leave a doubt; numbers that are no scores, no classes or no boxes of the picture end
# it.


_MIN_ROWS = 50  # fewer say nothing of all
_SCORE_TOLERANCE = 1e-3
_MAX_CORNER_SHARE = 1 / 3
_MAX_BACKWARDS_SHARE = 0.5
_MIN_OVERSHOOT = 1.2
_NEARLY_ALL = 0.98
_MIN_CORRELATION = 0.5


def check_plausibility(rows: NDArray[np.float32], width_px: int, height_px: int) -> str:
    """What speaks against the rows of a picture, (K, 6), being detections in it; "" where nothing does.

    The picture should be noise, which a detector is unsure of everywhere.
    """
    scores, classes = rows[:, 4], rows[:, 5]
    if len(rows) and (scores.min() < -_SCORE_TOLERANCE or scores.max() > 1 + _SCORE_TOLERANCE):
        return f"its scores go from {scores.min():.3g} to {scores.max():.3g}, not from 0 to 1"
    if (np.abs(classes - np.round(classes)) > _SCORE_TOLERANCE).any() or classes.min(
        initial=0
    ) < -_SCORE_TOLERANCE:
        return "its classes are no whole numbers"
    real = rows[scores > 0]
    return _check_boxes(real, width_px, height_px) if len(real) >= _MIN_ROWS else ""


def _check_boxes(real: NDArray[np.float32], width_px: int, height_px: int) -> str:
    backwards = ((real[:, 2] < real[:, 0]) | (real[:, 3] < real[:, 1])).mean()
    if backwards > _MAX_BACKWARDS_SHARE:
        return f"{backwards:.0%} of its boxes end before they begin"
    if _look_like_corners(real, width_px, height_px):
        return (
            "nearly all its boxes are larger than their centre is far from the top left, and some reach far "
            "out of the picture, as if two corners were taken for a centre and a size"
        )
    right, bottom = real[:, [0, 2]].max(), real[:, [1, 3]].max()
    if right < width_px * _MAX_CORNER_SHARE and bottom < height_px * _MAX_CORNER_SHARE:
        return (
            f"all its boxes lie within {right:.3g} x {bottom:.3g} at the top left of {width_px} x "
            f"{height_px}, as if their unit were another than a pixel of its input"
        )
    return ""


def _look_like_corners(rows: NDArray[np.float32], width_px: int, height_px: int) -> bool:
    """Whether boxes look like a corner (x, y) with as size the other corner, which is always farther out.

    The two go together, wherever a box lies; a size does not care where its centre is.
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
_EXTRA_TIMEOUT_S = 30

COMPARED_PICTURES = 3
"""Pictures that are computed at once and one by one."""

_TOLERANCE = 1e-4
_FP16_TOLERANCE = 5e-3  # of float16: a few of its smallest steps
_ROW_TOLERANCE = np.array([0.2, 0.2, 0.2, 0.2, 2e-3, 0.5])
_MAX_COMPARED_ROWS = 500  # each is held against each
_MIN_MATCHING_SHARE = 0.97  # at the end of a list others may come in


@dataclass(frozen=True, slots=True)
class TrialTask:
    """Bytes of the graph that is run, its pictures at a time, and of one with an open batch (0: none).

    `outputs` are further tensors to compare, beside the rows. `declared`: the model itself says that its
    batch is open, so it is enough that the rows are the same. `first_s` and `comparison_s` limit the time.
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
    """What was found. `stacks`: several pictures at once are as good as one by one; `words` say why (not).

    `rows` is K, the most rows a picture gives.
    """

    rows: int
    batchable: bool
    reason: str


def run_trial(
    fixed_graph: bytes, batch: int, dynamic_graph: bytes | None, outputs: Sequence[str], *, declared: bool
) -> TrialResult:
    """Run a graph uint8 [batch, H, W, 3] → rows once, and compare it with `opened`, both with `outputs` too.

    Raises:
        ModelError: it crashes, does not end, gives no numbers or cannot be run.
        UnavailableError: onnxruntime cannot be used at all.
    """
    limits_s = (FIRST_PICTURE_TIMEOUT_S, COMPARISON_TIMEOUT_S)
    task = TrialTask(len(fixed_graph), batch, len(dynamic_graph or b""), tuple(outputs), declared, *limits_s)
    sent = b"".join((json.dumps(asdict(task)).encode(), b"\n", fixed_graph, dynamic_graph or b""))
    try:
        # The child limits its own time; this is for one that cannot even do that.
        done = run_child(
            "visionedge.model.compiler.trial_run",
            sent,
            FIRST_PICTURE_TIMEOUT_S + COMPARISON_TIMEOUT_S + _EXTRA_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(_describe_exit(-signal.SIGALRM)) from None
    except OSError as error:
        raise UnavailableError(f"no process can be started to try the model: {error.strerror}") from None
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    told = "\n".join(str(finding.get("error", "")) for finding in findings).encode() + done.stderr
    clean = len(findings) == 1 + bool(dynamic_graph) and not any(finding.get("error") for finding in findings)
    if not clean and (reason := explain_machine_limit(told)) is not None:
        raise UnavailableError(f"the process that tries the model cannot run: {reason}")
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
        raise ModelError("output contains NaN or infinity for a plain picture")
    if first.get("doubt"):
        raise ModelError(
            f"was read as its shapes and nodes tell, but {first['doubt']}; if it is another kind of model, "
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
    """Do what the task on `source` asks; a finding is a line on stdout."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (compute_address_space_bytes(),) * 2)
    task = TrialTask(**json.loads(source.readline()))
    fixed_graph, dynamic_graph = source.read(task.fixed_graph), source.read(task.dynamic_graph)
    signal.alarm(task.first_s)  # its default is to end this process, whatever native code does
    try:
        _run_task(task, fixed_graph, dynamic_graph)
    except UnavailableError as error:
        _write_finding({"unavailable": str(error)})


def _run_task(task: TrialTask, fixed_graph: bytes, dynamic_graph: bytes) -> None:
    try:
        session = _open_session(fixed_graph)
        images = make_test_pictures(*session.get_inputs()[0].shape[1:3])
        first = _run(session, task, images[np.arange(task.batch) % COMPARED_PICTURES])
    except UnavailableError:
        raise
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions have no common base but this
        _write_finding({"error": _describe_error(error), "finite": False})
        return
    finite = bool(np.isfinite(first[0]).all())
    height_px, width_px = images.shape[1:3]
    noise = first[0][0]  # the first picture is that, and a detector is sure of nothing in it
    doubts = check_plausibility(noise, width_px, height_px) if finite else ""
    _write_finding({"error": "", "finite": finite, "doubt": doubts, "rows": len(noise)})
    if not dynamic_graph:
        return
    signal.alarm(task.comparison_s)
    try:
        together = _run(_open_session(dynamic_graph), task, images)
        alone = [_run(session, task, images[i : i + 1]) for i in range(COMPARED_PICTURES)]
    except Exception as error:  # noqa: BLE001 - as above
        _write_finding({"stacks": False, "words": f"several pictures at once fail: {_describe_error(error)}"})
        return
    batchable, reason = compare_outputs(task.outputs, together[1:], [outputs[1:] for outputs in alone])
    share = compute_matching_share(together[0], np.concatenate([outputs[0] for outputs in alone]))
    if share < _MIN_MATCHING_SHARE:
        # A network that orders a list by itself may differ value by value; what is in it may not.
        batchable, reason = (
            False,
            f"only {share:.0%} of the rows are the same when {COMPARED_PICTURES} are computed at once",
        )
    elif task.declared and not batchable:
        batchable, reason = (
            True,
            f"{share:.0%} of the rows are the same when {COMPARED_PICTURES} are computed at once",
        )
    _write_finding({"stacks": batchable, "words": reason})


def _write_finding(finding: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(finding) + "\n")
    sys.stdout.flush()


def _describe_error(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rsplit("[ONNXRuntimeError] : ", 1)[-1][:300]


def _open_session(graph: bytes) -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _run(session: Any, task: TrialTask, images: NDArray[np.uint8]) -> list[NDArray[Any]]:
    """The rows, then the further outputs."""
    rows = next(o.name for o in session.get_outputs() if o.name not in task.outputs)
    return list(session.run([rows, *task.outputs], {session.get_inputs()[0].name: images}))


def make_test_pictures(height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Unlike each other, as pictures are: noise, soft blobs, and a scene of edges. Always the same."""
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
    """Whether outputs of several pictures at once are those of each alone, one behind the other; and words.

    Value by value, to what is lost in another order of adding up.
    """
    worst = 0.0
    for index, (name, whole) in enumerate(zip(names, together, strict=True)):
        expected = np.concatenate([np.atleast_1d(outputs[index]) for outputs in alone])
        if whole.shape != expected.shape:
            return (
                False,
                f"'{name}' has the shape {list(whole.shape)} for {COMPARED_PICTURES} pictures at once",
            )
        away, allowed = _compute_difference(whole, expected)
        if not away <= allowed:  # NaN is not
            return (
                False,
                f"'{name}' differs by {away:.2g} when {COMPARED_PICTURES} pictures are computed at once",
            )
        worst = max(worst, away)
    how = "the very same values" if worst == 0 else f"the same values to {worst:.1g}"
    return True, f"{COMPARED_PICTURES} pictures at once give {how} as one by one"


def _compute_difference(values: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """The largest difference, in parts of the largest value where that is above 1, and what is allowed."""
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
    """The share of rows (n, K, 6) that have their like, in the picture that has the fewest.

    They need not stand at the same place: scores that are almost equal may change it. `tolerance` is how far
    the six values may lie apart.
    """
    shares = []
    for some, others in zip(rows[:, :_MAX_COMPARED_ROWS], expected[:, :_MAX_COMPARED_ROWS], strict=True):
        away = np.abs(some[:, None] - others[None]) / tolerance
        shares.append(float((away.max(axis=2) <= 1).any(axis=1).mean()) if len(some) else 1.0)
    return min(shares)


if __name__ == "__main__":
    main(sys.stdin.buffer)
