"""The Open Inference Protocol (KServe v2 REST) for the loaded model, binary tensors included.

`NAME.detect` is the compiled graph of the model `NAME`, and so is `NAME` itself.

One input `images`, UINT8 [n, H, W, 3], BGR at the model's size; one output `detections`, FP32 [n, K, 6]:
left, top, right, bottom in input pixels, score, class. It runs the compiled graph alone: no letterbox, no
threshold, no NMS.
"""

import json
import math
import re
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from visionedge import __version__
from visionedge.config.documents import Document
from visionedge.errors import BusyError
from visionedge.outbound.messages import encode_json
from visionedge.web.backend import Backend, ModelMetadata
from visionedge.web.request_body import RequestBody, RequestResources
from visionedge.web.responses import RequestError, json_response, truncate

INPUT_NAME, OUTPUT_NAME = "images", "detections"
COMPILED_SUFFIX = ".detect"
VERSION = "1"
JSON_LENGTH_HEADER = "Inference-Header-Content-Length"

BODY_LIMIT_S = 30.0
_WRONG_DATATYPE = f"'{INPUT_NAME}' must be UINT8"
JSON_LIMIT_BYTES = 2**20
"""A larger tensor must come as binary data: Python would parse its JSON for seconds."""

_MAX_CONTAINERS = 140_000
"""As many lists as 1 MiB of ``[0,0,0],`` holds. 1 MiB of ``[],`` holds more than twice as many."""

_MAX_ID_CHARACTERS = 1024
_DATATYPE = re.compile(rb'"datatype"\s{0,8}:\s{0,8}"([A-Z0-9]{1,16})"')


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """The JSON part of a request. `binary`: the answer is wanted as binary data.

    With `values` None, the bytes of the shape follow the JSON part.
    """

    shape: tuple[int, int, int, int]
    id: str | None
    binary: bool
    values: NDArray[np.uint8] | None


class InferenceProtocol:
    """The handlers under ``/v2``. They share the resources of the rest of the API."""

    def __init__(self, backend: Backend, shared: RequestResources) -> None:
        self._backend = backend
        self._shared = shared

    async def live(self, _request: web.Request) -> web.Response:
        """``/v2/health/live``; the protocol wants 4xx for false."""
        fine = not self._backend.health()
        return json_response({"live": fine}, status=200 if fine else 400)

    async def ready(self, _request: web.Request) -> web.Response:
        """``/v2/health/ready``."""
        fine = not self._backend.readiness()
        return json_response({"ready": fine}, status=200 if fine else 400)

    async def server(self, _request: web.Request) -> web.Response:
        """``/v2``."""
        extensions = ["binary_tensor_data"]
        return json_response({"name": "visionedge", "version": __version__, "extensions": extensions})

    async def models(self, _request: web.Request) -> web.Response:
        """``/v2/models``."""
        return json_response({"models": self._list_models()})

    async def index(self, _request: web.Request) -> web.Response:
        """``POST /v2/repository/index``, by which Triton's clients list models."""
        return json_response(self._list_models())

    def _list_models(self) -> list[Document]:
        found = []
        for model_metadata in self._backend.models():
            reason = self._backend.model_readiness(model_metadata.name)
            state = "READY" if reason is None else "UNAVAILABLE"
            found.append(
                {"name": model_metadata.name, "version": VERSION, "state": state, "reason": reason or ""}
            )
        return found

    async def model(self, request: web.Request) -> web.Response:
        """``/v2/models/{model}``."""
        return json_response(build_metadata(self._asked_model(request)))

    async def model_ready(self, request: web.Request) -> web.Response:
        """``/v2/models/{model}/ready``."""
        asked = self._asked_model(request)
        fine = self._backend.model_readiness(asked.name.removesuffix(COMPILED_SUFFIX)) is None
        return json_response({"name": asked.name, "ready": fine}, status=200 if fine else 400)

    async def infer(self, request: web.Request) -> web.Response:
        """``/v2/models/{model}/infer``."""
        model_metadata = self._asked_model(request)
        async with AsyncExitStack() as held:
            held.enter_context(self._shared.permits.acquire())
            body = RequestBody(request, BODY_LIMIT_S)
            head = await _read_json_part(body, request.headers.get(JSON_LENGTH_HEADER))
            inference_request = await self._shared.executor.run(partial(parse_request, head, model_metadata))
            del head
            count = math.prod(inference_request.shape)
            await held.enter_async_context(self._shared.memory.hold(2 * count))
            images = await _images(body, inference_request, count)
            work = self._computed(model_metadata, inference_request, images, held.pop_all())
            del images
        return await self._shared.detached_tasks.run(work)

    async def _computed(
        self,
        model_metadata: ModelMetadata,
        inference_request: InferenceRequest,
        images: NDArray[np.uint8],
        held: AsyncExitStack,
    ) -> web.Response:
        """Compute and answer; then release what is held for it."""
        async with held:
            name = model_metadata.name.removesuffix(COMPILED_SUFFIX)
            rows = await self._backend.infer_rows(images, name)
            return await self._shared.executor.run(
                partial(_build_response, model_metadata, inference_request, rows)
            )

    def _asked_model(self, request: web.Request) -> ModelMetadata:
        models = self._backend.models()
        if not models:
            raise BusyError("no model is loaded yet")
        name, version = request.match_info["model"], request.match_info.get("version", VERSION)
        for model_metadata in models:
            names = model_metadata.name, model_metadata.name + COMPILED_SUFFIX
            if name in names and version == VERSION:
                return replace(model_metadata, name=name)
        raise _unknown_model(name, version, [model_metadata.name for model_metadata in models])


