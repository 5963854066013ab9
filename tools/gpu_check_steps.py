"""What tools/gpu_check.py measures itself, each step in a process of its own.

    python tools/gpu_check_steps.py options --device cuda --out options.json

A step writes one JSON document: `problems` (what does not hold), `findings` (what was seen) and `figures`.
On the CPU the same code runs, but its figures say nothing about a GPU.
"""

import argparse
import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from visionedge.config.schema import InferenceConfig
from visionedge.engine.candidate_parity import make_sample_pictures
from visionedge.engine.device.devices import PROVIDERS, ReasonCode, get_effective_device
from visionedge.engine.device.faults import EngineError, describe_error
from visionedge.engine.device.session import CUDA_OPTIONS, Session, check_provider_options
from visionedge.engine.device_parity import compare_rows
from visionedge.engine.interface import EngineInfo
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.engine.plan import Plan
from visionedge.errors import VisionedgeError
from visionedge.model.compiler.build import load_or_compile_with_batch
from visionedge.model.model import Model, find_bundled_model, load_model
from visionedge.model.postprocess import Rows
from visionedge.ops.models.compile import CompileRequest, compile_variant
from visionedge.ops.module_client import fetch, fetch_status
from visionedge.runtime.measurement import interleaved_medians
from visionedge.runtime.ort import import_onnxruntime, load_cuda_libraries, make_session_options

CheckedDevice = Literal["cuda", "cpu"]

_MIB = 2**20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepRequest:
    """The device and model of a step, its data folder, and whether it is only to be seen to run (`quick`)."""

    device: CheckedDevice
    model: Path
    data: Path
    quick: bool = False

    def inference(self, **changes: Any) -> InferenceConfig:
        """The configuration of an engine on this device alone, in fp32, not compared with the CPU."""
        fixed = {"device": self.device, "fallback": "exit", "precision": "fp32", "parity": "off"}
        return InferenceConfig.model_validate(fixed | changes)


@dataclass(slots=True)
class Outcome:
    """What a step gives; it holds if there are no problems."""

    problems: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"problems": self.problems, "findings": self.findings, "figures": self.figures}


# --- the first session --------------------------------------------------------------------------------------


def check_session(request: StepRequest) -> Outcome:
    """Open an engine twice: which device computes, where the nodes are, and how long it takes."""
    model, outcome = load_model(request.model), Outcome()
    (first_s, _), (second_s, info) = (_time_opening(model, request) for _ in range(2))
    if info.device.effective != request.device:
        outcome.problems.append(f"the session is not on {request.device}: {info.device.describe()}")
    placement = info.node_placement
    outcome.figures |= {
        "openSeconds": [first_s, second_s],
        "unplannedShapes": info.unplanned_shapes,
        "nodesOnDevice": placement.on_device,
        "nodesOnCpu": list(placement.on_cpu),
        "notes": list(info.notes),
        "speed": info.device_check.speed_check and info.device_check.speed_check.document(request.device),
    }
    instead = f", {len(placement.on_cpu)} on the CPU instead" if placement.on_cpu else ""
    outcome.findings.append(
        f"{placement.on_device} nodes on {request.device}{instead}; opened in {first_s:.1f} s, then"
        f" {second_s:.1f} s"
    )
    outcome.findings += info.notes
    return outcome


def _time_opening(model: Model, request: StepRequest) -> tuple[float, EngineInfo]:
    """The seconds until an engine is open, and its state after some pictures."""
    began_s = time.monotonic()
    inference = request.inference(parity="warn")
    with closing(open_engine(model, inference, data=request.data, measuring=False)) as engine:
        took_s = round(time.monotonic() - began_s, 2)
        engine.infer(np.stack(_sample_images(model)))
        return took_s, engine.info()


# --- parity -------------------------------------------------------------------------------------------------


