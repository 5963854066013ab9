"""The two Dockerfiles, and, with a Docker engine, a running container.

Building takes minutes and a registry, so it is not done here: `make image`, then
`VISIONEDGE_TEST_IMAGE=visionedge:cpu make test ARGS="-m docker"`.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain

import pytest

from repository_paths import REPOSITORY

VARIANTS = ["cpu", "gpu"]
TIME_LIMIT_S = 120.0


def instructions(variant: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, (name, arguments), comments gone and lines joined."""
    text = (REPOSITORY / f"Dockerfile.{variant}").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(name, arguments) for name, arguments in pairs]


def final_stage(variant: str) -> list[tuple[str, str]]:
    """The instructions from the last FROM on."""
    listed = instructions(variant)
    last = max(index for index, (name, _) in enumerate(listed) if name == "FROM")
    return listed[last:]


def environment(variant: str) -> dict[str, str]:
    """The variables that the final stage sets with ENV."""
    words = [word for name, text in final_stage(variant) if name == "ENV" for word in shlex.split(text)]
    return dict(word.split("=", 1) for word in words)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_frontend_is_fetched_and_every_stage_uses_the_base_argument(variant: str) -> None:
    assert "syntax=" not in (REPOSITORY / f"Dockerfile.{variant}").read_text()
    stages = [text for name, text in instructions(variant) if name == "FROM"]
    assert stages == ["${BASE_IMAGE} AS builder", "${BASE_IMAGE}"]
    assert instructions(variant)[0] == ("ARG", "BASE_IMAGE=python:3.12-slim-bookworm")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_module_runs_as_an_unprivileged_user(variant: str) -> None:
    users = [text for name, text in final_stage(variant) if name == "USER"]
    assert users == ["10001:10001"]
    after = final_stage(variant)[[name for name, _ in final_stage(variant)].index("USER") :]
    assert "RUN" not in {name for name, _ in after}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_installs_its_own_lock_with_hashes_and_copies_only_the_result(variant: str) -> None:
    text = " ".join(arguments for name, arguments in instructions(variant) if name == "RUN")
    assert re.findall(r"run-\w+\.txt", text) == [f"run-{variant}.txt", "run-av.txt"]
    assert text.count("--require-hashes") == 3
    copied = [arguments for name, arguments in final_stage(variant) if name == "COPY"]
    assert copied == ["--from=builder /opt/visionedge /opt/visionedge"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pyav_and_its_gpl_libraries_are_in_an_image_unless_it_is_built_without(variant: str) -> None:
    assert ("ARG", "WITH_PYAV=1") in instructions(variant)
    text = " ".join(arguments for name, arguments in instructions(variant) if name == "RUN")
    condition, _, rest = text.partition('if [ "${WITH_PYAV}" = 1 ]; then')[2].partition("fi")
    assert "run-av.txt" in condition
    assert "run-av.txt" not in rest


@pytest.mark.parametrize("variant", VARIANTS)
def test_telemetry_is_off_and_state_and_address_are_set(variant: str) -> None:
    found = environment(variant)
    assert found["ORT_DISABLE_TELEMETRY"] == "1"
    assert found["VISIONEDGE_DATA"] == found["HOME"] == "/data"
    assert found["VISIONEDGE_HTTP"] == "0.0.0.0:8080"
    assert ("VOLUME", '["/data"]') in final_stage(variant)


def test_only_the_gpu_image_requests_the_driver_and_neither_requires_a_cuda_version() -> None:
    assert environment("gpu")["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility,video"
    assert not [name for name in environment("cpu") if name.startswith("NVIDIA")]
    assert "NVIDIA_REQUIRE_CUDA" not in environment("gpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_build_context_contains_only_what_is_copied(variant: str) -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    copies = [text for name, text in instructions(variant) if name == "COPY" and "--from" not in text]
    for source in chain.from_iterable(text.split()[:-1] for text in copies):
        name = source.replace("[t]", "t")  # a pattern, as there may be no .git
        assert (REPOSITORY / name).exists() or name != source
        assert any(fnmatch.fnmatch(name, rule) or rule.startswith(f"{name}/") for rule in allowed), source
    assert lines[1] == "*"


class _Health(BaseHTTPRequestHandler):
    """Answers /healthz with the code that the server was given."""

    def do_GET(self) -> None:
        assert isinstance(self.server, _HealthServer)
        self.send_response(self.server.code if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Log nothing."""


class _HealthServer(HTTPServer):
    code = 200


@pytest.fixture
def health_server() -> Iterator[_HealthServer]:
    """A server on loopback with a settable health."""
    with _HealthServer(("127.0.0.1", 0), _Health) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("code", "healthy"), [(200, True), (503, False)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_health_check_follows_healthz(
    health_server: _HealthServer, variant: str, code: int, healthy: bool
) -> None:
    health_server.code = code
    (check,) = [text for name, text in final_stage(variant) if name == "HEALTHCHECK"]
    _, *arguments = json.loads(check.partition("CMD ")[2])
    port = health_server.server_address[1]
    # A proxy in the environment must not get in the way of loopback.
    surroundings = {"VISIONEDGE_HTTP": f"0.0.0.0:{port}", "http_proxy": "http://127.0.0.1:9"}
    surroundings["PYTHONPATH"] = str(REPOSITORY / "module")
    ended = subprocess.run(
        [sys.executable, *arguments], env=surroundings, capture_output=True, check=False, timeout=20
    )
    assert (ended.returncode == 0) is healthy


def docker(*arguments: str) -> str:
    """Run the Docker client; returns its output, with the container's stderr."""
    ended = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=60)
    return (ended.stdout + ended.stderr).strip()


def answered(address: str) -> int:
    """The status code of a GET, 0 without an answer."""
    try:
        with urllib.request.urlopen(address, timeout=5) as response:  # noqa: S310 - loopback only
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)
    except OSError:
        return 0


@pytest.fixture
def container() -> Iterator[tuple[str, int]]:
    """The image under test, running with no right it can do without: (container id, HTTP port)."""
    image = os.environ.get("VISIONEDGE_TEST_IMAGE")
    if not image or shutil.which("docker") is None:
        pytest.skip("set VISIONEDGE_TEST_IMAGE to a built image, with a Docker engine at hand")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bounds = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp"]  # noqa: S108
    address = ["--network", "host", "--env", f"VISIONEDGE_HTTP=127.0.0.1:{port}"]
    identifier = docker("run", "--detach", *bounds, *address, image)
    yield identifier, port
    docker("rm", "--force", "--volumes", identifier)


@pytest.mark.docker
def test_an_unprivileged_container_becomes_ready_and_ends_in_order(container: tuple[str, int]) -> None:
    identifier, port = container
    deadline = time.monotonic() + TIME_LIMIT_S
    while answered(f"http://127.0.0.1:{port}/readyz") != 200:
        running = docker("inspect", "--format", "{{.State.Running}}", identifier) == "true"
        assert running, docker("logs", identifier)
        assert time.monotonic() < deadline, "not ready in time"
        threading.Event().wait(0.2)
    assert answered(f"http://127.0.0.1:{port}/healthz") == 200
    assert docker("exec", identifier, "id", "-u") == "10001"
    docker("stop", "--time", "10", identifier)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", identifier) == "0", docker("logs", identifier)
