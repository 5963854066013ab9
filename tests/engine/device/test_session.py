"""A session: bound buffers on every device, and options that a device refuses."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tiny_models import TinyDetector, pictures
from visionedge.engine.device import session as providers
from visionedge.engine.device.backend import find_runtimes, open_session
from visionedge.engine.device.devices import PROVIDERS, Runtime
from visionedge.engine.device.faults import EngineError
from visionedge.engine.device.session import (
    CUDA_GRAPH_OPTIONS,
    CUDA_GRAPHS,
    CUDA_MINIMAL_OPTIONS,
    CUDA_OPTIONS,
    EXHAUSTIVE_SEARCH,
    KNOWN_OPTIONS,
    PLAIN,
    DeviceSession,
    NodePlacement,
    Session,
    find_options,
    list_provider_configs,
    make_tensorrt_options,
    open_ort_session,
)
from visionedge.model.compiler.compile import compile_model
from visionedge.model.model import load_model


@pytest.fixture
def graph(tmp_path: Path) -> bytes:
    return compile_model(load_model(TinyDetector().save(tmp_path / "tiny.onnx")))


def raw_session(graph: bytes) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def test_bound_runs_equal_plain_runs_bit_for_bit(graph: bytes) -> None:
    session, images = open_ort_session(graph, "cpu", max_batch=4), pictures(4)
    (plain,) = raw_session(graph).run(None, {"visionedge.pictures": images})
    for size in (4, 1, 2, 4):
        np.testing.assert_array_equal(session.run(images[:size], size), plain[:size])


@pytest.fixture(params=["onnxruntime", "openvino"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    """Every runtime behaves alike."""
    name: Runtime = request.param
    if name not in find_runtimes("cpu"):
        pytest.skip(f"the package {name} is not here")
    return name


def opened(graph: bytes, runtime: Runtime) -> DeviceSession:
    return open_session(graph, "cpu", max_batch=4, runtime=runtime)


def test_rows_are_not_overwritten_by_the_next_run(graph: bytes, runtime: Runtime) -> None:
    """On the CPU a bound output is the caller's own memory, unless it is copied."""
    session, images = opened(graph, runtime), pictures(2)
    first = session.run(images[:1], 1)
    kept = first.copy()
    second = session.run(images[1:], 1)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, kept)


def test_padding_changes_nothing(graph: bytes, runtime: Runtime) -> None:
    """With any content of an earlier batch in the buffer."""
    session, images = opened(graph, runtime), pictures(4)
    alone = session.run(images[:1], 1)
    session.run(images, 4)
    np.testing.assert_array_equal(session.run(images[:1], 4), alone)


