"""The Open Inference Protocol (KServe v2 REST) for the loaded model, binary tensors included.

One input `images`, UINT8 [n, H, W, 3], BGR at the model's size; one output `detections`, FP32 [n, K, 6]:
left, top, right, bottom in input pixels, score, class. This is the compiled graph as it is: no letterbox, no
threshold, no NMS.
"""

import json
import math
import re
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from visionedge import __version__
from visionedge.web.backend import Busy, Document, ModelFacts, ModuleView
from visionedge.web.jpeg import RequestResources
from visionedge.web.requests import Body
from visionedge.web.responses import RequestError, cut, json_answer, json_bytes

INPUT, OUTPUT = "images", "detections"
VERSION = "1"
HEADER_LENGTH = "Inference-Header-Content-Length"

BODY_LIMIT_S = 30.0
_WRONG_DATATYPE = f"'{INPUT}' must be UINT8"
JSON_LIMIT_BYTES = 2**20
"""Beyond this a tensor has to come as binary data: Python would be busy with the JSON for seconds."""
_CONTAINERS_MOST = 140_000
"""As many lists as 1 MiB of ``[0,0,0],`` holds. Of empty ones there could be three times as many."""
_ID_MOST = 1024
_DATATYPE = re.compile(rb'"datatype"\s{0,8}:\s{0,8}"([A-Z0-9]{1,16})"')


@dataclass(frozen=True, slots=True)
class Question:
    """The JSON part of a request understood: the shape, how the answer is wanted, and values given in it.

    Without values so many bytes as the shape takes have to follow.
    """

    shape: tuple[int, int, int, int]
    id: str | None
    binary: bool
    values: NDArray[np.uint8] | None


class InferenceProtocol:
    """The handlers under ``/v2``; they share resources with the rest of the API."""

    def __init__(self, view: ModuleView, shared: RequestResources) -> None:
        self._view = view
        self._shared = shared

    async def live(self, _request: web.Request) -> web.Response:
        """``/v2/health/live``; that protocol wants 4xx for no."""
        fine = not self._view.health()
        return json_answer({"live": fine}, status=200 if fine else 400)

    async def ready(self, _request: web.Request) -> web.Response:
        """``/v2/health/ready``."""
        fine = not self._view.readiness()
        return json_answer({"ready": fine}, status=200 if fine else 400)

    async def server(self, _request: web.Request) -> web.Response:
        """``/v2``."""
        extensions = ["binary_tensor_data"]
        return json_answer({"name": "visionedge", "version": __version__, "extensions": extensions})

    async def model(self, request: web.Request) -> web.Response:
        """``/v2/models/{model}``."""
        return json_answer(metadata(self._asked_model(request)))

    async def model_ready(self, request: web.Request) -> web.Response:
        """``/v2/models/{model}/ready``."""
        facts = self._asked_model(request)
        fine = not self._view.readiness()
        return json_answer({"name": facts.name, "ready": fine}, status=200 if fine else 400)

    async def infer(self, request: web.Request) -> web.Response:
        """``/v2/models/{model}/infer``."""
        facts = self._asked_model(request)
        async with AsyncExitStack() as held:
            held.enter_context(self._shared.permits.one())
            body = Body(request, BODY_LIMIT_S)
            head = await _head(body, request.headers.get(HEADER_LENGTH))
            question = await self._shared.desk.run(partial(understand, head, facts))
            del head
            count = math.prod(question.shape)
            await held.enter_async_context(self._shared.memory.hold(2 * count))
            images = await _images(body, question, count)
            work = self._computed(facts, question, images, held.pop_all())
            del images
        return await self._shared.unattended.run(work)

    async def _computed(
        self, facts: ModelFacts, question: Question, images: NDArray[np.uint8], held: AsyncExitStack
    ) -> web.Response:
        """Compute and answer; what it holds is free when that is done."""
        async with held:
            rows = await self._view.infer_rows(images)
            return await self._shared.desk.run(partial(_answer, facts, question, rows))

    def _asked_model(self, request: web.Request) -> ModelFacts:
        facts = self._view.model()
        if facts is None:
            raise Busy("no model is loaded yet")
        name, version = request.match_info["model"], request.match_info.get("version", VERSION)
        if name != facts.name or version != VERSION:
            loaded = f"'{facts.name}' version {VERSION}"
            asked = f"'{cut(name)}' version {cut(version)}"
            raise RequestError(404, f"unknown model {asked}; loaded is {loaded}")
        return facts


