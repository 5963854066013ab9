"""A built image in hardened containers: what `make image-test` runs.

Each container has a read-only root, no capability, no new privileges, 64 MB of /dev/shm and the memory that
the module is said to need. VISIONEDGE_TEST_IMAGE names the image, DOCKER the client.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from visionedge.runtime.memory_requirement import CPU_MEMORY_MIB

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

DOCKER = os.environ.get("DOCKER") or "docker"
USER_ID = 10001
START_LIMIT_S = 300.0
"""A first start compiles the model and measures the machine, here with half a core."""
HARDENED = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp"),  # noqa: S108 - the container's own
    *("--memory", f"{CPU_MEMORY_MIB}m", "--memory-swap", f"{CPU_MEMORY_MIB}m", "--shm-size", "64m"),
    *("--init", "--network", "host", "--health-interval", "2s"),
)
_MIB = 2**20


def docker(*arguments: str, timeout_s: float = 120) -> str:
    """Run the Docker client; returns what it and the container print."""
    command = [DOCKER, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    assert ended.returncode == 0, f"{command}: {ended.stderr}"
    return (ended.stdout + ended.stderr).strip()


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def wait_until(condition: Callable[[], bool], container: "Container", limit_s: float = START_LIMIT_S) -> None:
    """Ask again until the condition holds; the container's log if it does not."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition never held\n{container.log}"
        threading.Event().wait(0.3)


HOG = """
import os, pathlib, re, signal

def kills():
    group = pathlib.Path("/sys/fs/cgroup")
    counters = [group / "memory.events", group / "memory/memory.oom_control"]
    return re.findall(r"oom_kill (\\d+)", "".join(path.read_text() for path in counters if path.exists()))

before, children = kills(), []
while kills() == before and len(children) < 10:
    reading, writing = os.pipe()
    if not (child := os.fork()):
        data = []
        while kills() == before and len(data) < 200:
            data.append(bytearray(b"x") * 2**20)
        os.write(writing, b"x")
        signal.pause()
    os.close(writing)
    children.append(child)
    os.read(reading, 1)
for child in children:
    os.kill(child, signal.SIGKILL)
print("killed" if kills() != before else "never")
"""
"""Takes 200 MiB in each of its processes, more than the module has, until the kernel kills a process."""


