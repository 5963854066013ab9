"""Fixtures for tests that need an edge runtime or a driven module; `conftest.py` imports them."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from edge_runtime.runtime import EdgeRuntime

_TESTS = Path(__file__).resolve().parents[2]
QUICK = {"first_wait_s": 0.05, "max_wait_s": 0.2, "disconnect_s": 2.0}
"""Short waits; the deadlines of calls stay as they are unless a test changes them."""


@pytest.fixture
def edge_runtime() -> "Iterator[EdgeRuntime]":
    """An edge runtime whose hub is up; the test is skipped if the fixed port is in use on all addresses."""
    # Imported here, because loading certificates is slow and most tests need none.
    from edge_runtime.runtime import EdgeRuntime, PortTakenError

    runtime = EdgeRuntime()
    try:
        runtime.start()
    except PortTakenError as error:
        pytest.skip(str(error))
    try:
        yield runtime
    finally:
        runtime.stop()


class DrivenModule:
    """A module process under remote control (see `driver.py`)."""

    def __init__(self, environ: dict[str, str], options: dict[str, Any]) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("IOTEDGE_")}
        paths = os.pathsep.join([str(_TESTS.parent / "module"), str(_TESTS / "doubles")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime.driver", json.dumps(options)],
            env={**clean, **environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._log: list[str] = []
        self._logged = threading.Condition()
        self._reader = threading.Thread(target=self._read_log, name="driven-log")
        self._reader.start()

    def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run a command; returns its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError("the driven module died:\n" + "\n".join(self.log))
        return dict(json.loads(line))

    @property
    def log(self) -> list[str]:
        """The log lines so far."""
        with self._logged:
            return list(self._log)

    def wait_for_log(self, text: str, times: int = 1, timeout_s: float = 20) -> None:
        """Wait until a text was logged `times` times."""
        with self._logged:
            if not self._logged.wait_for(lambda: sum(text in line for line in self._log) >= times, timeout_s):
                raise TimeoutError(f"'{text}' was not logged {times} times:\n" + "\n".join(self._log))

    def kill(self) -> None:
        """End the process as `kill -9` does."""
        self._process.kill()
        self._process.wait()

    def wait(self, timeout_s: float) -> int:
        """Wait until the process ends by itself; returns its exit code."""
        return self._process.wait(timeout_s)

    def close(self, deadline_s: float = 3.0) -> dict[str, Any]:
        """Close it; returns the last answer. The process must end within 5 s with exit code 0."""
        answer = self.do("close", deadline_s=deadline_s)
        assert self._process.wait(5) == 0
        return answer

    def end(self) -> None:
        """End the process, and free its pipes and thread."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._logged:
                self._log.append(line.rstrip())
                self._logged.notify_all()


Drive = Callable[..., DrivenModule]


@pytest.fixture
def drive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    """Start driven modules: ``drive(environ, deadlines={…}, file=…, data=…, limits={…})``.

    Without `data` each module has a new folder.
    """
    started: list[DrivenModule] = []

    def start(environ: dict[str, str], *, deadlines: dict[str, Any] | None = None, **options: Any) -> DrivenModule:
        data = options.pop("data", None) or str(tmp_path_factory.mktemp("data"))
        driven = DrivenModule(environ, {"deadlines": {**QUICK, **(deadlines or {})}, "data": data, **options})
        started.append(driven)
        return driven

    yield start
    for driven in started:
        driven.end()
