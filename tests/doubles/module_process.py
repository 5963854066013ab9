"""The whole module: `visionedge run` in a process, observed over HTTP and its log."""

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_ROOT = Path(__file__).resolve().parents[2]
_READY = re.compile(r"ready: open (http://\S+/)")
_CACHE_FOLDER = tempfile.TemporaryDirectory(prefix="visionedge-tests-")
"""Compiled graphs and plans of earlier runs; each file name belongs to one model."""

atexit.register(_CACHE_FOLDER.cleanup)


def _copy(source: Path, target: Path) -> None:
    """Copy the compiled graphs and plans that the target lacks."""
    for kept in (*source.glob("compiled/*.graph"), *source.glob("plans/*.json")):
        copy = target / kept.relative_to(source)
        if not copy.exists():
            copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copy(kept, copy)


class ModuleProcess:
    """``with ModuleProcess(data, "--camera", "dock=…") as module: …``; killed if a test leaves it running.

    Without a ``--config`` it computes in fp32, as finding the fastest engine takes seconds more. Unless
    `cold`, its data folder already has the compiled graphs and plans of earlier runs. `program`: what runs
    instead of today's module, with its first words (see `next_version`).
    """

    def __init__(
        self,
        data: Path,
        *arguments: str,
        environ: dict[str, str] | None = None,
        cold: bool = False,
        program: Sequence[str] = ("visionedge",),
    ) -> None:
        self._data = data
        if not cold:
            _copy(Path(_CACHE_FOLDER.name), data)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("IOTEDGE_", "VISIONEDGE_"))}
        plain = data.with_suffix(".fp32.json")
        document: dict[str, Any] = {"inference": {"precision": "fp32", "runtime": "onnxruntime"}}
        inside = any(name.startswith("IOTEDGE_") for name in environ or {})
        if not inside and not {"--camera", "--config"} & set(arguments):
            document["cameras"] = {"demo": {"uri": "demo:"}}  # as `run` does by itself without a file
        plain.write_text(json.dumps(document), encoding="utf-8")
        path = os.pathsep.join(str(_ROOT / folder) for folder in ("module", "tests/doubles"))
        folders = {"PYTHONPATH": path, "VISIONEDGE_DATA": str(data)}
        extra = {**folders, "VISIONEDGE_CONFIG": str(plain), **(environ or {})}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *program, "run", "--http", "127.0.0.1:0", *arguments],
            env={**clean, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._log: list[str] = []
        self._log_changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="module-log")
        self._reader.start()

    def __enter__(self) -> "ModuleProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._process.stdout.close()
        self._process.stderr.close()
        _copy(self._data, Path(_CACHE_FOLDER.name))

    @property
    def log(self) -> str:
        """All of stderr so far."""
        with self._log_changed:
            return "\n".join(self._log)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def ready(self, timeout_s: float = 60) -> str:
        """Wait until it is ready; returns the address of its page."""
        return self.wait_for_log(_READY, timeout_s)[1]

    def wait_for_log(self, pattern: re.Pattern[str], timeout_s: float = 30) -> re.Match[str]:
        """Wait for a log line that matches."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found.extend(m for line in self._log if (m := pattern.search(line)))
            return bool(found) or self._process.poll() is not None

        with self._log_changed:
            self._log_changed.wait_for(look, timeout_s)
            assert found, "\n".join(self._log)
        return found[0]

    def get(self, path: str) -> Any:
        """The JSON document at a path, whatever its status."""
        try:
            with urllib.request.urlopen(self.ready().rstrip("/") + path, timeout=15) as answer:  # noqa: S310 - http, by ready()
                body = answer.read()
                return json.loads(body) if body else None  # 204: nothing newer
        except urllib.error.HTTPError as error:
            with error:
                return json.loads(error.read())

    def raw(self, path: str) -> bytes:
        """The bytes at a path."""
        with urllib.request.urlopen(self.ready().rstrip("/") + path, timeout=15) as answer:  # noqa: S310 - http, by ready()
            return bytes(answer.read())

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples with this name and at least these labels; inside IoT Edge there are more."""
        families = text_string_to_metric_families(self.raw("/metrics").decode())
        samples = (sample for family in families for sample in family.samples)
        found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"no sample of {name} with {labels}"
        return sum(found)

    def cameras(self) -> dict[str, dict[str, Any]]:
        """The camera objects by name."""
        return {camera["name"]: camera for camera in self.get("/api/v1/cameras")["cameras"]}

    def until(self, condition: Callable[[dict[str, dict[str, Any]]], bool], timeout_s: float = 60) -> None:
        """Request the cameras at each new frame until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            cameras = self.cameras()
            if condition(cameras):
                return
            moving = max(cameras.values(), key=lambda camera: camera["fps"])
            frame = self.get(
                f"/api/v1/cameras/{moving['name']}/frame?after={moving['sequence'] or 0}&timeout=1"
            )
            if frame is not None and "error" in frame:  # there is no frame yet, so the request did not wait
                with self._log_changed:
                    self._log_changed.wait(0.2)
        raise AssertionError(f"the condition never held: {self.cameras()}\n{self.log}")

    def stop(self, timeout_s: float = 5, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait; its exit code. Fails if it takes longer than `timeout_s`."""
        self._process.send_signal(number)
        return self._process.wait(timeout_s)

    def wait(self, timeout_s: float) -> int:
        """Wait for it to end by itself; its exit code."""
        return self._process.wait(timeout_s)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._log_changed:
                self._log.append(line.rstrip("\n"))
                self._log_changed.notify_all()
        with self._log_changed:
            self._log_changed.notify_all()


def engine_of(module: ModuleProcess) -> dict[str, Any]:
    """The engine in status."""
    engine: dict[str, Any] = module.get("/api/v1/status")["engine"]
    return engine


def metrics_of(module: ModuleProcess) -> dict[str, float]:
    """The samples of /metrics by their name and labels."""
    lines = module.raw("/metrics").decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name.removeprefix("visionedge_"): float(value) for name, value in pairs}


def assert_every_frame_is_accounted_for(module: ModuleProcess) -> None:
    """offered = analysed + dropped (all reasons) + waiting, in one snapshot and for each camera."""
    samples = metrics_of(module)
    for camera in module.cameras():
        label = f'camera="{camera}"'
        ended = sum(
            value
            for name, value in samples.items()
            if label in name
            and name.startswith(("frames_analysed_total", "frames_dropped_total", "frames_waiting"))
        )
        assert samples[f"frames_offered_total{{{label}}}"] == ended
