"""The Open Inference Protocol: JSON and binary tensors, and refusals."""

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np
import pytest

from fake_backend import SPEC, Client, FakeBackend, run_scenario
from visionedge.web.backend import ModelMetadata

IMAGES = np.arange(2 * SPEC.height_px * SPEC.width_px * 3, dtype=np.uint8).reshape(
    2, SPEC.height_px, SPEC.width_px, 3
)
INFER = "/v2/models/nano/infer"


def request_of(**changes: Any) -> dict[str, Any]:
    """A right request in JSON, with the changes to its input."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(IMAGES.shape), "data": IMAGES.tolist()}
    return {
        "id": "42",
        "inputs": [{key: item for key, item in {**tensor, **changes}.items() if item is not None}],
    }


def binary(document: dict[str, Any], tail: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with a binary tensor."""
    head = json.dumps(document).encode()
    return head + tail, {"Inference-Header-Content-Length": str(len(head))}


async def refused(answer: aiohttp.ClientResponse) -> tuple[int, str]:
    """Status and text of an error, in the shape of the protocol."""
    document = await answer.json()
    assert list(document) == ["error"]
    assert isinstance(document["error"], str)
    return answer.status, document["error"]


def check(rows: np.ndarray[Any, Any]) -> None:
    """These are the rows that the fake computes for `IMAGES`."""
    assert rows.shape == (2, 5, 6)
    assert rows[:, 0, 0] == pytest.approx(IMAGES.reshape(2, -1).mean(axis=1), rel=1e-6)
    assert rows[0, :, 1].tolist() == [0, 1, 2, 3, 4]