def _unknown_model(name: str, version: str, loaded: Sequence[str]) -> RequestError:
    asked = f"'{truncate(name)}' version {truncate(version)}"
    names = ", ".join(f"'{each}'" for each in loaded)
    return RequestError(404, f"unknown model {asked}; loaded is {names} version {VERSION}")


def build_routes(handlers: InferenceProtocol) -> list[web.RouteDef]:
    """The paths of the protocol; those of a model work with and without its version."""
    found = [
        web.get("/v2", handlers.server),
        web.get("/v2/health/live", handlers.live),
        web.get("/v2/health/ready", handlers.ready),
    ]
    found += [web.get("/v2/models", handlers.models), web.post("/v2/repository/index", handlers.index)]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        found += [
            web.get(model, handlers.model),
            web.get(f"{model}/ready", handlers.model_ready),
            web.post(f"{model}/infer", handlers.infer),
        ]
    return found


def build_metadata(model_metadata: ModelMetadata) -> Document:
    """The model as the protocol describes it; -1 means 1 to `max_batch_size` pictures."""
    shape = [-1, model_metadata.input.height_px, model_metadata.input.width_px, 3]
    return {
        "name": model_metadata.name,
        "versions": [VERSION],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": INPUT_NAME, "datatype": "UINT8", "shape": shape}],
        "outputs": [{"name": OUTPUT_NAME, "datatype": "FP32", "shape": [-1, model_metadata.rows, 6]}],
        "parameters": {"max_batch_size": model_metadata.max_batch, "sha256": model_metadata.sha256},
    }


async def _read_json_part(body: RequestBody, header_length: str | None) -> bytes:
    """The JSON part of the body.

    Raises:
        RequestError: 400, its length is malformed; 413, it is too large.
    """
    if header_length is None:
        head = await body.read_up_to(JSON_LIMIT_BYTES + 1)
        if _is_too_large(head):
            raise _too_large_error(head)
        if not head:
            raise RequestError(400, "the body is empty")
        return head
    if not re.fullmatch(r"[0-9]{1,12}", header_length):
        raise RequestError(400, f"{JSON_LENGTH_HEADER} must be the number of bytes of the JSON part")
    size_bytes = int(header_length)
    head = await body.read_up_to(min(size_bytes, JSON_LIMIT_BYTES + 1))
    if _is_too_large(head):
        raise _too_large_error(head)
    if len(head) < size_bytes:
        raise RequestError(400, f"{JSON_LENGTH_HEADER} goes beyond the body")
    return head


def _is_too_large(head: bytes) -> bool:
    return len(head) > JSON_LIMIT_BYTES or head.count(b"[") + head.count(b"{") > _MAX_CONTAINERS


def _too_large_error(head: bytes) -> RequestError:
    """The error of a JSON part above the limit: a wrong datatype where it shows, else the size."""
    found = _DATATYPE.search(head)
    if found is not None and found[1] != b"UINT8":
        return RequestError(400, _WRONG_DATATYPE)
    limit = f"{JSON_LIMIT_BYTES >> 20} MiB or {_MAX_CONTAINERS} lists"
    return RequestError(
        413, f"the JSON part is larger than {limit}; send '{INPUT_NAME}' as binary data ('binary_data_size')"
    )


async def _images(body: RequestBody, inference_request: InferenceRequest, count: int) -> NDArray[np.uint8]:
    """The pictures: the values of the JSON part, or the bytes after it. Their number must be exact."""
    if inference_request.values is not None:
        if await body.read_up_to(1):
            raise RequestError(400, "bytes follow the JSON part, but no input has 'binary_data_size'")
        return inference_request.values.reshape(inference_request.shape)
    data = await body.read_up_to(count + 1)
    if len(data) != count:
        raise RequestError(
            400, f"the shape takes {count} bytes, but {_describe_size(len(data), count)} follow"
        )
    return np.frombuffer(data, np.uint8).reshape(inference_request.shape)


def _describe_size(size_bytes: int, count: int) -> str:
    return "more" if size_bytes > count else str(size_bytes)


