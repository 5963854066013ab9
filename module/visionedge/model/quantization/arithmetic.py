"""How a network in integers is computed on a CPU: by the processor's own kernels, or as it is written.

onnxruntime puts one integer kernel where a node stands between pairs of QuantizeLinear and DequantizeLinear.
Those kernels are not the same everywhere: x86 without VNNI adds up products in 16 bits and cuts off what is
more. Without them each node computes in floats and only the pairs round, which is the same on every machine,
slower than floats, and what an integer kernel that keeps all its bits gives.
"""

from typing import Any

from visionedge.runtime.ort import import_onnxruntime


def open_on_cpu(graph: bytes, *, exact: bool, threads: int = 0) -> Any:
    """A session of a graph on the CPU; `exact` without integer kernels. `threads` 0 is as many as there are.

    Raises what onnxruntime raises.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others may need the cores
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