def check_parity(request: StepRequest) -> Outcome:
    """Compare the device with the CPU in fp32, and in fp16 if the model has or gets such a variant."""
    model, outcome = load_model(request.model), Outcome()
    images = np.stack(_sample_images(model))
    expected = _cpu_rows(model, images)
    for precision in ("fp32", "fp16"):
        try:
            if precision == "fp16":
                with contextlib.redirect_stdout(sys.stderr):
                    compile_variant(CompileRequest(request.model, "fp16", request.data))
            inference = request.inference(precision=precision)
            with closing(open_engine(model, inference, data=request.data, measuring=False)) as engine:
                rows = engine.infer(images).rows
        except VisionedgeError as error:
            lines = outcome.problems if precision == "fp32" else outcome.findings
            lines.append(f"{precision} was not compared: {error}")
            continue
        _judge_rows(outcome, precision, model, expected, rows)
    return outcome


def _judge_rows(outcome: Outcome, name: str, model: Model, expected: Rows, rows: Rows) -> bool:
    """Compare rows with those of the CPU, and note the result; whether they agree."""
    result = compare_rows(model, expected, rows, "pictures")
    outcome.figures.setdefault("parity", {})[name] = result.document()
    if result.refusal is not None:
        outcome.problems.append(f"{name} differs from the CPU: {result.refusal}")
        return False
    outcome.findings.append(f"{name}: {result.message}")
    return True


def _sample_images(model: Model) -> list[NDArray[np.uint8]]:
    return [sample.image for sample in make_sample_pictures(model.input)]


def _cpu_rows(model: Model, images: NDArray[np.uint8]) -> Rows:
    """The rows of pictures (n, H, W, 3), computed on the CPU in fp32."""
    cpu = InferenceConfig.model_validate({"device": "cpu", "precision": "fp32", "maxBatch": 1})
    with closing(open_engine(model, cpu)) as engine:
        return engine.infer(images).rows


# --- options of the provider --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OptionSet:
    """Options of a provider by name, and whether runs are captured as CUDA graphs."""

    options: Mapping[str, str] = field(default_factory=dict)
    cuda_graphs: bool = False


def list_option_sets(device: CheckedDevice) -> dict[str, OptionSet]:
    """The option sets to compare, the plain one first."""
    if device != "cuda":
        return {"plain": OptionSet(), "one thread, as with graphs": OptionSet(cuda_graphs=True)}
    graphs = {"enable_cuda_graph": "1"}
    heuristic = {**CUDA_OPTIONS, "cudnn_conv_algo_search": "HEURISTIC"}
    exhaustive = {**CUDA_OPTIONS, "cudnn_conv_algo_search": "EXHAUSTIVE"}
    return {
        "heuristic search": OptionSet(heuristic),
        "exhaustive search": OptionSet(exhaustive),
        "heuristic search, graphs": OptionSet(heuristic | graphs, cuda_graphs=True),
        "exhaustive search, graphs": OptionSet(exhaustive | graphs, cuda_graphs=True),
        "exhaustive search, no TF32": OptionSet(exhaustive | {"use_tf32": "0"}),
        "exhaustive search, NHWC": OptionSet(exhaustive | {"prefer_nhwc": "1"}),
    }


def check_options(request: StepRequest) -> Outcome:
    """Open a session with each option set, compare its rows with the CPU, and time all of them in turns."""
    model, outcome = load_model(request.model), Outcome()
    compiled, graph = load_or_compile_with_batch(model, request.data)
    images = np.stack(_sample_images(model))
    expected, fixed = _cpu_rows(model, images), compiled.interpretation.input.batch
    sizes = (fixed,) if fixed else (1, 4) if request.quick else (1, 4, 8)
    batches = [images[np.arange(size) % len(images)] for size in sizes]
    sessions: dict[str, Session] = {}
    with ExitStack() as stack:
        for name, option_set in list_option_sets(request.device).items():
            opener = partial(_open_session, graph, request.device, option_set)
            session = _try_option_set(outcome, name, opener, batches)
            if session is None:
                continue
            sessions[name] = stack.enter_context(closing(session))
            rows = [session.run(images[i : i + 1], sizes[0]) for i in range(len(images))]
            _judge_rows(outcome, name, model, expected, np.concatenate(rows))
        if not sessions:
            outcome.problems.append("no option set can be used")
            return outcome
        outcome.figures["batchMs"] = _time_sessions(sessions, batches, 1.0 if request.quick else 6.0)
    outcome.findings += _describe_speeds(outcome.figures["batchMs"])
    return outcome