def parse_request(head: bytes, model_metadata: ModelMetadata) -> InferenceRequest:
    """Parse the JSON part of an inference request. Blocks: not for the event loop.

    Raises:
        RequestError: 400, it does not follow the protocol or does not fit the model.
    """
    try:
        document = json.loads(head)
    except (ValueError, RecursionError):
        raise RequestError(400, "the inference request is not JSON") from None
    if not isinstance(document, dict):
        raise RequestError(400, "the inference request must be an object")
    name = document.get("id")
    if name is not None and not (isinstance(name, str) and len(name) <= _MAX_ID_CHARACTERS):
        raise RequestError(400, f"'id' must be a text of at most {_MAX_ID_CHARACTERS} characters")
    tensor = _only_input(document.get("inputs"))
    shape = _shape(tensor, model_metadata)
    return InferenceRequest(shape, name, _wants_binary(document), _values(tensor, math.prod(shape)))


def _only_input(inputs: object) -> Document:
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError(400, f"'inputs' must hold exactly one tensor, '{INPUT_NAME}'")
    tensor: Document = inputs[0]
    if tensor.get("name") != INPUT_NAME:
        raise RequestError(400, f"the input is called '{INPUT_NAME}'")
    if tensor.get("datatype") != "UINT8":
        raise RequestError(400, _WRONG_DATATYPE)
    return tensor


def _shape(tensor: Document, model_metadata: ModelMetadata) -> tuple[int, int, int, int]:
    shape = tensor.get("shape")
    height_px, width_px = model_metadata.input.height_px, model_metadata.input.width_px
    wanted = f"[n, {height_px}, {width_px}, 3] with n from 1 to {model_metadata.max_batch}"
    if not isinstance(shape, list) or shape[1:] != [height_px, width_px, 3]:
        raise RequestError(400, f"the shape of '{INPUT_NAME}' must be {wanted}")
    count = shape[0]
    if type(count) is not int or not 1 <= count <= model_metadata.max_batch:
        raise RequestError(400, f"the shape of '{INPUT_NAME}' must be {wanted}")
    return count, height_px, width_px, 3


def _parameters(owner: Document) -> Document:
    parameters = owner.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError(400, "'parameters' must be an object")
    return parameters


def _values(tensor: Document, count: int) -> NDArray[np.uint8] | None:
    """The values in the JSON part; None where they follow as bytes."""
    parameters = _parameters(tensor)
    if any(key.startswith("shared_memory") for key in parameters):
        raise RequestError(400, "shared memory is not supported; send the tensor in the body")
    size = parameters.get("binary_data_size")
    if size is None:
        return _array_from_json(tensor.get("data"), count)
    if "data" in tensor:
        raise RequestError(400, "an input has 'data' or 'binary_data_size', not both")
    if type(size) is not int or size != count:
        raise RequestError(400, f"the shape takes {count} bytes, and 'binary_data_size' must say so")
    return None


def _array_from_json(data: object, count: int) -> NDArray[np.uint8]:
    """The values in the JSON part, flat or nested like the shape.

    Without numpy, which takes seconds for nested lists and holds the interpreter's lock meanwhile.
    """
    wrong = RequestError(400, f"'data' must hold {count} whole numbers from 0 to 255")
    values = data if isinstance(data, list) else []
    for _ in range(3):
        if values and isinstance(values[0], list):
            if not all(isinstance(value, list) for value in values):
                raise wrong
            values = list(chain.from_iterable(values))
    if len(values) != count or set(map(type, values)) != {int}:
        raise wrong
    try:
        return np.frombuffer(bytes(values), np.uint8)
    except (ValueError, OverflowError):
        raise wrong from None


def _wants_binary(document: Document) -> bool:
    wanted: Any = _parameters(document).get("binary_data_output", False)
    outputs = document.get("outputs") or []
    if not isinstance(outputs, list) or len(outputs) > 1:
        raise RequestError(400, f"'outputs' must hold one tensor at most, '{OUTPUT_NAME}'")
    for output in outputs:
        if not isinstance(output, dict) or output.get("name") != OUTPUT_NAME:
            raise RequestError(400, f"the output is called '{OUTPUT_NAME}'")
        parameters = _parameters(output)
        if any(key == "classification" or key.startswith("shared_memory") for key in parameters):
            raise RequestError(
                400, f"'{OUTPUT_NAME}' is given in the answer as it is; no other way is supported"
            )
        wanted = parameters.get("binary_data", wanted)
    if not isinstance(wanted, bool):
        raise RequestError(400, "'binary_data' and 'binary_data_output' must be true or false")
    return wanted


def _build_response(
    model_metadata: ModelMetadata, inference_request: InferenceRequest, rows: NDArray[np.float32]
) -> web.Response:
    output: Document = {"name": OUTPUT_NAME, "datatype": "FP32", "shape": list(rows.shape)}
    document: Document = {"model_name": model_metadata.name, "model_version": VERSION, "outputs": [output]}
    if inference_request.id is not None:
        document["id"] = inference_request.id
    if not inference_request.binary:
        output["data"] = rows.ravel().tolist()
        return web.Response(body=encode_json(document), content_type="application/json")
    tensor = rows.astype("<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(tensor)}
    head = encode_json(document)
    headers = {"Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: str(len(head))}
    return web.Response(body=head + tensor, headers=headers)