def test_the_server_and_its_model_describe_themselves() -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/v2") as answer:
            document = await answer.json()
            assert document["name"] == "visionedge"
            assert "binary_tensor_data" in document["extensions"]
        for path in ("/v2/models/nano", "/v2/models/nano/versions/1"):
            async with client.get(path) as answer:
                document = await answer.json()
            assert document["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 8, 16, 3]}]
            assert document["outputs"] == [{"name": "detections", "datatype": "FP32", "shape": [-1, 5, 6]}]

    run_scenario(FakeBackend(), scenario)


def test_the_compiled_graph_is_also_called_detect() -> None:
    """`NAME.detect`, for devices that use the module as their remote device; with the digest of the file."""

    async def scenario(client: Client) -> None:
        for name in ("nano", "nano.detect"):
            async with client.get(f"/v2/models/{name}") as answer:
                document = await answer.json()
            assert document["name"] == name
            assert document["parameters"] == {"max_batch_size": 4, "sha256": "ab" * 32}
            async with client.get(f"/v2/models/{name}/ready") as answer:
                assert await answer.json() == {"name": name, "ready": True}
        async with client.post("/v2/models/nano.detect/infer", json=request_of()) as answer:
            assert (await answer.json())["model_name"] == "nano.detect"
        for name in ("nano.detect.detect", ".detect", "detect", "nan.detect"):
            async with client.get(f"/v2/models/{name}") as answer:
                assert (await refused(answer))[0] == 404

    run_scenario(FakeBackend(), scenario)


def test_health_is_the_status_code_alone() -> None:
    module = FakeBackend()
    paths = ("/v2/health/live", "/v2/health/ready", "/v2/models/nano/ready")

    async def scenario(client: Client) -> None:
        for path in paths:
            async with client.get(path) as answer:
                assert answer.status == 200
        module.unhealthy, module.unready = ["dead"], ["cold"]
        for path in paths:
            async with client.get(path) as answer:
                assert answer.status == 400

    run_scenario(module, scenario)


def test_a_tensor_in_json_is_answered_in_json() -> None:
    async def scenario(client: Client) -> None:
        flat = request_of(data=IMAGES.ravel().tolist())
        for document in (request_of(), flat):
            async with client.post(INFER, json=document) as answer:
                found = await answer.json()
            assert answer.status == 200, found
            assert (found["id"], found["model_name"], found["model_version"]) == ("42", "nano", "1")
            output = found["outputs"][0]
            assert (output["name"], output["datatype"]) == ("detections", "FP32")
            check(np.array(output["data"], np.float32).reshape(output["shape"]))

    run_scenario(FakeBackend(), scenario)


@pytest.mark.parametrize("by_output", [True, False])
def test_a_binary_tensor_is_answered_in_binary_on_request(by_output: bool) -> None:
    document = request_of(data=None, parameters={"binary_data_size": IMAGES.size})
    if by_output:
        document["outputs"] = [{"name": "detections", "parameters": {"binary_data": True}}]
    else:
        document["parameters"] = {"binary_data_output": True}
    body, headers = binary(document, IMAGES.tobytes())

    async def scenario(client: Client) -> None:
        async with client.post("/v2/models/nano/versions/1/infer", data=body, headers=headers) as answer:
            data = await answer.read()
        assert answer.status == 200, data
        assert answer.content_type == "application/octet-stream"
        length = int(answer.headers["Inference-Header-Content-Length"])
        output = json.loads(data[:length])["outputs"][0]
        assert output["parameters"]["binary_data_size"] == len(data) - length
        check(np.frombuffer(data[length:], "<f4").reshape(output["shape"]))

    run_scenario(FakeBackend(), scenario)


def test_a_compressed_request_is_accepted() -> None:
    document = request_of(data=None, parameters={"binary_data_size": IMAGES.size})
    body, headers = binary(document, IMAGES.tobytes())

    async def scenario(client: Client) -> None:
        packed = {**headers, "Content-Encoding": "gzip"}
        async with client.post(INFER, data=gzip.compress(body), headers=packed) as answer:
            found = await answer.json()
        check(np.array(found["outputs"][0]["data"], np.float32).reshape(2, 5, 6))

    run_scenario(FakeBackend(), scenario)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"name": "image"}, "images"),
        ({"datatype": "FP32"}, "UINT8"),
        ({"shape": [2, 8, 16]}, "shape"),
        ({"shape": [5, 8, 16, 3]}, "1 to 4"),
        ({"shape": [0, 8, 16, 3]}, "1 to 4"),
        ({"shape": [True, 8, 16, 3]}, "1 to 4"),
        ({"shape": [2.0, 8, 16, 3]}, "1 to 4"),
        ({"shape": "2,8,16,3"}, "shape"),
        ({"data": [1, 2, 3]}, "768"),
        ({"data": None}, "768"),
        ({"data": [[1], [2, 3]]}, "768"),
        ({"data": [0.5] * 768}, "whole"),
        ({"data": [256] * 768}, "255"),
        ({"data": [-1] * 768}, "255"),
        ({"parameters": {"binary_data_size": 768}}, "not both"),
        ({"data": None, "parameters": {"binary_data_size": 768}}, "follow"),
        ({"data": None, "parameters": {"shared_memory_region": "x"}}, "shared memory"),
        ({"parameters": []}, "parameters"),
    ],
)
def test_an_input_that_does_not_fit_the_model_is_refused(changes: dict[str, Any], word: str) -> None:
    module = FakeBackend()

    async def scenario(client: Client) -> None:
        async with client.post(INFER, json=request_of(**changes)) as answer:
            status, text = await refused(answer)
            assert status == 400
            assert word in text

    run_scenario(module, scenario)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"inputs": []},
        {"inputs": [1]},
        {**request_of(), "id": 7},
        {**request_of(), "outputs": [{"name": "boxes"}]},
        {**request_of(), "outputs": {}} | {"outputs": 3},
        {**request_of(), "outputs": [{"name": "detections", "parameters": {"classification": 3}}]},
        {**request_of(), "outputs": [{"name": "detections", "parameters": {"binary_data": "yes"}}]},
    ],
)
def test_a_request_of_another_shape_is_refused(document: object) -> None:
    async def scenario(client: Client) -> None:
        async with client.post(INFER, json=document) as answer:
            assert (await refused(answer))[0] == 400

    run_scenario(FakeBackend(), scenario)