def test_threads_have_their_own_buffers(graph: bytes, runtime: Runtime) -> None:
    session, images = opened(graph, runtime), pictures(6)
    expected = [session.run(images[i : i + 1], 1) for i in range(6)]
    wrong: list[int] = []

    def lane(index: int) -> None:
        found = [session.run(images[index : index + 1], 1) for _ in range(30)]
        wrong.extend(index for rows in found if not np.array_equal(rows, expected[index]))

    threads = [threading.Thread(target=lane, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_picture_views_are_read_in_their_logical_order(graph: bytes, runtime: Runtime) -> None:
    session, images = opened(graph, runtime), pictures(2)
    flipped = [picture[::-1, ::-1] for picture in images]
    assert not flipped[0].flags.c_contiguous
    expected = session.run(np.ascontiguousarray(images[:, ::-1, ::-1]), 2)
    np.testing.assert_array_equal(session.run(flipped, 2), expected)


def test_pictures_in_any_memory_are_only_read(graph: bytes, runtime: Runtime) -> None:
    """Contiguous, one by one, and with space after each; the pictures of the engine's child are read-only."""
    session, images = opened(graph, runtime), pictures(2)
    expected = session.run(images, 2)
    images.flags.writeable = False
    before = images.copy()
    np.testing.assert_array_equal(session.run(images, 2), expected)
    np.testing.assert_array_equal(session.run([images[0]], 1), expected[:1])
    np.testing.assert_array_equal(session.run([images[1]], 1), expected[1:])
    np.testing.assert_array_equal(session.run([images[1]], 2), expected[1:])
    np.testing.assert_array_equal(images, before)


def test_a_closed_session_raises_an_error(graph: bytes, runtime: Runtime) -> None:
    session = opened(graph, runtime)
    session.close()
    assert "closed" in repr(session)
    with pytest.raises(EngineError, match="closed"):
        session.run(pictures(1), 1)


@pytest.mark.parametrize("shape", [("N", 9, 5), ("N", 9), (2, 9, 6)])
def test_an_output_of_another_shape_is_refused_at_once(shape: tuple[Any, ...]) -> None:
    """Before any picture of a camera comes near it."""
    with pytest.raises(EngineError, match="for a batch of 1"):
        open_ort_session(answering(shape), "cpu", max_batch=1)


def answering(shape: tuple[Any, ...]) -> bytes:
    """A graph that takes pictures and gives zeros of a shape."""
    sizes = [1 if size == "N" else size for size in shape]
    nodes = [
        helper.make_node("ConstantOfShape", ["sizes"], ["rows"]),
    ]
    graph = helper.make_graph(
        nodes,
        "answering",
        [helper.make_tensor_value_info("pictures", TensorProto.UINT8, ["N", 48, 64, 3])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, sizes)],
        [helper.make_tensor("sizes", TensorProto.INT64, [len(sizes)], sizes)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


# --- where nodes lie ----------------------------------------------------------------------------------------


class StubAssignedSession:
    """A session as onnxruntime describes one: its nodes, dealt out to providers."""

    def __init__(self, raw: Any, **parts: list[tuple[str, str]]) -> None:
        self._raw = raw
        self._parts = [StubSubgraph(PROVIDERS[device], nodes) for device, nodes in parts.items()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def get_provider_graph_assignment_info(self) -> list["StubSubgraph"]:
        return self._parts


class StubSubgraph:
    def __init__(self, provider: str, nodes: list[tuple[str, str]]) -> None:
        self.ep_name = provider
        self._nodes = [StubNode(*node) for node in nodes]

    def get_nodes(self) -> list["StubNode"]:
        return self._nodes


class StubNode:
    def __init__(self, op_type: str, name: str) -> None:
        self.op_type, self.name = op_type, name


def test_on_the_cpu_every_node_is_placed_as_requested(graph: bytes) -> None:
    node_placement = open_ort_session(graph, "cpu", max_batch=1).node_placement
    assert node_placement.on_cpu == ()
    assert node_placement.on_device > 10, "onnxruntime recorded them"


def test_nodes_on_the_cpu_are_counted_and_named(graph: bytes) -> None:
    from visionedge.engine.device.session import _read_node_placement

    dealt = StubAssignedSession(
        raw_session(graph),
        cuda=[("Conv", "backbone/0"), ("TopK", "visionedge.TopK.30")],
        cpu=[("NonMaxSuppression", "nms"), ("Shape", "")],
    )
    assert _read_node_placement(dealt, "cuda") == NodePlacement(2, ("NonMaxSuppression nms", "Shape"))
    assert _read_node_placement(dealt, "cpu").on_cpu == ()


# --- options ------------------------------------------------------------------------------------------------


def test_options_that_a_session_refuses_are_dropped_with_its_error(
    graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA graphs are for a model with nodes on the CPU: the next choice is taken, and the reason kept."""
    refused = providers.ProviderConfig("odd options", {"cpu": {"no_such_option": "1"}})
    plain = providers.ProviderConfig("CPU")
    monkeypatch.setattr(
        "visionedge.engine.device.session.list_provider_configs", lambda *_a, **_k: (refused, plain)
    )
    session = open_ort_session(graph, "cpu", max_batch=1)
    assert session.notes == ("odd options refused: CPUExecutionProvider has no option no_such_option",)
    assert session.run(pictures(1), 1).shape[0] == 1


def test_if_the_last_options_are_refused_their_error_is_raised(
    graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = providers.ProviderConfig("odd options", {"cpu": {"no_such_option": "1"}})
    monkeypatch.setattr(
        "visionedge.engine.device.session.list_provider_configs", lambda *_a, **_k: (refused,)
    )
    with pytest.raises(ValueError, match="no_such_option"):
        open_ort_session(graph, "cpu", max_batch=1)


def test_captured_runs_use_one_thread(graph: bytes) -> None:
    """A CUDA graph belongs to the thread that captured it; lanes come and go."""
    seen: set[str] = set()

    class RecordingSession(StubAssignedSession):
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            seen.add(threading.current_thread().name)
            self._raw.run_with_iobinding(binding, options)

    session = Session(RecordingSession(raw_session(graph)), "cpu", cuda_graphs=True)
    images = pictures(3)
    lanes = [threading.Thread(target=session.run, args=(images[i : i + 1], 1)) for i in range(3)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    session.close()
    assert len(seen) == 1
    assert threading.current_thread().name not in seen


def test_a_graph_replay_with_other_rows_is_refused(graph: bytes) -> None:
    """Then the session is opened again without it."""

    class WrongSession(StubAssignedSession):
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            """Leave the output unchanged."""

    with pytest.raises(EngineError, match="different scores"):
        Session(WrongSession(raw_session(graph)), "cpu")


def test_cuda_is_tried_with_plain_options_and_then_with_fewer() -> None:
    tried = list_provider_configs("cuda", b"", max_batch=8, data=None)
    assert [choice.options["cuda"] for choice in tried] == [CUDA_OPTIONS, CUDA_MINIMAL_OPTIONS]
    assert not any(choice.cuda_graphs for choice in tried)
    assert CUDA_OPTIONS["arena_extend_strategy"] == "kSameAsRequested"
    assert CUDA_OPTIONS["cudnn_conv_algo_search"] == "HEURISTIC"
    assert "enable_cuda_graph" not in CUDA_OPTIONS


def test_options_that_nobody_measured_are_opened_only_by_their_name() -> None:
    """Each has one way: without what it names, the measurement would be that of other options."""
    assert find_options("cuda", "onnxruntime") == (PLAIN, EXHAUSTIVE_SEARCH, CUDA_GRAPHS)
    for device in ("cpu", "tensorrt"):
        assert find_options(device, "onnxruntime") == (PLAIN,)
    (graphs,) = list_provider_configs("cuda", b"", max_batch=8, data=None, options=CUDA_GRAPHS)
    assert (graphs.cuda_graphs, graphs.options["cuda"]) == (True, CUDA_GRAPH_OPTIONS)
    (search,) = list_provider_configs("cuda", b"", max_batch=8, data=None, options=EXHAUSTIVE_SEARCH)
    assert search.options["cuda"]["cudnn_conv_algo_search"] == "EXHAUSTIVE"


def test_tensorrt_gets_one_profile_for_all_batches_and_caches_its_engines(
    graph: bytes, tmp_path: Path
) -> None:
    options = make_tensorrt_options(graph, 8, tmp_path / "data")
    assert options["trt_profile_min_shapes"] == "visionedge.pictures:1x48x64x3"
    assert options["trt_profile_max_shapes"] == "visionedge.pictures:8x48x64x3"
    assert Path(options["trt_engine_cache_path"]).is_dir()
    assert options["trt_timing_cache_enable"] == "1"
    assert set(options) <= KNOWN_OPTIONS[PROVIDERS["tensorrt"]]
    assert all(isinstance(value, str) for value in options.values())


def test_tensorrt_needs_no_profile_for_a_fixed_batch(tmp_path: Path) -> None:
    fixed = compile_model(load_model(TinyDetector(batch=2).save(tmp_path / "pair.onnx")))
    assert onnx.ModelProto.FromString(fixed).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert make_tensorrt_options(fixed, 8, None) == {"device_id": "0"}