class Container:
    """A hardened container of the image; it is removed with its anonymous volumes."""

    def __init__(
        self, image: str, *options: str, config: Path | None = None, port: int | None = None
    ) -> None:
        self.port = port or free_port()
        address = "" if config and port else f"127.0.0.1:{self.port}"
        mounts = ["--volume", f"{config}:/config/vision.yaml:ro"] if config else []
        arguments = ["run", "--config", "/config/vision.yaml"] if config else []
        self.id = docker(
            *("run", "--detach", *HARDENED, *options, *mounts),
            *("--env", f"VISIONEDGE_HTTP={address}", image, *arguments),
        ).splitlines()[0]

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        docker("rm", "--force", "--volumes", self.id)

    @property
    def log(self) -> str:
        """What the module printed."""
        return docker("logs", self.id)

    def state(self) -> dict[str, Any]:
        """Docker's own record: Running, ExitCode, OOMKilled, Health."""
        found: dict[str, Any] = json.loads(docker("inspect", "--format", "{{json .State}}", self.id))
        return found

    def run_inside(self, *command: str) -> str:
        """What a command in the container prints."""
        return docker("exec", self.id, *command)

    def get(self, path: str) -> tuple[int, Any]:
        """Status code and document at a path; 0 without an answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                body = answer.read()
                return answer.status, json.loads(body) if body else None
        except urllib.error.HTTPError as error:
            with error:
                return error.code, None
        except (OSError, ValueError):
            return 0, None

    def wait_ready(self) -> None:
        """Until it computes; at once an error if it ended."""

        def is_ready() -> bool:
            assert self.state()["Running"], self.log
            return self.get("/readyz")[0] == 200

        wait_until(is_ready, self)

    def frames_analysed(self) -> dict[str, int]:
        """By camera."""
        cameras = (self.get("/api/v1/cameras")[1] or {}).get("cameras", ())
        return {camera["name"]: camera["framesAnalysed"] for camera in cameras}

    def wait_frames(self, cameras: int) -> None:
        """Until as many cameras have analysed frames."""
        wait_until(lambda: sum(count > 0 for count in self.frames_analysed().values()) == cameras, self)


def memory_mib(container: Container) -> tuple[float, float]:
    """(memory of the processes now, highest use of the control group with the cache of files), in MiB."""
    script = (
        "cd /sys/fs/cgroup; if [ -e memory.peak ]; then cat memory.peak memory.stat; "
        "else cat memory/memory.max_usage_in_bytes memory/memory.stat; fi"
    )
    peak, *lines = container.run_inside("sh", "-c", script).splitlines()
    found = dict(line.split() for line in lines)
    own = int(found.get("rss", found.get("anon", 0))) + int(found["shmem"])
    return own / _MIB, int(peak) / _MIB


@pytest.fixture(scope="module")
def image() -> str:
    """The image under test."""
    name = os.environ.get("VISIONEDGE_TEST_IMAGE")
    if not name or shutil.which(DOCKER) is None:
        pytest.skip(
            "set VISIONEDGE_TEST_IMAGE to a built image, with a Docker engine at hand (make image-test)"
        )
    return name


@pytest.fixture(scope="module")
def settings(image: str) -> dict[str, Any]:
    """The image's configuration: Env, Labels."""
    found: dict[str, Any] = json.loads(docker("inspect", "--format", "{{json .Config}}", image))
    return found


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder for configurations, readable by the image's user."""
    with tempfile.TemporaryDirectory(prefix="visionedge-image-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def four_cameras(folder: Path) -> Path:
    """The bundled clip as four cameras, nothing else set."""
    path = folder / "four.yaml"
    path.write_text("cameras:\n" + "".join(f"  c{number}: {{uri: 'demo:'}}\n" for number in range(4)))
    return path


@pytest.fixture(scope="module")
def volume(image: str) -> Iterator[str]:
    """A volume with what the first container of this file compiled and measured."""
    name = docker("volume", "create", "--label", f"image={image}")
    yield name
    docker("volume", "rm", "--force", name)


@pytest.fixture
def container(image: str, volume: str, one_camera: Path) -> Iterator[Container]:
    """A ready module with one camera, and a warm /data."""
    with Container(image, "--volume", f"{volume}:/data", config=one_camera) as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def one_camera(folder: Path) -> Path:
    """The bundled clip in full precision, which a first start finds faster."""
    path = folder / "one.yaml"
    path.write_text("inference: {precision: fp32}\ncameras:\n  c0: {uri: 'demo:', fps: 5}\n")
    return path


def test_four_cameras_on_half_a_core_stay_below_the_required_memory(
    image: str, volume: str, four_cameras: Path
) -> None:
    """A first start, with the search for a plan and a precision, is the highest use."""
    with Container(image, "--cpus", "0.5", "--volume", f"{volume}:/data", config=four_cameras) as started:
        own: list[float] = []

        def has_frames() -> bool:
            assert started.state()["Running"], started.log
            own.append(memory_mib(started)[0])
            return sum(count > 0 for count in started.frames_analysed().values()) == 4

        began = time.monotonic()
        wait_until(has_frames, started)
        took_s = time.monotonic() - began
        used, peak = memory_mib(started)
        with_cache = f"{peak:.0f} MiB with the cache of files"
        print(f"\n4 cameras, 0.5 CPU, limit {CPU_MEMORY_MIB} MiB: first frames of all after {took_s:.0f} s;")
        print(f"processes {max(own):.0f} MiB at most, {used:.0f} MiB at the end; {with_cache}")
        assert max(own) < 0.8 * CPU_MEMORY_MIB, "the required memory leaves too little for peaks"
        assert not started.state()["OOMKilled"]
        assert started.get("/api/v1/status")[1]["cameras"]


def test_the_module_has_no_right_that_it_does_not_need(container: Container) -> None:
    status = container.run_inside("sh", "-c", "cat /proc/[0-9]*/status")
    fields = set(re.findall(r"^(Uid|Cap(?:Prm|Eff|Bnd|Amb)|NoNewPrivs):\s+(\w+)", status, re.MULTILINE))
    none = {(f"Cap{kind}", "0" * 16) for kind in ("Prm", "Eff", "Bnd", "Amb")}
    assert fields == none | {("Uid", str(USER_ID)), ("NoNewPrivs", "1")}
    assert (
        container.run_inside("sh", "-c", "touch /opt/visionedge/x 2>/dev/null || echo refused") == "refused"
    )


def test_a_stop_ends_the_module_in_order_within_ten_seconds(container: Container) -> None:
    """Docker would kill it after ten seconds: exit code 137."""
    docker("stop", "--time", "10", container.id)
    assert container.state()["ExitCode"] == 0, container.log


def test_the_health_check_follows_a_moved_port(image: str, volume: str, folder: Path) -> None:
    first, second = free_port(), free_port()
    config = folder / "port.yaml"
    text = "http: {{host: 127.0.0.1, port: {port}}}\ncameras: {{c0: {{uri: 'demo:', fps: 1}}}}\n"
    config.write_text(text.format(port=first))
    with Container(image, "--volume", f"{volume}:/data", config=config, port=first) as started:
        started.wait_ready()
        wait_until(lambda: started.state()["Health"]["Status"] == "healthy", started)
        config.write_text(text.format(port=second))
        docker("kill", "--signal", "HUP", started.id)
        started.port = second
        wait_until(lambda: started.get("/readyz")[0] == 200, started)
        started.run_inside("python", "-P", "-m", "visionedge.runtime.health_check")
        assert started.state()["Health"]["Status"] == "healthy"


def test_numbers_continue_after_kill_9_and_a_restart(container: Container) -> None:
    container.wait_frames(1)
    before = container.get("/api/v1/cameras/c0/frame")[1]["sequence"]
    docker("kill", "--signal", "KILL", container.id)
    assert container.state()["ExitCode"] == 137
    docker("start", container.id)
    container.wait_ready()
    container.wait_frames(1)
    assert container.get("/api/v1/cameras/c0/frame")[1]["sequence"] > before


def test_the_module_survives_when_its_memory_runs_out(container: Container) -> None:
    """The engine's process is killed first and replaced; the module itself goes on."""
    container.wait_frames(1)
    began = container.state()["StartedAt"]
    assert container.run_inside("python", "-c", HOG).endswith("killed")
    container.wait_ready()
    analysed = container.frames_analysed()["c0"]
    wait_until(lambda: container.frames_analysed().get("c0", 0) > analysed, container)
    assert container.state()["StartedAt"] == began
    assert "died of signal 9" in container.log, container.log


def test_a_data_folder_of_another_owner_degrades_to_memory(image: str, one_camera: Path) -> None:
    """As with a bind mount that nobody prepared."""
    with Container(image, "--tmpfs", "/data:uid=0,gid=0,mode=0700", config=one_camera) as started:
        started.wait_ready()
        started.wait_frames(1)
        assert f"chown {USER_ID}:{USER_ID}" in started.log


def test_a_full_disk_does_not_stop_the_module(image: str, one_camera: Path) -> None:
    """A /data of 1 MB is too small for the compiled model, and then another program fills it."""
    owner = f"uid={USER_ID},gid={USER_ID},mode=0750"
    with Container(image, "--tmpfs", f"/data:size=1m,{owner}", config=one_camera) as started:
        started.wait_ready()
        started.run_inside("sh", "-c", "dd if=/dev/zero of=/data/filler bs=4096 2>/dev/null; true")
        analysed = started.frames_analysed()["c0"]
        wait_until(lambda: started.frames_analysed()["c0"] > analysed + 10, started)
        assert started.get("/healthz")[0] == 200
        docker("stop", "--time", "10", started.id)
        assert started.state()["ExitCode"] == 0, started.log


def test_the_gpu_image_without_a_gpu_computes_on_the_cpu_and_says_why(
    settings: dict[str, Any], container: Container
) -> None:
    if not any(name.startswith("NVIDIA_VISIBLE_DEVICES=") for name in settings["Env"]):
        pytest.skip("the image under test is the CPU image")
    engine = container.get("/api/v1/status")[1]["engine"]
    assert (engine["requested"], engine["effective"]) == ("auto", "cpu")
    assert engine["reasonCode"] == "driver-missing"
    assert "libcuda.so.1" in engine["reason"]


def test_the_sbom_in_the_image_lists_what_the_label_names(image: str, settings: dict[str, Any]) -> None:
    """Every licence of a component stands in the label, and the other way round."""
    labels = settings["Labels"]
    prefix = "org.opencontainers.image"
    assert {
        f"{prefix}.{name}" for name in ("title", "description", "version", "revision", "licenses")
    } <= set(labels)
    assert all(labels.values())
    sbom = json.loads(
        docker(
            "run",
            "--rm",
            "--network",
            "none",
            "--entrypoint",
            "cat",
            image,
            "/opt/visionedge/share/sbom.cdx.json",
        )
    )
    terms: set[str] = set()
    todo = list(sbom["components"])
    while todo:
        component = todo.pop()
        todo += component.get("components", ())
        for one in component.get("licenses", ()):
            parts = one["expression"].split(" AND ")
            terms |= {f"({part})" if " OR " in part else part for part in parts}
    assert set(labels[f"{prefix}.licenses"].split(" AND ")) == terms
    assert sbom["metadata"]["component"]["version"] == labels[f"{prefix}.version"]
