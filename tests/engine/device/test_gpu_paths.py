"""What only a GPU's session does, on the CPU: tensors in device memory, numbered graphs, TensorRT, float16.

Tensors "on the GPU" lie in host memory, and sessions claim the provider that was requested first.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fault_script import FaultScript
from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.devices import PROVIDERS
from visionedge.engine.device.session import CUDA_GRAPHS, Session, open_ort_session
from visionedge.engine.local_engine import open_engine
from visionedge.engine.process.fault_injection import make_device_backend, read_fault_script
from visionedge.model.compiler.compile import compile_model
from visionedge.model.model import load_model
from visionedge.ops.models.compile import CompileRequest, compile_variant
from visionedge.runtime.ort import make_session_options


class RecordingRaw:
    """A session of onnxruntime on the CPU that claims other providers, and records the graph of each run."""

    def __init__(self, raw: Any, providers: list[str]) -> None:
        self._raw, self._providers = raw, providers
        self.bound_graphs: list[str] = []
        self.plain_graphs: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def get_providers(self) -> list[str]:
        return self._providers

    def run(self, names: Any, inputs: Any, options: Any = None) -> Any:
        self.plain_graphs.append(options.get_run_config_entry("gpu_graph_id"))
        return self._raw.run(names, inputs, options)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        try:
            self.bound_graphs.append(options.get_run_config_entry("gpu_graph_id"))
        except RuntimeError:  # there is no such entry
            self.bound_graphs.append("")
        self._raw.run_with_iobinding(binding, options)


class HostMemoryRuntime:
    """onnxruntime, whose device memory is host memory."""

    def __init__(self) -> None:
        import onnxruntime

        self._real = onnxruntime
        self.requested: list[list[tuple[str, dict[str, str]]]] = []
        self.allocated: list[tuple[tuple[int, ...], str]] = []
        self.sessions: list[RecordingRaw] = []
        self.InferenceSession = self._open
        self.OrtValue = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def ortvalue_from_numpy(self, array: Any) -> Any:
        raise AssertionError(f"pictures {array.shape} are not copied to the tensor that is bound")

    def ortvalue_from_shape_and_type(self, shape: list[int], kind: Any, device: str, _number: int) -> Any:
        self.allocated.append((tuple(shape), device))
        return self._real.OrtValue.ortvalue_from_shape_and_type(shape, kind, "cpu", 0)

    def _open(self, graph: bytes, options: Any, *, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0
        self.requested.append(providers)
        raw = self._real.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.sessions.append(RecordingRaw(raw, [name for name, _ in providers]))
        return self.sessions[-1]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> HostMemoryRuntime:
    found = HostMemoryRuntime()
    monkeypatch.setattr("visionedge.engine.device.session.import_onnxruntime", lambda: found)
    monkeypatch.setattr("visionedge.engine.device.session.load_cuda_libraries", lambda _onnxruntime: None)
    return found


@pytest.fixture
def raw(graph: bytes, runtime: HostMemoryRuntime) -> RecordingRaw:
    """A session that claims to be on CUDA."""
    options = make_session_options(1, {"session.record_ep_graph_assignment_info": "1"})
    providers: list[tuple[str, dict[str, str]]] = [(PROVIDERS["cuda"], {})]
    found: RecordingRaw = runtime.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    return found


@pytest.fixture
def graph(tmp_path: Path) -> bytes:
    return compile_model(load_model(TinyDetector().save(tmp_path / "tiny.onnx")))


def test_a_gpu_reads_pictures_from_one_tensor_for_each_batch_size(
    graph: bytes, runtime: HostMemoryRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its address is part of a captured graph. Rows are those of the CPU, wherever the pictures lie."""
    session, images = open_ort_session(graph, "cuda", max_batch=4, options=CUDA_GRAPHS), pictures(4)
    rows = [session.run(images[:size], size) for size in (1, 4, 1, 4)]
    flipped = [picture[::-1, ::-1] for picture in images]
    views, padded = session.run(flipped, 4), session.run(images[:3], 4)
    session.close()
    kept = runtime.allocated[-4:]
    assert {device for _, device in runtime.allocated} == {"cuda"}
    assert [shape for shape, _ in kept if len(shape) == 4] == [(1, 48, 64, 3), (4, 48, 64, 3)]
    monkeypatch.undo()
    cpu = open_ort_session(graph, "cpu", max_batch=4)
    for size, seen in zip((1, 4, 1, 4), rows, strict=True):
        np.testing.assert_array_equal(seen, cpu.run(images[:size], size))
    np.testing.assert_array_equal(views, cpu.run(np.ascontiguousarray(images[:, ::-1, ::-1]), 4))
    np.testing.assert_array_equal(padded, cpu.run(images[:3], 3))


def test_each_batch_size_replays_its_own_graph_and_plain_runs_none(raw: RecordingRaw) -> None:
    session, images = Session(raw, "cuda", cuda_graphs=True), pictures(4)
    raw.bound_graphs.clear()
    for size in (1, 4, 2, 1, 4, 2):
        session.run(images[:size], size)
    session.close()
    first, again = raw.bound_graphs[:3], raw.bound_graphs[3:]
    assert len({*first} - {"", "-1"}) == 3
    assert again == first
    assert set(raw.plain_graphs) == {"-1"}


def test_without_graphs_no_run_is_captured(raw: RecordingRaw) -> None:
    session = Session(raw, "cuda")
    session.run(pictures(1), 1)
    session.close()
    assert set(raw.bound_graphs) == {""}


def test_tensorrt_gets_its_options_and_cuda_and_the_cpu_behind_it(
    graph: bytes, runtime: HostMemoryRuntime, tmp_path: Path
) -> None:
    session, images = open_ort_session(graph, "tensorrt", max_batch=4, data=tmp_path), pictures(2)
    assert session.device == "tensorrt"
    assert session.run(images, 2).shape == (2, session.rows, 6)
    session.close()
    ((tensorrt, options), (cuda, _), cpu) = runtime.requested[-1]
    assert (tensorrt, cuda, cpu) == (PROVIDERS["tensorrt"], PROVIDERS["cuda"], (PROVIDERS["cpu"], {}))
    assert options["trt_profile_max_shapes"].endswith(":4x48x64x3")
    assert Path(options["trt_engine_cache_path"]).is_dir()


def test_a_variant_in_float16_runs_on_a_device_and_is_compared_with_the_cpu(tmp_path: Path) -> None:
    """On a simulated one: the file, its report, the compiled graph, the session and the parity are real."""
    path = TinyDetector(width_px=96, height_px=96).save(tmp_path / "tiny.onnx")
    compile_variant(CompileRequest(path, "fp16", tmp_path / "data", into=tmp_path))
    backend = make_device_backend(read_fault_script(FaultScript(tmp_path).path))
    wanted = InferenceConfig(device="cuda", precision="fp16", fallback="exit")
    engine = open_engine(load_model(path), wanted, data=tmp_path / "data", measuring=False, backend=backend)
    info = engine.info()
    engine.close()
    assert (info.device.effective, info.choice.precision) == ("cuda", "fp16")
    (seen,) = info.device_check.parity_results
    assert seen.refusal is None
    assert seen.rows is not None