@pytest.mark.parametrize("length", ["-1", "x", "99999999", "", "9" * 5000, "0" * 5000])
def test_an_impossible_header_length_is_refused(length: str) -> None:
    async def scenario(client: Client) -> None:
        headers = {"Inference-Header-Content-Length": length}
        async with client.post(INFER, data=b"{}", headers=headers) as answer:
            assert (await refused(answer))[0] == 400

    run_scenario(FakeBackend(), scenario)


@pytest.mark.parametrize("body", [b"", b"no json", b"[" * 100_000, b"\xff\xfe"])
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    async def scenario(client: Client) -> None:
        async with client.post(INFER, data=body) as answer:
            assert (await refused(answer))[0] == 400

    run_scenario(FakeBackend(), scenario)


def test_unannounced_bytes_are_refused() -> None:
    body, headers = binary(request_of(), b"more")

    async def scenario(client: Client) -> None:
        async with client.post(INFER, data=body, headers=headers) as answer:
            assert (await refused(answer))[0] == 400

    run_scenario(FakeBackend(), scenario)


def test_a_body_larger_than_any_batch_is_refused_even_if_compressed() -> None:
    async def scenario(client: Client) -> None:
        async with client.post(INFER, data=io.BytesIO(bytes(4 * 2**20))) as answer:
            assert (await refused(answer))[0] == 413
        bomb = gzip.compress(bytes(64 * 2**20))
        async with client.post(INFER, data=bomb, headers={"Content-Encoding": "gzip"}) as answer:
            assert (await refused(answer))[0] == 413

    run_scenario(FakeBackend(), scenario)


def test_unknown_models_paths_methods_and_a_busy_engine_are_errors_of_the_protocol() -> None:
    module = FakeBackend()

    async def scenario(client: Client) -> None:
        for path in ("/v2/models/other", "/v2/models/nano/versions/2", "/v2/nothing"):
            async with client.get(path) as answer:
                assert (await refused(answer))[0] == 404
        async with client.get(INFER) as answer:
            assert (await refused(answer))[0] == 405
        module.busy = True
        async with client.post(INFER, json=request_of()) as answer:
            assert (await refused(answer))[0] == 503
            assert answer.headers["Retry-After"] == "7"
        module.facts = None
        async with client.get("/v2/models/nano") as answer:
            assert (await refused(answer))[0] == 503

    run_scenario(module, scenario)


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(request_of(data=[255] * 300_000)).encode(),
        b"[]," * 400_000,
        b"[]," * 150_000,
        b"{}," * 150_000,
        b"9" * (2**20 + 1),
        binary({**request_of(data=None), "more": "x" * 2**20}, b"")[0],
    ],
)
@pytest.mark.parametrize("announced", [True, False])
def test_a_large_json_part_is_refused_with_the_hint_to_send_binary_data(body: bytes, announced: bool) -> None:
    headers = {"Inference-Header-Content-Length": str(len(body))} if announced else {}

    async def scenario(client: Client) -> None:
        async with client.post(INFER, data=io.BytesIO(body), headers=headers) as answer:
            status, text = await refused(answer)
        assert status == 413
        assert "binary_data_size" in text

    run_scenario(FakeBackend(), scenario)


def test_a_wrong_datatype_is_named_even_where_the_body_is_too_large_because_of_it() -> None:
    """A float has four bytes and more digits, so such a body is above the limit."""
    json_part = json.dumps(request_of(datatype="FP32", data=[0.123456789] * 200_000)).encode()
    size = IMAGES.size * 4
    document = request_of(datatype="FP32", data=None, parameters={"binary_data_size": size})
    packed, headers = binary(document, bytes(2**22))

    async def scenario(client: Client) -> None:
        for body, more in ((json_part, {}), (packed, headers)):
            async with client.post(INFER, data=io.BytesIO(body), headers=more) as answer:
                status, text = await refused(answer)
            assert status == 400
            assert "UINT8" in text

    run_scenario(FakeBackend(), scenario)


