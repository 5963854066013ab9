"""One server of the Open Inference Protocol, over HTTP or gRPC: is it ready, what does it serve, infer.

tritonclient is imported here only, and only in the process that computes. Its asyncio client serves HTTP,
because one time limit then covers a whole request, and one client serves all lanes; its other client needs
one gevent hub per thread. Its gRPC client may be used by any thread.
"""

import asyncio
import os
import ssl
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from visionedge.errors import UnavailableError
from visionedge.model.postprocess import Rows
from visionedge.runtime.redaction import redact

ReplicaFaultKind = Literal["down", "late", "busy", "denied", "batch", "answer"]
"""down: no connection, or it broke; late: no answer in time; busy: too many requests; denied: token,
certificate or unknown model; batch: this batch is refused; answer: it cannot be used."""

_MAX_RECONNECT_WAIT_MS = 5000
_BUSY_STATUS = frozenset({"429", "503", "StatusCode.RESOURCE_EXHAUSTED"})
_DENIED_STATUS = frozenset(
    {"401", "403", "404", "407", "StatusCode.UNAUTHENTICATED", "StatusCode.PERMISSION_DENIED"}
    | {"StatusCode.NOT_FOUND", "StatusCode.UNIMPLEMENTED"}
)
_BATCH_STATUS = frozenset({"400", "413", "422", "StatusCode.INVALID_ARGUMENT"})
_LATE_STATUS = frozenset({"408", "504", "StatusCode.DEADLINE_EXCEEDED"})
_MAX_TEXT_CHARACTERS = 300

T = TypeVar("T")


class ReplicaError(Exception):
    """A request to a server failed; the text has no secrets."""

    def __init__(self, kind: ReplicaFaultKind, message: str) -> None:
        super().__init__(redact(" ".join(message.split()))[:_MAX_TEXT_CHARACTERS])
        self.kind = kind