def _try_option_set(
    outcome: Outcome, name: str, opener: Callable[[], Session], batches: Sequence[NDArray[np.uint8]]
) -> Session | None:
    """The session, each batch computed three times (capture, replays); None if it is refused."""
    began_s = time.monotonic()
    try:
        session = opener()
        for batch in batches:
            for _ in range(3):
                session.run(batch, len(batch))
    except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no other base
        outcome.findings.append(f"{name} was refused: {describe_error(error)}")
        return None
    outcome.figures.setdefault("openSeconds", {})[name] = round(time.monotonic() - began_s, 2)
    return session


def _open_session(graph: bytes, device: CheckedDevice, option_set: OptionSet) -> Session:
    """A session with these options. Raises what onnxruntime does, and EngineError on another device."""
    onnxruntime = import_onnxruntime()
    if device != "cpu":
        load_cuda_libraries(onnxruntime)
    options = make_session_options(1, {"session.record_ep_graph_assignment_info": "1"})
    providers = [check_provider_options(PROVIDERS[device], option_set.options)]
    if device != "cpu":
        providers.append((PROVIDERS["cpu"], {}))
    raw = onnxruntime.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    raw.disable_fallback()
    if (effective := get_effective_device(raw.get_providers())) != device:
        raise EngineError(f"its session started on {effective} only")
    return Session(raw, effective, cuda_graphs=option_set.cuda_graphs)


def _time_sessions(
    sessions: Mapping[str, Session], batches: Sequence[NDArray[np.uint8]], budget_s: float
) -> dict[str, dict[str, dict[str, float]]]:
    """By batch size and option set: the median ms of a batch, and its speed in relation to the first set."""
    timed = {}
    for batch in batches:
        runs = {name: partial(session.run, batch, len(batch)) for name, session in sessions.items()}
        speeds = interleaved_medians(runs, budget_s=budget_s)
        timed[str(len(batch))] = {
            name: {"ms": round(speed.ms, 3), "speedup": round(speed.speedup, 3)}
            for name, speed in speeds.items()
        }
    return timed