def test_the_batch_limit_is_in_the_metadata_and_accepted() -> None:
    images = np.zeros((4, SPEC.height_px, SPEC.width_px, 3), np.uint8)

    async def scenario(client: Client) -> None:
        async with client.get("/v2/models/nano") as answer:
            most = (await answer.json())["parameters"]["max_batch_size"]
        for count, status in ((most, 200), (most + 1, 400)):
            shape = [count, *images.shape[1:]]
            document = request_of(shape=shape, data=[0] * int(np.prod(shape)))
            async with client.post(INFER, json=document) as answer:
                assert answer.status == status

    run_scenario(FakeBackend(), scenario)


@pytest.mark.parametrize(
    "data",
    [
        [[]] * 768,
        [True] * 768,
        ["1"] * 768,
        [[1, 2], 3],
        [{"0": 1}] * 768,
        "1" * 768,
        {"0": 1},
        [10**400] * 768,
        [[[[[1]]]]] * 768,
    ],
)
def test_values_that_are_not_bytes_are_refused(data: object) -> None:
    async def scenario(client: Client) -> None:
        async with client.post(INFER, json=request_of(data=data)) as answer:
            status, text = await refused(answer)
        assert status == 400
        assert "768 whole numbers from 0 to 255" in text

    run_scenario(FakeBackend(), scenario)


@pytest.mark.parametrize("value", [7, -1, "x" * 500_000, ["y"] * 100_000, 10**4000, None, True])
def test_a_wrong_size_is_refused_without_quoting_it(value: object) -> None:
    document = request_of(data=None)
    document["inputs"][0]["parameters"] = {"binary_data_size": value}

    async def scenario(client: Client) -> None:
        async with client.post(INFER, json=document) as answer:
            status, text = await refused(answer)
        assert status == 400
        assert len(text) < 200

    run_scenario(FakeBackend(), scenario)


def test_a_wait_for_a_missing_tensor_delays_no_other_client() -> None:
    async def scenario(client: Client) -> None:
        never = asyncio.Event()
        document = request_of(data=None, parameters={"binary_data_size": IMAGES.size})
        head, headers = binary(document, b"")

        async def stuck() -> AsyncIterator[bytes]:
            yield head
            await never.wait()

        waiting = asyncio.create_task(client.post(INFER, data=stuck(), headers=headers))
        async with client.get("/healthz") as answer:
            assert answer.status == 200
        waiting.cancel()
        await asyncio.wait([waiting])

    run_scenario(FakeBackend(), scenario)


def test_all_models_are_listed_and_each_answers_for_itself() -> None:
    module = FakeBackend()
    module.more_models = [ModelMetadata("helmet", "cd" * 32, SPEC, 5, 4, ("no", "yes"))]
    module.unready_models = {"helmet": "the engine is warming up"}
    listed = [
        {"name": "nano", "version": "1", "state": "READY", "reason": ""},
        {"name": "helmet", "version": "1", "state": "UNAVAILABLE", "reason": "the engine is warming up"},
    ]

    async def scenario(client: Client) -> None:
        async with client.get("/v2/models") as answer:
            assert await answer.json() == {"models": listed}
        async with client.post("/v2/repository/index") as answer:
            assert await answer.json() == listed
        for name, ready in (("nano", 200), ("helmet", 400), ("helmet.detect", 400)):
            async with client.get(f"/v2/models/{name}/ready") as answer:
                assert answer.status == ready
        for name in ("nano", "helmet", "helmet.detect"):
            async with client.post(f"/v2/models/{name}/infer", json=request_of()) as answer:
                assert (await answer.json())["model_name"] == name
        async with client.get("/v2/models/mega") as answer:
            status, text = await refused(answer)
        assert (status, text) == (404, "unknown model 'mega' version 1; loaded is 'nano', 'helmet' version 1")
        assert module.asked_models == ["nano", "helmet", "helmet"]

    run_scenario(module, scenario)