@dataclass(frozen=True, slots=True)
class ServedTensor:
    """An input or output as the server describes it: ``UINT8 [-1, 416, 416, 3]``."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.datatype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of a model. `max_batch`, `sha256` (of the model file): where it tells them."""

    inputs: tuple[ServedTensor, ...]
    outputs: tuple[ServedTensor, ...]
    max_batch: int | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        inputs, outputs = (
            ", ".join(map(str, tensors)) or "nothing" for tensors in (self.inputs, self.outputs)
        )
        return f"{inputs} -> {outputs}"

    @staticmethod
    def of(document: Mapping[str, Any]) -> "ServedModel":
        """Of the protocol's metadata.

        Raises:
            ReplicaError: it is no such document.
        """
        try:
            parameters = document.get("parameters") or {}
            max_batch, sha256 = parameters.get("max_batch_size"), parameters.get("sha256")
            return ServedModel(
                tuple(_read_tensor(tensor) for tensor in document.get("inputs", ())),
                tuple(_read_tensor(tensor) for tensor in document.get("outputs", ())),
                max_batch if isinstance(max_batch, int) and max_batch > 0 else None,
                sha256 if isinstance(sha256, str) else None,
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ReplicaError("answer", "the metadata of the model cannot be read") from None


def _read_tensor(document: Mapping[str, Any]) -> ServedTensor:
    # protobuf writes 64-bit numbers into JSON as texts
    shape = tuple(int(size) for size in document["shape"])
    return ServedTensor(str(document["name"]), str(document["datatype"]), shape)


class ReplicaClient(Protocol):
    """One server. Any thread may call; each request ends after `timeout_s`.

    Raises:
        ReplicaError: by every method but `close`.
    """

    def check_ready(self, timeout_s: float) -> None:
        """Return if server and model are ready."""

    def describe(self, timeout_s: float) -> ServedModel:
        """The model as the server describes it."""

    def infer(self, pictures: NDArray[np.uint8], served: ServedModel, timeout_s: float) -> Rows:
        """Rows float32 of pictures (n, H, W, 3); their shape is what the server sent."""

    def close(self) -> None:
        """End the connections."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a model is served, and how the connection is checked. `token` is a secret."""

    url: str
    model: str
    certificate: str | None
    token: str | None

    def __repr__(self) -> str:
        return f"<ServerAddress {self.url} {self.model}>"

    @property
    def is_encrypted(self) -> bool:
        """Whether TLS protects the connection."""
        return self.url.startswith(("https:", "grpcs:"))

    @property
    def authority(self) -> str:
        """The address without its scheme."""
        return self.url.partition("://")[2].rstrip("/")

    def headers(self) -> dict[str, str] | None:
        """Headers for HTTP, and in lower case metadata for gRPC."""
        return None if self.token is None else {"authorization": f"Bearer {self.token}"}


def open_client(address: ServerAddress, requests: "EventLoopThread") -> ReplicaClient:
    """A client for a server; nothing is sent yet.

    Raises:
        UnavailableError: tritonclient is not installed, or the certificate cannot be read.
    """
    try:
        if address.url.startswith("grpc"):
            return GrpcReplica(address)
        return HttpReplica(address, requests)
    except (ImportError, RuntimeError) as error:
        raise UnavailableError(f"tritonclient cannot be used ({error}): install visionedge anew") from error
    except (OSError, ValueError) as error:
        # ssl.SSLError is an OSError
        text = getattr(error, "strerror", None) or str(error)
        raise UnavailableError(f"inference.remote.certificate: cannot be read: {text}") from None


class EventLoopThread:
    """An event loop on a thread of its own, on which HTTP requests run."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], Coroutine[Any, Any, T]], timeout_s: float | None = None) -> T:
        """Run a coroutine on the loop and wait for it.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            ReplicaError: the loop is closed.
        """

        async def limited() -> T:
            async with asyncio.timeout(timeout_s):
                return await work()

        if self._closed:
            raise ReplicaError("down", "the engine is closed")
        try:
            return asyncio.run_coroutine_threadsafe(limited(), self._loop).result()
        except CancelledError:
            raise ReplicaError("down", "the engine is closed") from None

    def close(self) -> None:
        """Cancel what runs, and end the loop and its thread."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class HttpReplica:
    """A `ReplicaClient` over HTTP."""

    def __init__(self, address: ServerAddress, requests: EventLoopThread) -> None:
        import tritonclient.http.aio as triton

        self._address = address
        self._requests = requests
        self._triton: Any = triton
        context: ssl.SSLContext | bool = True
        if address.is_encrypted:
            context = ssl.create_default_context(cafile=address.certificate)
        self._client: Any = requests.run(lambda: self._connect(context))

    async def _connect(self, context: ssl.SSLContext | bool) -> Any:
        import aiohttp

        client = self._triton.InferenceServerClient(
            self._address.authority, ssl=self._address.is_encrypted, ssl_context=context
        )
        # A redirect could lead pictures and token to another server, and tritonclient has no option for it.
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_refuse_redirect)
        client._stub.trace_configs.append(trace)  # noqa: SLF001 - as above
        trace.freeze()
        return client

    def check_ready(self, timeout_s: float) -> None:
        """See `ReplicaClient`."""
        model = self._address.model
        if not self._request(lambda: self._is_ready("v2/health/ready"), timeout_s):
            self.describe(timeout_s)  # its error says more: a wrong token, an unknown model
            raise ReplicaError("down", "the server is not ready")
        if not self._request(lambda: self._is_ready(f"v2/models/{quote(model)}/ready"), timeout_s):
            self.describe(timeout_s)
            raise ReplicaError("down", f"the model '{model}' is not ready")

    def describe(self, timeout_s: float) -> ServedModel:
        """See `ReplicaClient`."""
        client, headers, model = self._client, self._address.headers(), self._address.model
        return ServedModel.of(
            self._request(lambda: client.get_model_metadata(model, headers=headers), timeout_s)
        )

    def infer(self, pictures: NDArray[np.uint8], served: ServedModel, timeout_s: float) -> Rows:
        """See `ReplicaClient`."""
        tensor = _fill_input(self._triton, pictures, served)
        outputs = [self._triton.InferRequestedOutput(served.outputs[0].name, binary_data=True)]
        client, headers = self._client, self._address.headers()
        result = self._request(
            lambda: client.infer(self._address.model, [tensor], outputs=outputs, headers=headers), timeout_s
        )
        return _read_rows(result, served)

    def close(self) -> None:
        """See `ReplicaClient`."""
        self._requests.run(self._client.close)

    async def _is_ready(self, path: str) -> bool:
        # tritonclient's own calls leave the answer open, and with it the connection.
        response = await self._client._get(path, self._address.headers(), None)  # noqa: SLF001 - as above
        async with response:
            return int(response.status) == 200

    def _request(self, send: Callable[[], Coroutine[Any, Any, Any]], timeout_s: float) -> Any:
        return _translate(lambda: self._requests.run(send, timeout_s), timeout_s)


async def _refuse_redirect(_session: object, _context: object, _parameters: object) -> None:
    raise ReplicaError("denied", "the server redirects to another address; redirects are not followed")