def _describe_speeds(timed: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """One sentence for each batch size: the fastest option set and the plain one."""
    lines = []
    for size, sets in timed.items():
        best, plain = max(sets, key=lambda name: sets[name]["speedup"]), next(iter(sets))
        lines.append(
            f"batch {size}: {best} is the fastest with {sets[best]['ms']:.2f} ms,"
            f" {sets[best]['speedup']:.2f} x {plain} ({sets[plain]['ms']:.2f} ms)"
        )
    return lines


# --- kill -9 ------------------------------------------------------------------------------------------------

_READY_S, _FRAMES_S, _DEVICE_S, _STOP_S, _POLL_S = 90.0, 30.0, 90.0, 20.0, 0.1


def check_kill(request: StepRequest) -> Outcome:
    """Start the module, kill its engine's process, and wait for frames, for the device and for its memory."""
    outcome, memory = Outcome(), open_gpu_memory() if request.device != "cpu" else None
    free_before = None if memory is None else memory.free_bytes()
    with _run_module(request) as url:
        ready = _wait(lambda: _engine_on(url, request.device), _READY_S)
        if ready is None:
            outcome.problems.append(
                f"the module did not compute on {request.device}: {_engine(url).get('reason')}"
            )
            return outcome
        before, free_running = _engine(url), None if memory is None else memory.free_bytes()
        outcome.figures["engineBefore"] = before  # the plan, and whatever else was chosen by measurement
        killed = int(before["process"]["pid"])
        os.kill(killed, signal.SIGKILL)
        seen = Recovery(killed, request.device, _count_change_overs(before))
        _wait(lambda: seen.look(url, memory, free_before, free_running) or None, _DEVICE_S)
    _judge_recovery(outcome, seen)
    if free_before is not None and free_running is not None:
        outcome.figures["engineMiB"] = round((free_before - free_running) / _MIB)
    return outcome


class Recovery:
    """When frames, the device and its memory came back, in seconds since now; None: not yet."""

    def __init__(self, killed_pid: int, device: str, change_overs: int) -> None:
        self._killed_pid, self._device, self._began_s = killed_pid, device, time.monotonic()
        self._change_overs = change_overs
        self._analysed: int | None = None
        self.frames_s: float | None = None
        self.device_s: float | None = None
        self.memory_s: float | None = None
        self.timeline: list[dict[str, Any]] = []

    def look(
        self, url: str, memory: "GpuMemory | None", free_before: int | None, free_running: int | None
    ) -> bool:
        """Look once; whether everything is back."""
        since_s = round(time.monotonic() - self._began_s, 2)
        if memory is not None and free_before is not None and free_running is not None:
            half = (free_before + free_running) / 2
            if self.memory_s is None and memory.free_bytes() > half:
                self.memory_s = since_s
        status = fetch_status(url, None)
        engine, analysed = status["engine"], sum(each["framesAnalysed"] for each in status["cameras"])
        state = {"effective": engine["effective"], "reasonCode": engine["reasonCode"]}
        if not self.timeline or {key: self.timeline[-1][key] for key in state} != state:
            self.timeline.append({"seconds": since_s, **state})
        pid = (engine["process"] or {}).get("pid")
        if pid in (None, self._killed_pid):
            return False
        if self._analysed is None:
            self._analysed = analysed
        if self.frames_s is None and analysed > self._analysed:
            self.frames_s = since_s
        # The state of the dead process is shown for a moment, so a GPU is back with its change-over.
        returned = self._device == "cpu" or _count_change_overs(engine) > self._change_overs
        if self.device_s is None and returned and engine["effective"] == self._device:
            self.device_s = since_s
        return self.frames_s is not None and self.device_s is not None


def _count_change_overs(engine: Mapping[str, Any]) -> int:
    """How often a device was put back to use, in the status of an engine."""
    return int((engine["recovery"] or {}).get("changeOvers", 0))


def _judge_recovery(outcome: Outcome, seen: Recovery) -> None:
    outcome.figures |= {
        "framesSeconds": seen.frames_s,
        "deviceSeconds": seen.device_s,
        "memoryFreedSeconds": seen.memory_s,
        "timeline": seen.timeline,
    }
    if seen.frames_s is None or seen.frames_s > _FRAMES_S:
        outcome.problems.append(f"no frame within {_FRAMES_S:g} s after the engine's process was killed")
    if seen.device_s is None:
        outcome.problems.append(f"the device was not back within {_DEVICE_S:g} s")
    if not outcome.problems:
        freed = "" if seen.memory_s is None else f", its GPU memory was free after {seen.memory_s:.1f} s"
        outcome.findings.append(
            f"frames again after {seen.frames_s:.1f} s, the device after {seen.device_s:.1f} s{freed}"
        )


@contextmanager
def _run_module(request: StepRequest) -> Iterator[str]:
    """A module with two cameras of the bundled clip, and its address; stopped afterwards.

    Raises:
        VisionedgeError: it did not become ready, or did not stop well.
    """
    words = ["run", "--device", request.device, "--model", str(request.model), "--http", "127.0.0.1:0"]
    words += [word for name in ("a", "b") for word in ("--camera", f"{name}=demo:")]
    log = request.data / "module.log"
    request.data.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stderr:
        module = subprocess.Popen([sys.executable, "-m", "visionedge", *words], stderr=stderr)
    try:
        yield _wait_ready(module, log)
        module.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            module.wait(_STOP_S)
        if module.returncode != 0:
            raise VisionedgeError(f"the module did not stop with exit code 0 but with {module.returncode}")
    finally:
        if module.poll() is None:
            module.kill()
            module.wait()
        sys.stderr.write(log.read_text(encoding="utf-8", errors="replace"))


def _wait_ready(module: "subprocess.Popen[bytes]", log: Path) -> str:
    def look() -> str | None:
        if module.poll() is not None:
            raise VisionedgeError(f"the module ended with exit code {module.returncode}")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.split("open ", 1)[1].split()[0] for line in lines if "ready: open " in line), None)

    if (url := _wait(look, _READY_S)) is None:
        raise VisionedgeError(f"the module was not ready within {_READY_S:g} s")
    return url


def _engine(url: str) -> dict[str, Any]:
    engine: dict[str, Any] = fetch_status(url, None)["engine"]
    return engine


