"""A session of OpenVINO: the rows of onnxruntime for every family of models, and nothing else changed."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import detr_models as detr
import raw_map_models as maps
import tiny_yolos as yolos
from tiny_models import TinyDetector, pictures
from visionedge.engine.device.backend import find_precisions, list_cpu_precisions, open_session
from visionedge.engine.device.openvino_session import OpenVinoSession
from visionedge.engine.device.session import DeviceSession
from visionedge.model.compiler.compile import compile_model
from visionedge.model.model import load_model
from visionedge.runtime.ov import installed_openvino

if not installed_openvino():
    pytest.skip("the package openvino is not here", allow_module_level=True)

RAW = {"anchors": str([list(pair) for pair in yolos.ANCHORS])}
MODELS: dict[str, Callable[[Path], Path]] = {
    "nanodet": lambda path: TinyDetector().save(path),
    "nanodet of one class": lambda path: TinyDetector(classes=1).save(path),
    "yolox": yolos.yolox,
    "yolox, decoded": lambda path: yolos.yolox(path, decoded=True),
    "yolov5": yolos.yolov5,
    "yolov6": yolos.yolov6,
    "yolov8": yolos.yolov8,
    "raw maps": lambda path: maps.raw_map_model(path, metadata=RAW),
    "raw maps, channels last": lambda path: maps.raw_map_model(path, "channels-last", metadata=RAW),
    "fastestdet": maps.fastestdet_model,
    "end to end": maps.end_to_end_model,
    "detr": detr.raw_detr_model,
    "rt-detr, finished": detr.finished_detr_model,
    "rt-detr of ultralytics": lambda path: detr.joined_detr_model(path, task="detect"),
}


def compiled(save: Callable[[Path], Path], folder: Path) -> bytes:
    return compile_model(load_model(save(folder / "model.onnx")))


@pytest.fixture
def graph(tmp_path: Path) -> bytes:
    return compiled(TinyDetector().save, tmp_path)


def open_in(runtime: Any, graph: bytes, precision: str = "fp32") -> DeviceSession:
    return open_session(graph, "cpu", max_batch=4, runtime=runtime, precision=precision)


def images_of(graph: bytes, count: int) -> NDArray[np.uint8]:
    session = OpenVinoSession(graph, "cpu")
    height_px, width_px = session.size_px
    session.close()
    return pictures(count, width_px, height_px)


@pytest.mark.parametrize("family", MODELS)
def test_every_family_gives_the_rows_of_onnxruntime(family: str, tmp_path: Path) -> None:
    graph = compiled(MODELS[family], tmp_path)
    images = images_of(graph, 2)
    batch = 1 if load_model(tmp_path / "model.onnx").interpretation.input.batch == 1 else 2
    expected = open_in("onnxruntime", graph).run(images[:batch], batch)
    session = open_in("openvino", graph)
    rows = session.run(images[:batch], batch)
    assert (session.runtime, session.device, session.rows) == ("openvino", "cpu", expected.shape[1])
    np.testing.assert_allclose(rows[..., 4], expected[..., 4], atol=1e-5)
    sure = expected[..., 4] > 0.3  # rows of equal scores may change places
    np.testing.assert_allclose(rows[sure][:, :4].sum(), expected[sure][:, :4].sum(), rtol=1e-4)


def test_a_graph_that_openvino_refuses_is_an_error_without_places_in_its_sources() -> None:
    with pytest.raises(RuntimeError, match="Unable to read the model"):
        OpenVinoSession(b"no graph", "cpu")


def test_batch_sizes_are_compiled_when_they_are_used_and_freed(graph: bytes) -> None:
    session, images = OpenVinoSession(graph, "cpu"), pictures(4)
    rows = session.run(images, 4)
    assert session.compiled_sizes == {1, 4}
    session.keep_only([1])
    assert session.compiled_sizes == {1}
    np.testing.assert_array_equal(session.run(images, 4), rows)


def test_other_threads_run_while_a_batch_is_computed(tmp_path: Path) -> None:
    """OpenVINO releases Python's lock: a thread that watches sees the other one inside of `run`."""
    session = OpenVinoSession(compiled(TinyDetector(320, 320, classes=80).save, tmp_path), "cpu")
    images = pictures(1, 320, 320)
    inside, seen, stop = [False], [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen[0] += inside[0]

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2000):
        inside[0] = True
        session.run(images, 1)
        inside[0] = False
        if seen[0] > 100:
            break
    stop.set()
    watcher.join()
    assert seen[0] > 100


def test_nothing_of_the_process_changes(graph: bytes) -> None:
    before = os.sched_getaffinity(0), dict(os.environ)
    session = OpenVinoSession(graph, "cpu")
    threads = [threading.Thread(target=session.run, args=(pictures(2), 2)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    assert (os.sched_getaffinity(0), dict(os.environ)) == before


# --- precisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "precisions"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16", ("fp32", "bf16")),
        ("Features\t: fp asimd bf16 i8mm", ("fp32", "bf16")),
        ("flags\t\t: fpu avx2 avx512f avx_vnni", ("fp32",)),
        ("model name\t: bf16", ("fp32",)),
    ],
)
def test_bf16_needs_instructions_for_it(tmp_path: Path, flags: str, precisions: tuple[str, ...]) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{flags}\n")
    assert list_cpu_precisions(path) == precisions
    assert list_cpu_precisions(tmp_path / "none") == ("fp32",)


def test_each_runtime_has_its_precisions() -> None:
    assert find_precisions("cpu", "onnxruntime") == find_precisions("cuda", "onnxruntime") == ("fp32",)
    assert find_precisions("cpu", "openvino") == list_cpu_precisions()
    assert find_precisions("openvino-gpu", "openvino") == ("fp32", "fp16")


def read_layers(session: OpenVinoSession) -> list[tuple[str, str]]:
    """The kind and precision of every operator, in the order in which OpenVINO runs them."""
    graph = session._get_compiled(1)._compiled.get_runtime_model()
    info = [operator.get_rt_info() for operator in graph.get_ordered_ops()]
    return [(str(each["layerType"].astype(str)), str(each["runtimePrecision"].astype(str))) for each in info]


@pytest.mark.skipif("bf16" not in list_cpu_precisions(), reason="this CPU has no instructions for bf16")
@pytest.mark.shared
def test_bf16_computes_the_network_and_leaves_its_boxes_in_fp32(shared_data: Path) -> None:
    """Also the expectation over bins, which is a product of matrices and so would be rounded, too."""
    graph = compile_model(load_model(shared_data / "models" / "picodet_s_416_coco80.onnx"))
    layers = read_layers(OpenVinoSession(graph, "cpu", precision="bf16"))
    reduced = [kind for kind, precision in layers if precision == "bf16"]
    assert reduced.count("Convolution") > 100
    assert not {"Softmax", "FullyConnected", "MatMul"} & set(reduced)