class GrpcReplica:
    """A `ReplicaClient` over gRPC."""

    def __init__(self, address: ServerAddress) -> None:
        import grpc
        import tritonclient.grpc as triton

        self._address = address
        self._triton: Any = triton
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # The default waits up to two minutes before it connects again, in all channels to a server.
            ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_WAIT_MS),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        credentials = None
        if address.is_encrypted:
            # Without a file, gRPC trusts its own authorities and not the system's.
            credentials = grpc.ssl_channel_credentials(_read_certificates(address.certificate))
        self._client: Any = triton.InferenceServerClient(
            address.authority, creds=credentials, channel_args=options
        )

    def check_ready(self, timeout_s: float) -> None:
        """See `ReplicaClient`."""
        client, headers, model = self._client, self._address.headers(), self._address.model
        if not self._request(
            lambda: client.is_server_ready(headers=headers, client_timeout=timeout_s), timeout_s
        ):
            self.describe(timeout_s)
            raise ReplicaError("down", "the server is not ready")
        if not self._request(
            lambda: client.is_model_ready(model, headers=headers, client_timeout=timeout_s), timeout_s
        ):
            self.describe(timeout_s)
            raise ReplicaError("down", f"the model '{model}' is not ready")

    def describe(self, timeout_s: float) -> ServedModel:
        """See `ReplicaClient`."""
        client, headers, model = self._client, self._address.headers(), self._address.model
        return ServedModel.of(
            self._request(
                lambda: client.get_model_metadata(
                    model, headers=headers, as_json=True, client_timeout=timeout_s
                ),
                timeout_s,
            )
        )

    def infer(self, pictures: NDArray[np.uint8], served: ServedModel, timeout_s: float) -> Rows:
        """See `ReplicaClient`."""
        tensor = _fill_input(self._triton, pictures, served)
        outputs = [self._triton.InferRequestedOutput(served.outputs[0].name)]
        client, headers = self._client, self._address.headers()
        result = self._request(
            lambda: client.infer(
                self._address.model, [tensor], outputs=outputs, headers=headers, client_timeout=timeout_s
            ),
            timeout_s,
        )
        return _read_rows(result, served)

    def close(self) -> None:
        """See `ReplicaClient`."""
        self._client.close()

    def _request(self, send: Callable[[], Any], timeout_s: float) -> Any:
        return _translate(send, timeout_s)


def _read_certificates(path: str | None) -> bytes | None:
    """The authorities in a file, else those of the system; None if the system has no such file."""
    system: Any = ssl.get_default_verify_paths()  # typed as if the file always existed
    found = path or system.cafile
    return None if found is None else Path(found).read_bytes()


def _translate(send: Callable[[], T], timeout_s: float) -> T:
    """The result of a request; every error as a `ReplicaError`."""
    from tritonclient.utils import InferenceServerException

    try:
        return send()
    except ReplicaError:
        raise
    except TimeoutError:
        raise ReplicaError("late", f"gave no answer within {timeout_s:g} s") from None
    except InferenceServerException as error:
        raise _translate_status(str(error.status()), str(error.message()), timeout_s) from None
    except ssl.SSLError as error:
        raise ReplicaError("denied", f"TLS failed: {error}") from None
    except OSError as error:  # also aiohttp's errors of connections
        kind: ReplicaFaultKind = "denied" if "ertificate" in type(error).__name__ else "down"
        number = error.errno or 0  # asyncio's own text hides "Connection refused"
        raise ReplicaError(kind, os.strerror(number) if number > 0 else str(error)) from None
    except Exception as error:  # noqa: BLE001 - aiohttp, JSON, numpy and protobuf raise their own
        if type(error).__module__.startswith("aiohttp"):
            raise ReplicaError("down", str(error) or type(error).__name__) from None
        raise ReplicaError("answer", f"its answer cannot be read: {type(error).__name__}: {error}") from None


def _translate_status(status: str, message: str, timeout_s: float) -> ReplicaError:
    """The error of a server that answered with a status, or of a gRPC channel."""
    code = status.removeprefix("StatusCode.")
    if status in _LATE_STATUS:
        return ReplicaError("late", f"gave no answer within {timeout_s:g} s")
    kind: ReplicaFaultKind = "down"
    if status in _BUSY_STATUS:
        kind = "busy"
    elif status in _DENIED_STATUS:
        kind = "denied"
    elif status in _BATCH_STATUS:
        kind = "batch"
    return ReplicaError(kind, f"answered {code}: {message}")


def _fill_input(triton: Any, pictures: NDArray[np.uint8], served: ServedModel) -> Any:
    tensor = triton.InferInput(served.inputs[0].name, list(pictures.shape), "UINT8")
    tensor.set_data_from_numpy(pictures)
    return tensor


def _read_rows(result: Any, served: ServedModel) -> Rows:
    """The one output of an answer.

    Raises:
        ReplicaError: it is missing, or of another type.
    """
    try:
        rows = result.as_numpy(served.outputs[0].name)
    except Exception as error:  # noqa: BLE001 - numpy, KeyError, tritonclient's own
        raise ReplicaError("answer", f"its rows cannot be read: {type(error).__name__}: {error}") from None
    if rows is None:
        raise ReplicaError("answer", f"its answer has no output '{served.outputs[0].name}'")
    if rows.dtype != np.float32:
        raise ReplicaError("answer", f"its rows are {rows.dtype}, not float32")
    return np.ascontiguousarray(rows)