def _engine_on(url: str, device: str) -> bool | None:
    """True once it computes there and has analysed a frame."""
    code, _ = fetch(url, "/readyz")
    status = fetch_status(url, None)
    analysed = any(each["framesAnalysed"] for each in status["cameras"])
    return True if code == 200 and analysed and status["engine"]["effective"] == device else None


def _wait(look: Callable[[], T | None], limit_s: float) -> T | None:
    """What `look` gives once it is not None; None after the limit. It is called ten times a second."""
    end_s = time.monotonic() + limit_s
    while (found := look()) is None and time.monotonic() < end_s:
        time.sleep(_POLL_S)
    return found


# --- out of memory ------------------------------------------------------------------------------------------


class Memory(Protocol):
    """The memory of a device, which can be filled."""

    def fill(self, leave_bytes: int) -> int:
        """Take all but this much; the bytes that were taken."""

    def release(self) -> None:
        """Give everything back."""


class GpuMemory:
    """The memory of the first GPU, by its driver (`libcuda`).

    Raises:
        VisionedgeError: a call of the driver fails.
    """

    def __init__(self, driver: Any) -> None:
        self._driver, self._taken = driver, list[ctypes.c_uint64]()
        self._context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), 0)

    def free_bytes(self) -> int:
        """The free memory of the card, whoever uses the rest."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self._current():
            self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def fill(self, leave_bytes: int) -> int:
        """See `Memory.fill`."""
        before = self.free_bytes()
        size = 2**30
        with self._current():
            while size >= 2 * _MIB:
                address = ctypes.c_uint64()
                room = self.free_bytes() - leave_bytes
                if room >= size and not self._driver.cuMemAlloc_v2(
                    ctypes.byref(address), ctypes.c_size_t(size)
                ):
                    self._taken.append(address)
                else:
                    size //= 2
        return before - self.free_bytes()

    def release(self) -> None:
        """See `Memory.release`."""
        with self._current():
            while self._taken:
                self._call("cuMemFree_v2", self._taken.pop())

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._driver, name)(*arguments):
            raise VisionedgeError(f"the NVIDIA driver answers {code} to {name}")


def open_gpu_memory() -> GpuMemory:
    """The memory of the first GPU.

    Raises:
        VisionedgeError: there is no driver, or it has no GPU.
    """
    for name in ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"):
        with suppress(OSError):
            return GpuMemory(ctypes.CDLL(name))
    raise VisionedgeError("libcuda.so.1, the NVIDIA driver, is missing")


class AddressSpace:
    """The memory of this process: a limit stands for a full machine."""

    def __init__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_AS)

    def fill(self, leave_bytes: int) -> int:
        """See `Memory.fill`; what was taken cannot be told."""
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        used = pages * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + leave_bytes, self._before[1]))
        return 0

    def release(self) -> None:
        """See `Memory.release`."""
        resource.setrlimit(resource.RLIMIT_AS, self._before)


_LARGE_BATCH = 64
_CPU_LEAVES_BYTES = 40 * _MIB
"""Python itself needs some memory while a batch fails."""


def check_memory(request: StepRequest) -> Outcome:
    """Fill the device's memory: while the engine runs, before it opens, and so that a small batch fits."""
    model = load_model(request.model)
    check = _MemoryCheck(request, model)
    if load_or_compile_with_batch(model, request.data)[0].interpretation.input.batch:
        check.outcome.findings.append("the model fixes its batch size: there is no smaller batch to use")
    elif request.device == "cpu":
        check.narrow_running(AddressSpace(), _CPU_LEAVES_BYTES)
        check.outcome.findings.append("opening on a full card: there is no card")
    else:
        memory = open_gpu_memory()
        check.narrow_running(memory, 0)
        check.open_on_full_card(memory)
        check.narrow_opening(memory)
    return check.outcome


