"""A small server of the Open Inference Protocol, over HTTP or gRPC, that fails as a test says.

It computes the compiled graph of a model as the real engine on the CPU does, so that its rows are right.
"""

import json
import ssl
import threading
from abc import ABC, abstractmethod
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from visionedge.engine.device.session import Session, open_ort_session
from visionedge.model.compiler.build import load_or_compile_with_batch
from visionedge.model.model import load_model

Fault = Literal[
    "error", "busy", "hang", "cut", "garbage", "wrong-count", "wrong-rows", "wrong-type", "nan", "refuse"
]
"""error: status 500; cut: the connection closes within the answer; wrong-count, wrong-rows: another shape."""

INPUT_NAME, OUTPUT_NAME = "visionedge.pictures", "visionedge.rows"
LENGTH_HEADER = "Inference-Header-Content-Length"


class InferenceModel:
    """A model as a server serves it, and the faults of the server.

    `fault` applies to all inferences until it is None again; `hang` ends with `release`. `metadata` may be
    changed. `batches` counts the inferences by their number of pictures.
    """

    def __init__(self, path: Path, *, name: str = "tiny", batch: int = -1, token: str | None = None) -> None:
        model, graph = load_or_compile_with_batch(load_model(path), None)
        self.name, self.token = name, token
        self.fault: Fault | None = None
        self.ready = True
        self.batches: Counter[int] = Counter()
        self.tokens: list[str | None] = []
        self.asked = threading.Event()
        self._session: Session = open_ort_session(graph, "cpu", max_batch=1)
        spec = model.input
        self.metadata: dict[str, Any] = {
            "name": name,
            "platform": "onnxruntime_onnx",
            "versions": ["1"],
            "inputs": [
                {"name": INPUT_NAME, "datatype": "UINT8", "shape": [batch, spec.height_px, spec.width_px, 3]}
            ],
            "outputs": [{"name": OUTPUT_NAME, "datatype": "FP32", "shape": [batch, self._session.rows, 6]}],
        }
        self._released = threading.Event()
        self._lock = threading.Lock()

    def release(self) -> None:
        """End all inferences that hang."""
        self._released.set()

    def compute(self, pictures: NDArray[np.uint8]) -> NDArray[Any]:
        """The rows of an inference, or what the fault makes of them."""
        with self._lock:
            self.batches[len(pictures)] += 1
            fault = self.fault
            rows: NDArray[Any] = self._session.run(pictures, len(pictures))
        if fault is not None:
            self.asked.set()
        if fault == "hang":
            self._released.wait(30)
        if fault == "wrong-count":
            rows = np.concatenate([rows, rows])
        if fault == "wrong-rows":
            rows = rows[:, :1]
        if fault == "wrong-type":
            rows = rows.astype(np.float64)
        if fault == "nan":
            rows = np.full_like(rows, np.nan)
        return rows

    def close(self) -> None:
        """End everything that hangs."""
        self.release()
        self._session.close()


class _InferenceServer(ABC):
    """``with SERVER as server:``; `stop` and `start` as if its process died and came."""

    model: InferenceModel

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.model.close()

    @abstractmethod
    def start(self) -> None:
        """Listen, on the same port as before."""

    @abstractmethod
    def stop(self) -> None:
        """End all requests and close the port."""


