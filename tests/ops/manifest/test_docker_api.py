"""The table of Docker's types: what lint says of createOptions, and that a real engine agrees."""

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from visionedge.ops.manifest.docker_api import _OBJECTS, read_docker_options
from visionedge.ops.manifest.document import LintFindings, parse_json

SAMPLES: dict[str, Any] = {
    "string": "a",
    "integer": 1,
    "boolean": True,
    "command": ["a"],
    "object": {},
}
"""A value of each scalar type."""

NOT_IN_ALL_VERSIONS = (
    *("Platform", "k8s-experimental", "k8s-extensions", "DiskQuota", "InitPath", "Annotations"),
    *(
        "StartInterval",
        "NoWait",
        "ImageOptions",
        "ClusterOptions",
        "CreateMountpoint",
        "ReadOnlyNonRecursive",
    ),
    *("ReadOnlyForceRecursive", "Subpath"),
)
"""Keys that only edgeAgent or later versions than Docker 20.10 know; another engine ignores them."""

# Lengths and forms that Docker checks as it reads them.
FORMS: dict[str, Any] = {
    "ConsoleSize": [1, 1],
    "ExposedPorts": {"80/tcp": {}},
    "PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "80"}]},
}


def sample(kind: str) -> Any:
    """A valid value of a type."""
    plain = kind.removeprefix("~")
    if plain.endswith("[]"):
        return [sample(plain[:-2])]
    if plain.endswith("{}"):
        return {"a": sample(plain[:-2])}
    return (
        SAMPLES[plain] if plain in SAMPLES else {key: sample(below) for key, below in _OBJECTS[plain].items()}
    )


def wrong(kind: str) -> Any:
    """A value that is of another type, and that edgeAgent does not convert."""
    plain = kind.removeprefix("~")
    return 5 if plain.endswith(("[]", "{}")) or plain in (*_OBJECTS, "object", "command") else [{"a": {}}]


def place(holder: str, key: str, value: Any) -> dict[str, Any]:
    """createOptions with one value at a key of an object of the table."""
    inner = {key: value}
    if holder == "Container":
        return inner
    for outer, keys in _OBJECTS.items():
        for name, kind in keys.items():
            plain = kind.removeprefix("~")
            if plain.rstrip("[]{}") == holder:
                wrapped: Any = [inner] if "[]" in plain else inner
                return place(outer, name, {"80/tcp": wrapped} if plain.endswith("{}") else wrapped)
    raise AssertionError(f"{holder} belongs nowhere")


def findings(options: dict[str, Any]) -> list[str]:
    """What lint says of createOptions."""
    found = LintFindings()
    read_docker_options(parse_json(json.dumps(options)), found)
    return [finding.line() for finding in found.all()]


KEYS = [(holder, key, kind) for holder, keys in _OBJECTS.items() for key, kind in keys.items()]
IDS = [f"{holder}.{key}" for holder, key, _ in KEYS]


@pytest.mark.parametrize(("holder", "key", "kind"), KEYS, ids=IDS)
def test_a_value_of_the_type_is_accepted_and_another_is_an_error(holder: str, key: str, kind: str) -> None:
    """In any case of the key, and null leaves the default."""
    assert findings(place(holder, key, sample(kind))) == []
    assert findings(place(holder, key.swapcase(), sample(kind))) == []
    assert findings(place(holder, key, None)) == []
    (line,) = findings(place(holder, key, wrong(kind)))
    assert line.startswith("error: ")
    assert key in line


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"HostConfig": {"Memory": "1073741824"}}, True),
        ({"HostConfig": {"Memory": 1073741824.0}}, True),
        ({"HostConfig": {"Memory": "1g"}}, False),
        ({"HostConfig": {"Memory": True}}, False),
        ({"HostConfig": {"Memory": 0.5}}, False),
        ({"HostConfig": {"Privileged": "True"}}, True),
        ({"HostConfig": {"Privileged": "yes"}}, False),
        ({"HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": 80}]}}}, True),
        ({"HostConfig": {"LogConfig": {"Config": {"max-file": 3}}}}, True),
        ({"HostConfig": {"DeviceRequests": [{"Count": "-1"}]}}, False),
        ({"StopTimeout": "10"}, False),
        ({"Tty": "true"}, False),
        ({"User": 0}, False),
    ],
)
def test_only_what_edge_agent_reads_itself_is_converted(options: dict[str, Any], accepted: bool) -> None:
    """It hands other keys to Docker as they are, and Docker converts nothing."""
    assert (findings(options) == []) == accepted


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


@pytest.fixture(scope="module")
def engine() -> str:
    """The socket of a Docker engine."""
    path = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    if not Path(path).is_socket():
        pytest.skip("there is no Docker engine")
    return path


def is_refused(engine: str, options: dict[str, Any]) -> bool:
    """Whether the engine cannot read createOptions. The image does not exist, but it reads them first."""
    connection = UnixConnection(engine)
    body = json.dumps({"Image": "localhost/no-such-image", **options})
    connection.request("POST", "/v1.41/containers/create", body, {"Content-Type": "application/json"})
    answer = connection.getresponse().read().decode()
    connection.close()
    return any(word in answer for word in ("cannot unmarshal", "invalid character", "json:"))


@pytest.mark.docker
def test_a_real_engine_reads_the_same_types(engine: str) -> None:
    """It refuses the wrong ones as it reads them, and gets as far as the image with the right ones."""
    for holder, key, kind in KEYS:
        right = place(holder, key, FORMS.get(key, sample(kind)))
        assert not is_refused(engine, right), right
        if key not in NOT_IN_ALL_VERSIONS and (holder, key) != ("TmpfsOptions", "Options"):
            assert is_refused(engine, place(holder, key, wrong(kind))), (holder, key)
