"""A child process that tries one provider (``python -m …engine.device.probe CUDAExecutionProvider``).

It prints one JSON line, ``{"providers": […], "error": "…"}``. The parent also reads what onnxruntime and CUDA
write to stderr. This process may hang or crash; this is a result too. ``openvino-gpu`` is OpenVINO's GPU.
"""

import json
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper

from visionedge.runtime.ort import import_onnxruntime, load_cuda_libraries
from visionedge.runtime.ov import import_openvino

_WARNINGS = 2


def main(provider: str) -> None:
    """Start a session of one node on the provider, run it, and print the result."""
    providers: list[str] = []
    error = ""
    try:
        providers = _try_openvino_gpu() if provider == "openvino-gpu" else _try_provider(provider)
    except Exception as caught:  # noqa: BLE001 - any exception is a valid result: its text is printed
        error = str(caught) or type(caught).__name__
    sys.stdout.write(json.dumps({"providers": providers, "error": error}) + "\n")


def _try_provider(provider: str) -> list[str]:
    onnxruntime = import_onnxruntime(_WARNINGS)
    load_cuda_libraries(onnxruntime)
    session = onnxruntime.InferenceSession(_make_tiny_model(), providers=[provider], enable_fallback=0)
    session.disable_fallback()
    session.run(None, {"x": np.ones(8, np.float32)})
    return list(session.get_providers())


def _try_openvino_gpu() -> list[str]:
    core = import_openvino().Core()
    compiled = core.compile_model(core.read_model(_make_tiny_model()), "GPU")
    compiled.create_infer_request().infer({"x": np.ones(8, np.float32)})
    return ["openvino-gpu"]


def _make_tiny_model() -> bytes:
    node = helper.make_node("Add", ["x", "x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in ("x", "y"))
    graph = helper.make_graph([node], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


if __name__ == "__main__":
    main(sys.argv[1])