@dataclass(frozen=True, slots=True)
class _MemoryCheck:
    request: StepRequest
    model: Model
    outcome: Outcome = field(default_factory=Outcome)

    def narrow_running(self, memory: Memory, leave_bytes: int) -> None:
        """A batch of 64 that does not fit is computed in smaller ones, with the right rows."""
        images = np.stack(_sample_images(self.model))
        images = images[np.arange(_LARGE_BATCH) % len(images)]
        expected, problems = _cpu_rows(self.model, images), self.outcome.problems
        with closing(self._open((1, 2))) as engine:
            engine.infer(images[:2])
            engine.set_plan(Plan(1, (1, 2, _LARGE_BATCH), "a batch that does not fit"))
            self.outcome.figures["filledMiB"] = round(memory.fill(leave_bytes) / _MIB)
            try:
                rows = engine.infer(images).rows
            except EngineError as error:
                problems.append(f"running: a full memory was not survived: {error} ({error.fault})")
                return
            finally:
                memory.release()
            buckets = engine.info().plan.buckets
        self.outcome.figures["bucketsAfter"] = list(buckets)
        if _LARGE_BATCH in buckets:
            problems.append(f"running: a batch of {_LARGE_BATCH} fitted, the memory was not full")
        elif _judge_rows(self.outcome, "in smaller batches", self.model, expected, rows):
            kept = ", ".join(map(str, buckets))
            self.outcome.findings.append(f"running: the plan narrowed to batches of {kept}")

    def open_on_full_card(self, memory: Memory) -> None:
        """An engine that opens while nothing is free computes on the CPU, with that reason."""
        memory.fill(0)
        try:
            with closing(open_engine(self.model, self.request.inference(fallback="degrade"))) as engine:
                device = engine.info().device
        finally:
            memory.release()
        self.outcome.figures["fullCard"] = device.describe()
        expected = device.effective == "cpu" and device.code is ReasonCode.OUT_OF_MEMORY
        lines = self.outcome.findings if expected else self.outcome.problems
        lines.append(
            f"opening on a full card: {device.describe()}{'' if expected else ', not out-of-memory'}"
        )

    def narrow_opening(self, memory: "GpuMemory") -> None:
        """With room between what batch 1 and batch 64 need, the warm-up keeps the batches that fit."""
        sizes, needs = (1, 2, 4, 8, 16, 32, _LARGE_BATCH), []
        for buckets in ((1,), (1,), sizes):  # the first one also loads the libraries
            before = memory.free_bytes()
            with closing(self._open(buckets)):
                needs.append(before - memory.free_bytes())
        memory.fill((needs[1] + needs[2]) // 2)
        try:
            with closing(self._open(sizes)) as engine:
                kept = engine.info().plan.buckets
        except VisionedgeError as error:
            self.outcome.problems.append(f"opening with little memory: {error}")
            return
        finally:
            memory.release()
        needs_mib = [round(each / _MIB) for each in needs[1:]]
        self.outcome.figures |= {"needsMiB": needs_mib, "keptBuckets": list(kept)}
        if kept == sizes:
            self.outcome.problems.append(
                "opening with little memory: all batches fitted, the card was not full"
            )
            return
        self.outcome.findings.append(
            f"opening with little memory: batches up to {kept[-1]} are kept (batch 1 alone needs"
            f" {needs_mib[0]} MiB, all {needs_mib[1]} MiB)"
        )

    def _open(self, buckets: tuple[int, ...]) -> LocalEngine:
        plan = Plan(1, buckets, "these sizes, for a check")
        plans, inference = dict.fromkeys(PROVIDERS, plan), self.request.inference(maxBatch=_LARGE_BATCH)
        return open_engine(self.model, inference, data=self.request.data, plans=plans, measuring=False)


STEPS: Mapping[str, Callable[[StepRequest], Outcome]] = {
    "session": check_session,
    "parity": check_parity,
    "options": check_options,
    "kill": check_kill,
    "memory": check_memory,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: exit code 0 if the step wrote its document, 1 if it failed with one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--data", type=Path, required=True, help="the folder of compiled graphs")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="the JSON document to write")
    given = parser.parse_args(arguments)
    request = StepRequest(given.device, given.model or find_bundled_model(), given.data, given.quick)
    try:
        outcome = STEPS[given.step](request)
    except (VisionedgeError, OSError) as error:
        print(f"{given.step}: {error}", file=sys.stderr)
        return 1
    given.out.write_text(json.dumps(outcome.document(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
