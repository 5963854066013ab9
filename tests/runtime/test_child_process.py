"""Child processes: their environment and their working directory."""

import ast
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import visionedge
from tiny_models import TinyDetector
from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.devices import PROVIDERS, run_probe
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.errors import ModelError
from visionedge.model.compiler.trial_run import run_trial
from visionedge.model.model import load_model
from visionedge.ops.bench.http import run_module
from visionedge.ops.doctor.host import run_probe_child
from visionedge.ops.models.inspect import _probe_placement
from visionedge.runtime import child_process

PACKAGE = Path(visionedge.__file__).parent
BAIT = "b4it-0f-a-secret"
SECRETS = {
    "VISIONEDGE_HTTP_TOKEN": BAIT,
    "VISIONEDGE_MQTT_PASSWORD": BAIT,
    "VISIONEDGE_BLOB_SAS": f"sv=1&sig={BAIT}",
    "VISIONEDGE_WEBHOOK_SECRET": BAIT,
    "EdgeHubConnectionString": f"HostName=h;SharedAccessKey={BAIT}",
    "IOTEDGE_WORKLOADURI": f"unix:///{BAIT}",
    "HTTPS_PROXY": f"http://me:{BAIT}@192.0.2.9:3128",
    "http_proxy": f"http://me:{BAIT}@192.0.2.9:3128",
    "NVIDIA_API_KEY": BAIT,
    "CUDA_TOKEN": BAIT,
    "AWS_SECRET_ACCESS_KEY": BAIT,
    "DOCK_PASSWORD": BAIT,
}


class RecordingPython:
    """Python, with a note of each process that is started: its environment and its command line."""

    def __init__(self, folder: Path) -> None:
        self._notes = folder / "notes"
        self._notes.mkdir()
        self.path = folder / "python-with-a-witness"
        note = f'cat /proc/$$/environ > "{self._notes}/$$.environ"\n'
        note += f'printf \'%s\\0\' "$@" > "{self._notes}/$$.words"\n'
        self.path.write_text(f'#!/bin/sh\n{note}exec "{sys.executable}" "$@"\n')
        self.path.chmod(0o755)

    def environments(self) -> list[dict[str, str]]:
        """Of each child."""
        texts = [path.read_text() for path in self._notes.glob("*.environ")]
        return [
            {name: value for name, _, value in (pair.partition("=") for pair in text.split("\0"))}
            for text in texts
        ]

    def commands(self) -> list[list[str]]:
        """Of each child, without the program."""
        return [path.read_text().split("\0")[:-1] for path in self._notes.glob("*.words")]


@pytest.fixture
def recording_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordingPython:
    """Every child is recorded; this process has many secrets, and its working directory has traps."""
    made = RecordingPython(tmp_path)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "relative"]))
    monkeypatch.delenv("VISIONEDGE_CONFIG", raising=False)
    monkeypatch.setattr(sys, "executable", str(made.path))
    trap = tmp_path / "standing-here"
    (trap / "visionedge").mkdir(parents=True)
    for name in ("json.py", "numpy.py", "sitecustomize.py", "visionedge/__init__.py"):
        (trap / name).write_text("import os\nos._exit(77)\n")
    monkeypatch.chdir(trap)
    return made


def _engine(folder: Path) -> None:
    model = load_model(TinyDetector().save(folder / "tiny.onnx"))
    frame_pool = SharedFramePool(model.input, 2)
    engine = EngineClient(model, InferenceConfig(device="cpu"), frame_pool)
    try:
        engine.open()
    finally:
        engine.close()
        frame_pool.close()


def _probe(_folder: Path) -> None:
    assert run_probe(PROVIDERS["cpu"], 60).exit_code == 0


def _first_run(_folder: Path) -> None:
    with pytest.raises(ModelError):
        run_trial(b"no graph", 1, None, [], declared=False)


def _questions(folder: Path) -> None:
    path = TinyDetector().save(folder / "tiny.onnx")
    assert run_probe_child("clock", {}, 30).ended == "fine"
    assert run_probe_child("placement", {"device": "cpu", "model": str(path)}, 60).ended == "fine"


def _inspection(folder: Path) -> None:
    path = TinyDetector().save(folder / "tiny.onnx")
    assert "did not start" not in json.dumps(_probe_placement(path, "cpu"))


def _module(_folder: Path) -> None:
    with run_module(1, ["--device", "cpu"]) as (url, _pid):
        assert url.startswith("http://127.0.0.1:")


KINDS = [_engine, _probe, _first_run, _questions, _inspection, _module]


@pytest.mark.parametrize("start", KINDS, ids=lambda kind: kind.__name__.strip("_"))
def test_a_child_gets_no_secret_and_imports_nothing_from_its_working_directory(
    recording_python: RecordingPython, tmp_path: Path, start: Callable[[Path], None]
) -> None:
    """For every kind of child, and each process that is really started."""
    start(tmp_path)
    environments, commands = recording_python.environments(), recording_python.commands()
    assert environments
    for environ in environments:
        assert [name for name, value in environ.items() if BAIT in name + value] == []
        assert environ["PYTHONPATH"] == str(PACKAGE.parent)
        assert environ["PATH"] == os.environ["PATH"]
    for words in commands:
        assert words[0] in ("-P", "-I")
        assert BAIT not in " ".join(words)


def test_processes_are_started_only_by_this_module() -> None:
    """A child that is started elsewhere would have the whole environment."""
    ways = {"Popen", "run", "call", "check_call", "check_output", "system", "popen", "fork", "posix_spawn"}
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(ast.Name("subprocess" | "os"), name)) if name in ways:
                    found.append(path.name)
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                )
                assert not any(name.startswith("multiprocessing") for name in names), path
    assert set(found) == {"child_process.py"}


def test_a_child_gets_only_listed_environment_variables() -> None:
    """Variables of libraries and the locale are passed on, unless they are named like a secret."""
    needed = {
        "PATH": "/bin",
        "HOME": "/srv/app",
        "TZ": "UTC",
        "LC_ALL": "C",
        "LD_LIBRARY_PATH": "/lib",
        "CUDA_VISIBLE_DEVICES": "0",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "OMP_NUM_THREADS": "2",
        "OPENCV_LOG_LEVEL": "ERROR",
        "VISIONEDGE_DATA": "/data",
        "XDG_CACHE_HOME": "/cache",
    }
    made = child_process.build_child_environment({**needed, **SECRETS, "OTHER": "x"})
    assert {name: value for name, value in made.items() if name in needed} == needed
    assert set(made) - set(needed) == {"PYTHONPATH", "ORT_DISABLE_TELEMETRY"}


@pytest.mark.parametrize(("variable", "kept"), [("", False), ("0", False), ("1", True)])
def test_a_crash_leaves_no_memory_in_a_file(variable: str, kept: bool) -> None:
    """Neither by the module nor by its children; a variable allows it for debugging."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    body = (
        "import resource, visionedge.__main__ as m\n"
        f"resource.setrlimit(resource.RLIMIT_CORE, ({hard}, {hard}))\n"
        "try:\n m.main(['token-that-is-no-verb'])\nexcept SystemExit:\n pass\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    environ = {
        **child_process.build_child_environment(os.environ),
        child_process.CORE_DUMPS_VARIABLE: variable,
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", body],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    assert int(done.stdout) == (hard if kept else 0)
