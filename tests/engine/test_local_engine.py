"""The engine: results, refusals, and the reported device. CPU only, tiny models."""

import logging
import re
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.backend import DeviceBackend, open_session
from visionedge.engine.device.devices import (
    DeviceAssignment,
    DeviceVerdict,
    EffectiveDevice,
    ReasonCode,
    Runtime,
)
from visionedge.engine.device.faults import EngineError
from visionedge.engine.device.session import DeviceSession, NodePlacement, PictureBatch
from visionedge.engine.engine_choice import EngineCandidate, EngineChoice
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.engine.plan import Plan
from visionedge.errors import DeviceError, ModelError, UnavailableError
from visionedge.model.model import Model, load_model
from visionedge.runtime.ov import installed_openvino

CPU = InferenceConfig(device="cpu")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(TinyDetector().save(tmp_path / "tiny.onnx"))


def opened(model: Model, config: InferenceConfig = CPU, **options: int) -> LocalEngine:
    return open_engine(model, config, **options)  # type: ignore[arg-type]  # cores only


class StubProber:
    """Answers with one verdict and records the requested devices."""

    def __init__(self, code: ReasonCode) -> None:
        self.code = code
        self.asked: list[EffectiveDevice] = []

    def __call__(self, device: EffectiveDevice) -> DeviceVerdict:
        self.asked.append(device)
        return DeviceVerdict(self.code, "because")


class FakeSession:
    """A session with scripted results."""

    def __init__(self, answer: Callable[[int], np.ndarray]) -> None:
        self.answer = answer
        self.device: EffectiveDevice = "cpu"
        self.runtime: Runtime = "onnxruntime"
        self.rows = 9
        self.node_placement = NodePlacement(1)
        self.notes: tuple[str, ...] = ()
        self.sizes: list[int] = []
        self.closed = False

    def run(self, pictures: PictureBatch, size: int) -> np.ndarray:
        self.sizes.append(size)
        return self.answer(size)[: len(pictures)]

    def keep_only(self, sizes: Collection[int]) -> None:
        self.kept = set(sizes)

    def close(self) -> None:
        self.closed = True


def faked(model: Model, session: FakeSession, *buckets: int) -> LocalEngine:
    state = opened(model).info().device
    return LocalEngine(model, session, state, Plan(1, buckets, "test"))


def rows(size: int) -> np.ndarray:
    return np.zeros((size, 9, 6), np.float32)


def test_any_number_of_pictures_gives_as_many_lists_of_rows(model: Model) -> None:
    engine = opened(model)
    for count in (0, 1, 2, 5):
        assert engine.infer(pictures(count)).rows.shape == (count, engine.info().max_rows, 6)
    assert engine.info().unplanned_shapes == 0


def test_pictures_do_not_change_each_other(model: Model) -> None:
    engine, images = opened(model), pictures(3)
    together = engine.infer(images).rows
    for index in range(3):
        np.testing.assert_array_equal(engine.infer(images[index : index + 1]).rows[0], together[index])


