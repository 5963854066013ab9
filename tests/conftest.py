"""Shared by all tests: test data, markers by folder, the check for left threads, no silent skips in CI."""

import logging
import os
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from edge_runtime.fixtures import drive, edge_runtime
from repository_paths import SHARED
from visionedge.runtime import child_process

__all__ = ["drive", "edge_runtime"]

# The duration of one example says nothing on a busy machine.
settings.register_profile("visionedge", deadline=None)
settings.load_profile("visionedge")

if "COVERAGE_PROCESS_START" in os.environ:  # `make coverage` measures children, too
    child_process._PASSED_PREFIXES += ("COVERAGE_",)  # type: ignore[assignment]  # a longer tuple


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
    """The command line sets up the root logger; its handler would write to a closed stream."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


MAY_SKIP = ("gpu", "cuda-libs", "docker")
"""Markers of tests that need what a build machine rarely has."""


MACHINE = (
    "has a GPU",
    "has a usable GPU",
    "is the GPU wheel",
    "has no IPv6",
    "has no instructions for bf16",
    "no package index answers",
)
"""Reasons that no package can change."""


def _fails_if_skipped(reason: str) -> bool:
    """With CI=true a test that is skipped for want of data or of a program fails.

    VISIONEDGE_TESTS_WITHOUT lists what is known to be missing, for example "shared,chromium": words from the
    reasons of the tests that may be skipped then.
    """
    known = os.environ.get("VISIONEDGE_TESTS_WITHOUT", "").split(",")
    missing = [*MACHINE, *(word for word in known if word)]
    return os.environ.get("CI") == "true" and not any(word in reason for word in missing)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in system/ start a whole module, a server or a browser: `make test-system` runs them."""
    for item in items:
        if "system" in item.path.parts:
            item.add_marker(pytest.mark.system)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A whole file that is skipped."""
    report = yield
    if report.skipped and _fails_if_skipped(str(report.longrepr)):
        report.outcome, report.longrepr = "failed", f"skipped, and CI=true: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Text that UTF-8 cannot encode (tests log such names) would end a parallel run; and skips in CI."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode("utf-8")) for title, text in report.sections
    ]
    may_skip = hasattr(report, "wasxfail") or any(map(item.get_closest_marker, MAY_SKIP))
    if report.skipped and not may_skip and _fails_if_skipped(str(report.longrepr)):
        report.outcome, report.longrepr = "failed", f"skipped, and CI=true: {report.longrepr}"
    return report
