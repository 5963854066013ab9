"""What all tests share: where the data lies, and that nobody leaves a thread behind."""

import logging
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from edge_runtime.fixtures import drive, edge_runtime
from repository_paths import SHARED

__all__ = ["drive", "edge_runtime"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared test data; tests that use it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(
            f"the shared test data is not in {SHARED}; VISIONEDGE_SHARED names the folder above data/"
        )
    return SHARED


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Every test ends the threads it started (those of the SDK live as long as their process)."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    left = [t for t in threading.enumerate() if t not in before and t.is_alive()]
    while left and time.monotonic() < deadline:
        left[0].join(0.1)
        left = [t for t in left if t.is_alive()]
    assert not left, f"threads left behind: {[t.name for t in left]}"


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """The command line sets up the root logger; what it leaves would write to a stream that is gone."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Text that UTF-8 cannot hold (tests log such names) would end a parallel run."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode("utf-8")) for title, text in report.sections
    ]
    return report