def routes(handlers: InferenceProtocol) -> list[web.RouteDef]:
    """The paths of the protocol; a model may be asked for with or without its version."""
    found = [
        web.get("/v2", handlers.server),
        web.get("/v2/health/live", handlers.live),
        web.get("/v2/health/ready", handlers.ready),
    ]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        found += [
            web.get(model, handlers.model),
            web.get(f"{model}/ready", handlers.model_ready),
            web.post(f"{model}/infer", handlers.infer),
        ]
    return found


def metadata(facts: ModelFacts) -> Document:
    """The model as the protocol describes it; -1 stands for 1 to `max_batch_size` pictures."""
    shape = [-1, facts.input.height_px, facts.input.width_px, 3]
    return {
        "name": facts.name,
        "versions": [VERSION],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": shape}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, facts.rows, 6]}],
        "parameters": {"max_batch_size": facts.max_batch},
    }


async def _head(body: Body, header_length: str | None) -> bytes:
    """The JSON part of the body.

    Raises:
        RequestError: 400, its length is none; 413, it is too long.
    """
    if header_length is None:
        head = await body.up_to(JSON_LIMIT_BYTES + 1)
        if _is_too_much(head):
            raise _too_long(head)
        if not head:
            raise RequestError(400, "the body is empty")
        return head
    if not re.fullmatch(r"[0-9]{1,12}", header_length):
        raise RequestError(400, f"{HEADER_LENGTH} must be the number of bytes of the JSON part")
    size_bytes = int(header_length)
    head = await body.up_to(min(size_bytes, JSON_LIMIT_BYTES + 1))
    if _is_too_much(head):
        raise _too_long(head)
    if len(head) < size_bytes:
        raise RequestError(400, f"{HEADER_LENGTH} goes beyond the body")
    return head


def _is_too_much(head: bytes) -> bool:
    return len(head) > JSON_LIMIT_BYTES or head.count(b"[") + head.count(b"{") > _CONTAINERS_MOST


def _too_long(head: bytes) -> RequestError:
    """What is wrong with a JSON part above the limit: the datatype where that shows, else the size."""
    found = _DATATYPE.search(head)
    if found is not None and found[1] != b"UINT8":
        return RequestError(400, _WRONG_DATATYPE)
    limit = f"{JSON_LIMIT_BYTES >> 20} MiB or {_CONTAINERS_MOST} lists"
    return RequestError(
        413, f"the JSON part is larger than {limit}; send '{INPUT}' as binary data ('binary_data_size')"
    )


async def _images(body: Body, question: Question, count: int) -> NDArray[np.uint8]:
    """The pictures: the values of the JSON part, or the bytes behind it, of which none may be too many."""
    if question.values is not None:
        if await body.up_to(1):
            raise RequestError(400, "bytes follow the JSON part, but no input has 'binary_data_size'")
        return question.values.reshape(question.shape)
    data = await body.up_to(count + 1)
    if len(data) != count:
        raise RequestError(400, f"the shape takes {count} bytes, but {_many(len(data), count)} follow")
    return np.frombuffer(data, np.uint8).reshape(question.shape)


def _many(size_bytes: int, count: int) -> str:
    return "more" if size_bytes > count else str(size_bytes)


