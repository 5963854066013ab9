"""The two Dockerfiles, as text. tests/image/ has the tests of a built image."""

import fnmatch
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import distributions
from itertools import chain

import pytest
from packaging.requirements import Requirement

import visionedge
from build_image import dockerfile_licenses
from repository_paths import REPOSITORY
from sbom import license_of, normalize

VARIANTS = ["cpu", "gpu"]


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


def licenses(variant: str) -> str:
    """The SPDX expression of the image's label."""
    return dockerfile_licenses((REPOSITORY / f"Dockerfile.{variant}").read_text())


def terms_of(expression: str) -> set[str]:
    """The terms that an SPDX expression joins with AND, a choice in brackets as in the label."""
    return {f"({term})" if " OR " in term else term for term in expression.split(" AND ")}


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
    openvino = ["run-openvino.txt"] if variant == "cpu" else []
    locks = [f"run-{variant}.txt", "run-av.txt", *openvino]
    assert re.findall(r"run-\w+\.txt", text) == locks
    assert text.count("--require-hashes") == 1 + len(locks)
    copied = [arguments for name, arguments in final_stage(variant) if name == "COPY"]
    assert [text.split()[-2:] for text in copied] == [
        [f"/layers/{name}/", "/"] for name in ("user", "data", "locked", "bundled", "own")
    ]
    assert all(text.startswith("--from=builder ") for text in copied)
    assert "RUN" not in {name for name, _ in final_stage(variant)}, "a RUN's layer has the time of the build"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_labels_name_the_version_of_the_package_and_no_label_is_empty(variant: str) -> None:
    """`docker build` and the tools of IoT Edge pass no version."""
    arguments = dict(text.split("=", 1) for name, text in final_stage(variant) if name == "ARG")
    assert arguments["VERSION"] == visionedge.__version__
    (label,) = [text for name, text in final_stage(variant) if name == "LABEL"]
    labels = dict(word.split("=", 1) for word in shlex.split(label))
    names = ("title", "description", "licenses", "version", "revision")
    assert list(labels) == [f"org.opencontainers.image.{name}" for name in names]
    assert all(labels.values())


def test_the_licences_of_the_gpu_image_are_those_of_the_cpu_image_and_of_nvidia() -> None:
    terms = {variant: set(licenses(variant).split(" AND ")) for variant in VARIANTS}
    assert terms["gpu"] - terms["cpu"] == {
        "LicenseRef-NVIDIA-CUDA-Toolkit-EULA",
        "LicenseRef-NVIDIA-cuDNN",
    }
    assert "GPL-2.0-or-later" in terms["cpu"] <= terms["gpu"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_label_names_the_licence_of_every_locked_package_that_is_installed_here(variant: str) -> None:
    """The libraries inside the wheels are compared in the built image."""
    lines = (REPOSITORY / f"requirements/run-{variant}.txt").read_text().splitlines()
    locked = [Requirement(line.rstrip("\\ ")) for line in lines if re.match(r"\w", line)]
    names = {normalize(one.name) for one in locked if one.marker is None or one.marker.evaluate()}
    label = set(licenses(variant).split(" AND "))
    lacking = {
        one.name: license_of(one)
        for one in distributions()
        if normalize(one.name) in names and not terms_of(license_of(one)) <= label
    }
    assert lacking == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pyav_and_its_gpl_libraries_are_in_an_image_unless_it_is_built_without(variant: str) -> None:
    assert ("ARG", "WITH_PYAV=1") in instructions(variant)
    text = " ".join(arguments for name, arguments in instructions(variant) if name == "RUN")
    condition, _, rest = text.partition('if [ "${WITH_PYAV}" = 1 ]; then')[2].partition("fi")
    assert "run-av.txt" in condition
    assert "run-av.txt" not in rest


def test_openvino_and_the_driver_of_intel_are_in_the_cpu_image_only_if_it_is_built_with_them() -> None:
    """The driver goes into the layer of the locked packages: the default image has no further layer."""
    assert ("ARG", "WITH_OPENVINO=0") in instructions("cpu")
    text = " ".join(arguments for name, arguments in instructions("cpu") if name == "RUN")
    conditional = re.findall(r'if \[ "\$\{WITH_OPENVINO\}" = 1 \]; then(.+?)fi', text)
    assert ["run-openvino.txt" in conditional[0], "image_layer.sh intel" in conditional[1]] == [True, True]
    rest = text.replace(conditional[0], "").replace(conditional[1], "")
    assert "openvino.txt" not in rest
    assert "intel" not in rest
    assert "openvino" not in (REPOSITORY / "Dockerfile.gpu").read_text().lower()


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
