"""The Open Inference Protocol (KServe v2 REST) for the loaded model, binary tensors included.

One input `images`, UINT8 [n, H, W, 3], BGR at the model's size; one output `detections`, FP32 [n, K, 6]:
left, top, right, bottom in input pixels, score, class. This is the compiled graph as it is: no letterbox, no
threshold, no NMS.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from visionedge import __version__
from visionedge.web.answers import RequestError, json_answer, json_bytes, read_body
from visionedge.web.pictures import Desk, Permits
from visionedge.web.view import Busy, Document, ModelFacts, ModuleView

INPUT, OUTPUT = "images", "detections"
VERSION = "1"
HEADER_LENGTH = "Inference-Header-Content-Length"

BODY_LIMIT_S = 30.0
_JSON_BYTES_PER_VALUE = 5
"""``255, ``: the most that a UINT8 takes in a JSON body."""
_JSON_ROOM_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Asked:
    """An inference request understood: its pictures, and how its answer is wanted."""

    images: NDArray[np.uint8]
    id: str | None
    binary: bool


class InferenceProtocol:
    """The handlers under ``/v2``; they share desk and permits with the rest of the API."""

    def __init__(self, view: ModuleView, desk: Desk, uploads: Permits) -> None:
        self._view = view
        self._desk = desk
        self._uploads = uploads

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
        header_length = request.headers.get(HEADER_LENGTH)
        with self._uploads.one():
            body = await read_body(request, _limit_bytes(facts), BODY_LIMIT_S)
            asked = await self._desk.run(partial(read_request, body, header_length, facts))
            del body
            rows = await self._view.infer_rows(asked.images)
            return await self._desk.run(partial(_answer, facts, asked, rows))

    def _asked_model(self, request: web.Request) -> ModelFacts:
        facts = self._view.model()
        if facts is None:
            raise Busy("no model is loaded yet")
        name, version = request.match_info["model"], request.match_info.get("version", VERSION)
        if name != facts.name or version != VERSION:
            loaded = f"'{facts.name}' version {VERSION}"
            raise RequestError(404, f"unknown model '{name}' version {version}; loaded is {loaded}")
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
    """The model as the protocol describes it; -1 stands for the number of pictures."""
    shape = [-1, facts.input.height_px, facts.input.width_px, 3]
    return {
        "name": facts.name,
        "versions": [VERSION],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": shape}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, facts.rows, 6]}],
    }


def read_request(body: bytes, header_length: str | None, facts: ModelFacts) -> Asked:
    """Understand the body of an inference request; slow for large ones, so not on the loop.

    Raises:
        RequestError: 400, it is not what the protocol or the model wants.
    """
    head, tail = _split(body, header_length)
    try:
        document = json.loads(head)
    except (ValueError, RecursionError):
        raise RequestError(400, "the inference request is no JSON") from None
    if not isinstance(document, dict):
        raise RequestError(400, "the inference request must be an object")
    name = document.get("id")
    if name is not None and not isinstance(name, str):
        raise RequestError(400, "'id' must be a text")
    tensor = _only_input(document.get("inputs"))
    shape = _shape(tensor, facts)
    values = _values(tensor, tail, math.prod(shape))
    return Asked(values.reshape(shape), name, _wants_binary(document))


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return body, b""
    if not re.fullmatch(r"[0-9]{1,12}", header_length) or int(header_length) > len(body):
        raise RequestError(400, f"{HEADER_LENGTH} must be the bytes of the JSON part, within the body")
    return body[: int(header_length)], body[int(header_length) :]


def _only_input(inputs: object) -> Document:
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError(400, f"'inputs' must hold exactly one tensor, '{INPUT}'")
    tensor: Document = inputs[0]
    if tensor.get("name") != INPUT:
        raise RequestError(400, f"the input is called '{INPUT}'")
    if tensor.get("datatype") != "UINT8":
        raise RequestError(400, f"'{INPUT}' must be UINT8")
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


def _values(tensor: Document, tail: bytes, count: int) -> NDArray[np.uint8]:
    parameters = _parameters(tensor)
    if any(key.startswith("shared_memory") for key in parameters):
        raise RequestError(400, "shared memory is not supported; send the tensor in the body")
    size = parameters.get("binary_data_size")
    if size is None:
        if tail:
            raise RequestError(400, "bytes follow the JSON part, but no input has 'binary_data_size'")
        return _listed(tensor.get("data"), count)
    if "data" in tensor:
        raise RequestError(400, "an input has 'data' or 'binary_data_size', not both")
    if type(size) is not int or size != count or len(tail) != count:
        message = f"the shape takes {count} bytes, 'binary_data_size' says {size}, {len(tail)} follow"
        raise RequestError(400, message)
    return np.frombuffer(tail, np.uint8)


def _listed(data: object, count: int) -> NDArray[np.uint8]:
    """Values given in JSON, flat or nested."""
    try:
        values = np.asarray(data)
    except ValueError:
        values = np.asarray(None)
    if values.dtype.kind not in "iu" or values.size != count:
        raise RequestError(400, f"'data' must hold {count} whole numbers")
    if int(values.min()) < 0 or int(values.max()) > 255:
        raise RequestError(400, "'data' must hold values from 0 to 255")
    return values.astype(np.uint8)


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


def _answer(facts: ModelFacts, asked: Asked, rows: NDArray[np.float32]) -> web.Response:
    output: Document = {"name": OUTPUT, "datatype": "FP32", "shape": list(rows.shape)}
    document: Document = {"model_name": facts.name, "model_version": VERSION, "outputs": [output]}
    if asked.id is not None:
        document["id"] = asked.id
    if not asked.binary:
        output["data"] = rows.ravel().tolist()
        return web.Response(body=json_bytes(document), content_type="application/json")
    tensor = rows.astype("<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(tensor)}
    head = json_bytes(document)
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return web.Response(body=head + tensor, headers=headers)


def _limit_bytes(facts: ModelFacts) -> int:
    values = facts.max_batch * facts.input.height_px * facts.input.width_px * 3
    return values * _JSON_BYTES_PER_VALUE + _JSON_ROOM_BYTES