def test_lanes_may_call_the_engine_concurrently(model: Model) -> None:
    engine, images = opened(model), pictures(8)
    expected = engine.infer(images).rows
    wrong: list[int] = []

    def lane(index: int) -> None:
        found = [engine.infer(images[index : index + 1]).rows[0] for _ in range(20)]
        wrong.extend(index for rows in found if not np.array_equal(rows, expected[index]))

    threads = [threading.Thread(target=lane, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "images", [pictures(1, 64, 64), pictures(1)[..., :2], pictures(1)[0], pictures(1).astype(np.float32)]
)
def test_pictures_of_another_shape_give_an_error_with_the_expected_shape(
    model: Model,
    images: np.ndarray,
) -> None:
    with pytest.raises(EngineError, match="takes uint8 pictures of 64 x 48"):
        opened(model).infer(images)


def test_a_view_that_is_not_contiguous_gives_the_same_rows(model: Model) -> None:
    engine, images = opened(model), pictures(2)
    flipped = images[:, :, ::-1]
    np.testing.assert_array_equal(
        engine.infer(flipped).rows, engine.infer(np.ascontiguousarray(flipped)).rows
    )


def test_a_model_that_fixes_its_batch_is_fed_with_full_batches(tmp_path: Path) -> None:
    """Five pictures through a model of two: three runs, the last one padded, the same rows as one by one."""
    pair = opened(load_model(TinyDetector(batch=2).save(tmp_path / "pair.onnx")))
    single = opened(load_model(TinyDetector().save(tmp_path / "single.onnx")))
    images = pictures(5)
    assert pair.info().plan.buckets == (2,)
    np.testing.assert_allclose(pair.infer(images).rows, single.infer(images).rows, atol=1e-5)


def test_short_batches_are_padded_to_their_bucket_and_long_ones_cut(model: Model) -> None:
    session = FakeSession(rows)
    engine = faked(model, session, 1, 2, 4)
    assert session.sizes == [1, 2, 4], "every bucket is warmed up"
    assert engine.infer(pictures(7)).rows.shape == (7, 9, 6)
    assert session.sizes[3:] == [4, 4]
    assert engine.info().unplanned_shapes == 0


def test_a_bucket_that_the_model_refuses_is_excluded_with_larger_ones(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(size: int) -> np.ndarray:
        if size > 2:
            raise RuntimeError("Reshape node refuses")
        return rows(size)

    engine = faked(model, FakeSession(answer), 1, 2, 4, 8)
    assert engine.info().plan.buckets == (1, 2)
    assert "batches of 4 and more failed" in engine.info().plan.reason
    assert "Reshape node refuses" in caplog.text
    assert engine.infer(pictures(5)).rows.shape == (5, 9, 6)


def test_a_failed_run_is_an_engine_error_and_the_next_can_succeed(model: Model) -> None:
    failing = [False]

    def answer(size: int) -> np.ndarray:
        if failing[0]:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700\n: illegal address")
        return rows(size)

    engine = faked(model, FakeSession(answer), 1)
    failing[0] = True
    with pytest.raises(
        EngineError, match="tiny failed on cpu: 1 : FAIL : CUDA failure 700 : illegal address"
    ):
        engine.infer(pictures(1))
    failing[0] = False
    assert len(engine.infer(pictures(1)).rows) == 1


def test_a_closed_engine_raises_an_error(model: Model) -> None:
    engine = opened(model)
    assert "open tiny on cpu" in repr(engine)
    engine.close()
    assert "closed" in repr(engine)
    with pytest.raises(EngineError, match="closed"):
        engine.infer(pictures(1))


def test_a_model_that_gives_nan_is_refused_at_warm_up(tmp_path: Path) -> None:
    path = TinyDetector(poison=float("nan")).save(tmp_path / "nan.onnx")
    with pytest.raises(ModelError, match=f"{path}: output contains NaN or infinity"):
        opened(load_model(path))


def broken(path: Path, change: Callable[[onnx.ModelProto], None]) -> Model:
    proto = TinyDetector().proto()
    change(proto)
    onnx.save(proto, path)
    return load_model(path)


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "Frobnicate"


def custom_domain(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "com.example.custom"
    proto.opset_import.append(helper.make_opsetid("com.example.custom", 1))


def future_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 99


def wrong_weights(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.zeros((2, 2), np.float32), proto.graph.initializer[0].name)
    )


def promised_weights(proto: onnx.ModelProto) -> None:
    """Two gigabytes by the dimensions, and no byte of them."""
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_type = TensorProto.FLOAT
    weight.dims[0] = 1 << 21


@pytest.mark.parametrize(
    "change", [unknown_operator, custom_domain, future_opset, wrong_weights, promised_weights]
)
def test_a_model_that_cannot_run_gives_a_one_line_error_with_its_path(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it is printed to stdout or stderr."""
    path = tmp_path / "broken.onnx"
    with pytest.raises(ModelError) as caught:
        opened(broken(path, change))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


# --- precision ----------------------------------------------------------------------------------------------


def test_a_missing_precision_is_refused_with_the_command_that_makes_it(model: Model) -> None:
    config = InferenceConfig(device="cpu", precision="int8")
    with pytest.raises(ModelError, match=r"no int8 variant; make one: .*model compile .*--precision int8"):
        open_engine(model, config)


def test_a_demanded_runtime_or_precision_is_the_reason_of_the_choice(model: Model, tmp_path: Path) -> None:
    single = InferenceConfig(device="cpu", runtime="onnxruntime")
    auto = open_engine(model, single, data=tmp_path / "data", cores=1).info().choice
    assert auto.precision == "fp32"
    assert auto.reason == "onnxruntime was requested"
    asked = open_engine(model, InferenceConfig(device="cpu", precision="fp32")).info().choice
    assert (asked.precision, asked.reason) == ("fp32", "fp32 was requested")


# --- devices ------------------------------------------------------------------------------------------------


def test_on_the_cpu_no_device_is_probed(model: Model) -> None:
    prober = StubProber(ReasonCode.OK)
    engine = open_engine(model, CPU, backend=DeviceBackend(probe_device=prober))
    assert (engine.info().device.effective, engine.info().device.code, prober.asked) == (
        "cpu",
        ReasonCode.CPU_REQUESTED,
        [],
    )


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that claims to have every provider, as the GPU wheel does on any machine."""
    import onnxruntime

    claimed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: claimed)


@pytest.mark.usefixtures("gpu_build")
@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_an_unusable_gpu_is_reported_and_the_cpu_computes(
    model: Model, requested: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One loud line; requested, effective and reason in it."""
    config = InferenceConfig(device=requested)  # type: ignore[arg-type]  # of the two words
    engine = open_engine(
        model, config, backend=DeviceBackend(probe_device=StubProber(ReasonCode.DRIVER_MISSING))
    )
    assert (
        engine.info().device.describe() == f"requested {requested}, effective cpu: because (driver-missing)"
    )
    warnings = [r for r in caplog.records if r.levelname == "WARNING" and "driver-missing" in r.getMessage()]
    assert len(warnings) == 1
    assert len(engine.infer(pictures(1)).rows) == 1


@pytest.mark.usefixtures("gpu_build")
@pytest.mark.parametrize("requested", ["cuda", "tensorrt"])
def test_a_demanded_device_without_fallback_is_an_error_with_reason_and_remedy(
    model: Model, requested: str
) -> None:
    config = InferenceConfig(device=requested, fallback="exit")  # type: ignore[arg-type]  # of the two words
    with pytest.raises(DeviceError) as caught:
        open_engine(model, config, backend=DeviceBackend(probe_device=StubProber(ReasonCode.LIBRARY_MISSING)))
    assert (caught.value.exit_code, caught.value.code) == (3, "library-missing")
    message = str(caught.value)
    assert message.startswith(f"device {requested} was demanded")
    assert "because (library-missing); install the extra 'gpu'" in message


@pytest.mark.usefixtures("gpu_build")
def test_auto_without_fallback_uses_the_cpu_if_there_is_no_gpu(model: Model) -> None:
    config = InferenceConfig(device="auto", fallback="exit")
    assert (
        open_engine(model, config, backend=DeviceBackend(probe_device=StubProber(ReasonCode.NO_DEVICE)))
        .info()
        .device.effective
        == "cpu"
    )


@pytest.mark.usefixtures("gpu_build")
def test_tensorrt_falls_back_to_cuda_before_the_cpu(model: Model) -> None:
    prober = StubProber(ReasonCode.LIBRARY_MISSING)
    open_engine(model, InferenceConfig(device="tensorrt"), backend=DeviceBackend(probe_device=prober))
    assert prober.asked == ["tensorrt", "cuda"]


@pytest.mark.usefixtures("gpu_build")
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # the CPU wheel's own error for CUDA
def test_a_session_that_opens_on_the_cpu_is_not_reported_as_gpu(model: Model) -> None:
    """The probe succeeded and the session did not: the session counts."""
    engine = open_engine(
        model, InferenceConfig(device="cuda"), backend=DeviceBackend(probe_device=StubProber(ReasonCode.OK))
    )
    if engine.info().device.effective == "cuda":
        pytest.skip("this machine has a GPU")
    assert engine.info().device.code not in (ReasonCode.OK, ReasonCode.CPU_REQUESTED)
    assert engine.info().device.degraded


@pytest.mark.usefixtures("gpu_build")
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # as above
def test_a_broken_model_on_a_good_device_is_blamed_on_the_model(tmp_path: Path) -> None:
    """Also with fallback off: exit 2 for the model, not 3 for the device."""
    model = broken(tmp_path / "broken.onnx", unknown_operator)
    with pytest.raises(ModelError, match="cannot be run"):
        open_engine(
            model,
            InferenceConfig(device="cuda", fallback="exit"),
            backend=DeviceBackend(probe_device=StubProber(ReasonCode.OK)),
        )


def test_a_build_without_cuda_is_reported_without_a_probe(model: Model) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this is the GPU wheel")
    prober = StubProber(ReasonCode.OK)
    engine = open_engine(model, InferenceConfig(), backend=DeviceBackend(probe_device=prober))
    assert (engine.info().device.code, prober.asked) == (ReasonCode.NO_GPU_BUILD, [])
    assert not engine.info().device.degraded


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_the_line_about_the_engine_is_short_and_the_rest_is_for_debugging(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture, level: int
) -> None:
    """Model, device, precision, lanes and batch time; `detect` logs it only at DEBUG."""
    caplog.set_level(logging.DEBUG)
    one_runtime = CPU.model_copy(update={"runtime": "onnxruntime"})
    engine = open_engine(model, one_runtime, data=tmp_path / "data", cores=1, level=level)
    lines = {r.getMessage(): r.levelno for r in caplog.records if r.name.endswith("local_engine")}
    short, long = (next(line for line in lines if line.startswith(w)) for w in ("engine ready: ", "engine: "))
    assert re.fullmatch(r"engine ready: tiny on cpu \(fp32\), 1 lane x batch \d, \d+\.\d ms", short)
    assert (lines[short], lines[long]) == (level, logging.DEBUG)
    assert engine.info().plan.reason in long


@pytest.mark.usefixtures("gpu_build")
@pytest.mark.parametrize(
    ("config", "code", "end"),
    [
        (InferenceConfig(device="cpu"), ReasonCode.OK, ", 1 lane x batch 1"),
        (InferenceConfig(), ReasonCode.NO_GPU_BUILD, "; no GPU: onnxruntime without CUDA"),
        (
            InferenceConfig(device="cuda"),
            ReasonCode.DRIVER_MISSING,
            "; cuda was requested: because (driver-missing)",
        ),
    ],
)
def test_the_line_says_why_no_gpu_computes_and_warns_only_where_one_was_expected(
    model: Model, caplog: pytest.LogCaptureFixture, config: InferenceConfig, code: ReasonCode, end: str
) -> None:
    """A machine without a GPU is no fault."""
    caplog.set_level(logging.INFO)
    engine = open_engine(model, config, cores=1, backend=DeviceBackend(probe_device=StubProber(code)))
    (line,) = (r for r in caplog.records if r.getMessage().startswith("engine ready: "))
    assert line.getMessage().endswith(end)
    assert line.levelno == (logging.WARNING if engine.info().device.degraded else logging.INFO)


def test_a_slow_step_is_logged_before_it_begins_and_only_if_it_runs(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first start compiles and measures; with one pair to choose from the second does neither."""
    caplog.set_level(logging.INFO)
    single = InferenceConfig.model_validate({"device": "cpu", "runtime": "onnxruntime", "maxBatch": 1})
    open_engine(model, single, data=tmp_path / "data", cores=1)
    steps = [r.getMessage().split()[0] for r in caplog.records if r.levelname == "INFO"]
    assert steps == ["compiling", "measuring", "engine"]
    caplog.clear()
    open_engine(model, single, data=tmp_path / "data", cores=1)
    assert [r.getMessage().split()[0] for r in caplog.records if r.levelname == "INFO"] == ["engine"]


# --- a second runtime on the CPU ----------------------------------------------------------------------------

IN_OPENVINO = InferenceConfig.model_validate({"device": "cpu", "runtime": "openvino"})
needs_openvino = pytest.mark.skipif(not installed_openvino(), reason="the package openvino is not here")


def make_backend(
    *, installed: bool = True, refuses: str | None = None, shift_px: float = 0.0, bf16: bool = True
) -> DeviceBackend:
    """OpenVINO by script: onnxruntime computes, with moved boxes, unless the graph is refused."""

    def open_scripted(
        graph: bytes, device: EffectiveDevice, *, runtime: Runtime = "onnxruntime", **options: Any
    ) -> DeviceSession:
        if runtime == "openvino" and refuses is not None:
            raise RuntimeError(refuses)
        del options
        session = open_session(graph, device, max_batch=1)
        return MovedSession(session, shift_px) if runtime == "openvino" else session

    def find_precisions(device: EffectiveDevice, runtime: Runtime) -> tuple[str, ...]:
        return (
            ("fp32", "bf16") if (device, runtime) == ("cpu", "openvino") and bf16 and installed else ("fp32",)
        )

    return DeviceBackend(
        open=open_scripted,
        find_runtimes=lambda _device: ("onnxruntime", "openvino") if installed else ("onnxruntime",),
        find_precisions=find_precisions,
    )


class MovedSession:
    """A session in OpenVINO whose boxes are moved."""

    runtime: Runtime = "openvino"

    def __init__(self, inner: DeviceSession, shift_px: float) -> None:
        self._inner = inner
        self._shift_px = shift_px
        self.device, self.rows = inner.device, inner.rows
        self.node_placement, self.notes = inner.node_placement, inner.notes

    def run(self, pictures: PictureBatch, size: int) -> np.ndarray:
        rows = self._inner.run(pictures, size).copy()
        rows[..., :4] += self._shift_px
        return rows

    def keep_only(self, sizes: Collection[int]) -> None:
        self._inner.keep_only(sizes)

    def close(self) -> None:
        self._inner.close()


@needs_openvino
def test_the_cpu_computes_with_openvino_if_it_is_requested(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine, images = opened(model, IN_OPENVINO), pictures(3)
    info = engine.info()
    assert (info.runtime, info.device.effective, info.device.code) == (
        "openvino",
        "cpu",
        ReasonCode.CPU_REQUESTED,
    )
    assert [result.refusal for result in info.device_check.parity_results] == [None]
    assert info.device_check.speed_check is None
    np.testing.assert_allclose(
        engine.infer(images).rows[..., 4], opened(model).infer(images).rows[..., 4], atol=1e-5
    )
    assert "on cpu (OpenVINO, fp32)" in caplog.text
    engine.close()


@pytest.mark.parametrize(
    ("backend", "code", "words"),
    [
        (
            make_backend(installed=False),
            ReasonCode.RUNTIME_MISSING,
            "the package openvino is not installed",
        ),
        (
            make_backend(refuses="Exception from src/a.cpp:1:\nShapes are not consistent"),
            ReasonCode.RUNTIME_REFUSED,
            "OpenVINO refused: Shapes are not consistent",
        ),
        (
            make_backend(shift_px=9.0),
            ReasonCode.RUNTIME_REFUSED,
            "OpenVINO's results differ from onnxruntime's: on 6 pictures only 0%",
        ),
    ],
    ids=["missing", "refused", "wrong"],
)
def test_without_openvino_onnxruntime_goes_on_and_says_why(
    model: Model, caplog: pytest.LogCaptureFixture, backend: DeviceBackend, code: ReasonCode, words: str
) -> None:
    """Or the module ends, if the configuration forbids the fallback."""
    engine = open_engine(model, IN_OPENVINO, backend=backend)
    info = engine.info()
    assert (info.runtime, info.device.code, info.device.degraded) == ("onnxruntime", code, True)
    assert info.device.reason.startswith(words)
    assert info.notes[-1] == f"OpenVINO is not used: {info.device.reason} ({code})"
    (line,) = (r for r in caplog.records if r.getMessage().startswith("engine ready: "))
    assert line.levelno == logging.WARNING
    assert f"; {words}" in line.getMessage()
    assert engine.infer(pictures(2)).rows.shape == (2, info.max_rows, 6)
    for fallback in ("hold", "exit"):
        strict = IN_OPENVINO.model_copy(update={"fallback": fallback})
        with pytest.raises(DeviceError, match="runtime openvino was demanded") as caught:
            open_engine(model, strict, backend=backend)
        assert (caught.value.code, caught.value.exit_code) == (code, 3)


def test_openvino_is_not_opened_again_after_its_process_died(model: Model) -> None:
    lost = DeviceVerdict(ReasonCode.RUNTIME_REFUSED, "OpenVINO failed: signal 11")
    engine = open_engine(model, IN_OPENVINO, backend=make_backend(), only=DeviceAssignment("cpu", lost))
    info = engine.info()
    assert (info.runtime, info.device.code, info.device.reason) == ("onnxruntime", lost.code, lost.reason)


def test_bf16_is_computed_by_openvino_alone(model: Model) -> None:
    config = InferenceConfig.model_validate({"device": "cpu", "precision": "bf16"})
    info = open_engine(model, config, backend=make_backend()).info()
    assert (info.runtime, info.choice.precision) == ("openvino", "bf16")


@pytest.mark.parametrize(
    ("backend", "runtime", "words"),
    [
        (make_backend(installed=False), "auto", "only OpenVINO has it on a CPU, and the package openvino"),
        (make_backend(bf16=False), "auto", "this CPU has no instructions for it"),
        (make_backend(bf16=False), "openvino", "this CPU has no instructions for it"),
        (make_backend(), "onnxruntime", "onnxruntime has none on a CPU"),
    ],
)
def test_bf16_is_refused_in_words_where_there_is_none(
    model: Model, backend: DeviceBackend, runtime: str, words: str
) -> None:
    config = InferenceConfig.model_validate({"device": "cpu", "precision": "bf16", "runtime": runtime})
    with pytest.raises(UnavailableError, match=f"inference.precision: bf16 cannot be used: {words}"):
        open_engine(model, config, backend=backend)


def test_an_intel_gpu_without_its_package_falls_back_with_that_reason(model: Model) -> None:
    config = InferenceConfig.model_validate({"device": "openvino-gpu"})
    backend = DeviceBackend(has_provider=lambda _device: False)
    info = open_engine(model, config, backend=backend).info()
    assert (info.device.effective, info.device.code) == ("cpu", ReasonCode.NO_GPU_BUILD)
    assert info.device.reason == "the package openvino is not installed"
    with pytest.raises(DeviceError, match="install the extra 'openvino'"):
        open_engine(model, config.model_copy(update={"fallback": "exit"}), backend=backend)


@pytest.mark.gpu
def test_a_gpu_gives_the_results_of_the_cpu(model: Model) -> None:
    try:
        engine = open_engine(model, InferenceConfig(device="cuda", fallback="exit"))
    except DeviceError as error:
        pytest.skip(str(error))
    images = pictures(5)
    on_gpu, on_cpu = engine.infer(images).rows, opened(model).infer(images).rows
    assert engine.info().device.effective == "cuda"
    np.testing.assert_allclose(on_gpu[:, :50, 4], on_cpu[:, :50, 4], atol=5e-3)
    assert engine.info().unplanned_shapes == 0


@pytest.mark.parametrize(("runtime", "precision"), [("openvino", "auto"), ("auto", "bf16"), ("auto", "auto")])
def test_onnxruntime_computes_after_openvino_has_failed(
    model: Model, tmp_path: Path, runtime: str, precision: str
) -> None:
    """Also where OpenVINO was chosen: this choice does not outlive the failure."""
    pytest.importorskip("openvino")
    wanted = CPU.model_copy(update={"runtime": runtime, "precision": precision})
    chosen = EngineChoice(EngineCandidate("openvino", "fp32"), "measured here")
    failed = DeviceVerdict(ReasonCode.RUNTIME_REFUSED, "OpenVINO failed: signal 11")
    engine = open_engine(
        model, wanted, data=tmp_path, choices={"cpu": chosen}, only=DeviceAssignment("cpu", failed)
    )
    try:
        info = engine.info()
        assert info.runtime == "onnxruntime"
        assert info.choice.candidate == EngineCandidate("onnxruntime", "fp32")
        assert (info.choice.reason, info.device.code) == (failed.reason, failed.code)
    finally:
        engine.close()