def understand(head: bytes, facts: ModelFacts) -> Question:
    """Understand the JSON part of an inference request; not on the loop.

    Raises:
        RequestError: 400, it is not what the protocol or the model wants.
    """
    try:
        document = json.loads(head)
    except (ValueError, RecursionError):
        raise RequestError(400, "the inference request is no JSON") from None
    if not isinstance(document, dict):
        raise RequestError(400, "the inference request must be an object")
    name = document.get("id")
    if name is not None and not (isinstance(name, str) and len(name) <= _ID_MOST):
        raise RequestError(400, f"'id' must be a text of at most {_ID_MOST} characters")
    tensor = _only_input(document.get("inputs"))
    shape = _shape(tensor, facts)
    return Question(shape, name, _wants_binary(document), _values(tensor, math.prod(shape)))


def _only_input(inputs: object) -> Document:
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError(400, f"'inputs' must hold exactly one tensor, '{INPUT}'")
    tensor: Document = inputs[0]
    if tensor.get("name") != INPUT:
        raise RequestError(400, f"the input is called '{INPUT}'")
    if tensor.get("datatype") != "UINT8":
        raise RequestError(400, _WRONG_DATATYPE)
    return tensor


def _shape(tensor: Document, facts: ModelFacts) -> tuple[int, int, int, int]:
    shape = tensor.get("shape")
    height_px, width_px = facts.input.height_px, facts.input.width_px
    wanted = f"[n, {height_px}, {width_px}, 3] with n from 1 to {facts.max_batch}"
    if not isinstance(shape, list) or shape[1:] != [height_px, width_px, 3]:
        raise RequestError(400, f"the shape of '{INPUT}' must be {wanted}")
    count = shape[0]
    if type(count) is not int or not 1 <= count <= facts.max_batch:
        raise RequestError(400, f"the shape of '{INPUT}' must be {wanted}")
    return count, height_px, width_px, 3


def _parameters(owner: Document) -> Document:
    parameters = owner.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError(400, "'parameters' must be an object")
    return parameters


def _values(tensor: Document, count: int) -> NDArray[np.uint8] | None:
    """The values given in JSON; None where they follow as bytes."""
    parameters = _parameters(tensor)
    if any(key.startswith("shared_memory") for key in parameters):
        raise RequestError(400, "shared memory is not supported; send the tensor in the body")
    size = parameters.get("binary_data_size")
    if size is None:
        return _listed(tensor.get("data"), count)
    if "data" in tensor:
        raise RequestError(400, "an input has 'data' or 'binary_data_size', not both")
    if type(size) is not int or size != count:
        raise RequestError(400, f"the shape takes {count} bytes, and 'binary_data_size' must say so")
    return None


def _listed(data: object, count: int) -> NDArray[np.uint8]:
    """Values given in JSON, flat or nested as deep as the shape.

    By Python's own quick means: numpy looks at nested lists for seconds, and holds the interpreter meanwhile.
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
        raise RequestError(400, f"'outputs' must hold one tensor at most, '{OUTPUT}'")
    for output in outputs:
        if not isinstance(output, dict) or output.get("name") != OUTPUT:
            raise RequestError(400, f"the output is called '{OUTPUT}'")
        parameters = _parameters(output)
        if any(key == "classification" or key.startswith("shared_memory") for key in parameters):
            raise RequestError(400, f"'{OUTPUT}' is given in the answer as it is; no other way is supported")
        wanted = parameters.get("binary_data", wanted)
    if not isinstance(wanted, bool):
        raise RequestError(400, "'binary_data' and 'binary_data_output' must be true or false")
    return wanted


def _answer(facts: ModelFacts, question: Question, rows: NDArray[np.float32]) -> web.Response:
    output: Document = {"name": OUTPUT, "datatype": "FP32", "shape": list(rows.shape)}
    document: Document = {"model_name": facts.name, "model_version": VERSION, "outputs": [output]}
    if question.id is not None:
        document["id"] = question.id
    if not question.binary:
        output["data"] = rows.ravel().tolist()
        return web.Response(body=json_bytes(document), content_type="application/json")
    tensor = rows.astype("<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(tensor)}
    head = json_bytes(document)
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return web.Response(body=head + tensor, headers=headers)