class HttpInferenceServer(_InferenceServer):
    """The protocol over HTTP, or over HTTPS with `tls`."""

    def __init__(self, model: InferenceModel, *, tls: ssl.SSLContext | None = None) -> None:
        self.model = model
        self.port = 0
        self._tls = tls
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"{'http' if self._tls is None else 'https'}://localhost:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = server = _Server(("127.0.0.1", self.port), self.model)
        self.port = server.server_address[1]
        if self._tls is not None:
            server.socket = self._tls.wrap_socket(server.socket, server_side=True)
        self._thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="inference")
        self._thread.start()

    def stop(self) -> None:
        """Close all connections."""
        server, self._server = self._server, None
        if server is not None and self._thread is not None:
            server.shutdown()
            self._thread.join()
            server.close_connections()
            self.model.release()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], model: InferenceModel) -> None:
        self.model = model
        self._connections: set[Any] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            try:
                connection.shutdown(2)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:  # a client that left is no error
        del request, client_address


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        model, path = self.server.model, self.path
        if self._is_denied():
            self._answer(401, {"error": "a token is needed"})
        elif path in ("/v2/health/ready", f"/v2/models/{model.name}/ready"):
            self._answer(200 if model.ready else 400, {"ready": model.ready})
        elif path == f"/v2/models/{model.name}":
            self._answer(200, model.metadata)
        else:
            self._answer(404, {"error": f"unknown model {path}"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        length = int(self.headers[LENGTH_HEADER])
        document, tail = json.loads(body[:length]), body[length:]
        if self._is_denied():
            self._answer(401, {"error": "a token is needed"})
            return
        pictures = np.frombuffer(tail, np.uint8).reshape(document["inputs"][0]["shape"])
        fault = self.server.model.fault
        rows = self.server.model.compute(pictures)
        failures = {"error": (500, "broken"), "busy": (503, "busy"), "refuse": (400, "no such batch")}
        if fault in failures:
            status, text = failures[fault]
            self._answer(status, {"error": text})
        elif fault == "garbage":
            self._send(200, b"{not json", {})
        else:
            self._answer_rows(rows, cut=fault == "cut")

    def _is_denied(self) -> bool:
        model, given = self.server.model, self.headers.get("Authorization")
        model.tokens.append(given)
        return model.token is not None and given != f"Bearer {model.token}"

    def _answer_rows(self, rows: NDArray[Any], *, cut: bool) -> None:
        datatype = "FP64" if rows.dtype == np.float64 else "FP32"
        tensor = rows.tobytes()
        parameters = {"binary_data_size": len(tensor)}
        output = {
            "name": OUTPUT_NAME,
            "datatype": datatype,
            "shape": list(rows.shape),
            "parameters": parameters,
        }
        head = json.dumps({"model_name": self.server.model.name, "outputs": [output]}).encode()
        if cut:
            self._send(200, head + tensor[: len(tensor) // 2], {LENGTH_HEADER: str(len(head))}, missing=100)
            self.close_connection = True
            return
        self._send(200, head + tensor, {LENGTH_HEADER: str(len(head))})

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, missing: int = 0) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output stays readable."""


class GrpcInferenceServer(_InferenceServer):
    """The same over gRPC, made of the protocol's own files in tritonclient."""

    def __init__(self, model: InferenceModel) -> None:
        self.model = model
        self.port = 0
        self._server: Any = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"grpc://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        import grpc
        from tritonclient.grpc import service_pb2_grpc

        self._pool = ThreadPoolExecutor(4, thread_name_prefix="grpc")
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_make_servicer(self.model), self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        """End all requests and close the port."""
        server, self._server = self._server, None
        if server is not None:
            self.model.release()
            server.stop(None).wait()
            self._pool.shutdown()


def _make_servicer(model: InferenceModel) -> Any:
    import grpc
    from google.protobuf import json_format  # type: ignore[import-untyped]
    from tritonclient.grpc import service_pb2 as protocol
    from tritonclient.grpc import service_pb2_grpc

    def check(request: Any, context: Any) -> None:
        given = dict(context.invocation_metadata()).get("authorization")
        model.tokens.append(given)
        if model.token is not None and given != f"Bearer {model.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token is needed")
        if getattr(request, "name", getattr(request, "model_name", model.name)) != model.name:
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown model")

    failures: dict[str, tuple[Any, str]] = {
        "error": (grpc.StatusCode.INTERNAL, "broken"),
        "busy": (grpc.StatusCode.RESOURCE_EXHAUSTED, "busy"),
        "refuse": (grpc.StatusCode.INVALID_ARGUMENT, "no such batch"),
    }

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # untyped
        def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
            check(request, context)
            return protocol.ServerReadyResponse(ready=model.ready)

        def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802 - as above
            check(request, context)
            return protocol.ModelReadyResponse(ready=model.ready)

        def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802 - as above
            check(request, context)
            return json_format.ParseDict(model.metadata, protocol.ModelMetadataResponse())

        def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - as above
            check(request, context)
            shape = list(request.inputs[0].shape)
            rows = model.compute(np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(shape))
            if model.fault in failures:
                context.abort(*failures[model.fault])
            answer = protocol.ModelInferResponse(model_name=model.name)
            output = answer.outputs.add()
            output.name, output.datatype = OUTPUT_NAME, "FP64" if rows.dtype == np.float64 else "FP32"
            output.shape.extend(rows.shape)
            answer.raw_output_contents.append(rows.tobytes())
            return answer

    return Servicer()
