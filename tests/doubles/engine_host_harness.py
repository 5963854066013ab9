"""Cameras, batcher and engine host of a module, without delivery, twin and HTTP."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from visionedge.app.engine_host import EngineHost
from visionedge.app.state import AppState
from visionedge.camera.camera import CameraStatus
from visionedge.camera.registry import CameraRegistry
from visionedge.config.applied import Applied
from visionedge.config.load import parse_config
from visionedge.config.schema import Config
from visionedge.engine.interface import EngineEvent
from visionedge.frames.types import FrameResult
from visionedge.model.download import DownloadRetryPolicy
from visionedge.runtime.threads import ThreadGroup


class EngineHostHarness:
    """Runs cameras, batcher and engine host, and collects results and events."""

    def __init__(
        self,
        document: dict[str, Any],
        data: Path,
        retry_policy: DownloadRetryPolicy | None = None,
        inject: Path | None = None,
    ) -> None:
        self.document = document
        self.results: list[FrameResult] = []
        self.events: list[EngineEvent] = []
        self._more = threading.Condition()
        self.thread_group = ThreadGroup(lambda name, error: pytest.fail(f"{name} died: {error}"))
        self.state = AppState.of(parse_config(document), data, {}, self._collect)
        self._cameras = self.state.register("cameras", apply=self._apply_cameras)
        self.engine_host = EngineHost(
            self.state,
            data,
            self.thread_group,
            lambda name, error: pytest.fail(f"{name}: {error}"),
            retry_policy=retry_policy,
            inject=inject,
        )

    async def _apply_cameras(self, wanted: Config) -> dict[str, str]:
        """As the service does."""
        self._cameras.adopt(wanted)
        self.engine_host.select_cameras(wanted.cameras)
        if (registry := self.state.snapshot().camera_registry) is not None:
            registry.apply(wanted.cameras)
        return {}

    def _collect(self) -> None:
        with self._more:
            items = self.state.loop_queue.drain()
            self.results += [item for item in items if isinstance(item, FrameResult)]
            self.events += [item for item in items if isinstance(item, EngineEvent)]
            self._more.notify_all()

    def _until(self, condition: Callable[[list[FrameResult]], bool]) -> None:
        with self._more:
            assert self._more.wait_for(lambda: condition(self.results), 120), self.events

    async def until(self, condition: Callable[[list[FrameResult]], bool]) -> None:
        """Wait until the results meet a condition."""
        await asyncio.to_thread(self._until, condition)

    async def until_event(self, code: str) -> None:
        """Wait for an event of the engine with this code."""

        def happened(_results: list[FrameResult]) -> bool:
            return any(event.code == code for event in self.events)

        await self.until(happened)

    async def apply(self, over: dict[str, Any]) -> Applied:
        """Apply the document with these sections changed."""
        return await self.state.apply(parse_config({**self.document, **over}))

    async def start(self) -> None:
        """Load or download the model, then start cameras and engine."""
        state = self.state

        def ignore(_status: CameraStatus) -> None:
            """Ignore the states of cameras."""

        self.engine_host.load()
        registry = CameraRegistry(
            self.engine_host.resizers(),
            state.batcher,
            self.thread_group,
            first_sequence=lambda _name: 1,
            on_change=ignore,
        )
        state.set_camera_registry(registry)
        registry.apply(state.snapshot().config.cameras)
        await self.engine_host.open_loaded()
        await self.engine_host.open_missing()


@asynccontextmanager
async def running(
    document: dict[str, Any],
    data: Path,
    *,
    retry_policy: DownloadRetryPolicy | None = None,
    wait_for_start: bool = True,
    inject: Path | None = None,
) -> AsyncIterator[EngineHostHarness]:
    """A module that runs; with `wait_for_start=False` it may still wait for its model.

    `inject` is a script of faults.
    """
    module = EngineHostHarness(document, data, retry_policy, inject)
    state = module.state
    starting = asyncio.ensure_future(module.start())
    try:
        if wait_for_start:
            await starting
        yield module
    finally:
        starting.cancel()
        module.thread_group.stopping.set()
        if (registry := state.snapshot().camera_registry) is not None:
            registry.stop()
        state.batcher.close()
        module.engine_host.lanes.close()
        still_running = await asyncio.to_thread(module.thread_group.join, 10)
        await asyncio.to_thread(module.engine_host.close)
        assert still_running + module.engine_host.still_running() == []


def document(clip: Path, models: Path, *, process: bool) -> dict[str, Any]:
    """Three cameras that show a clip, and a small model."""
    return {
        "cameras": {name: {"uri": str(clip)} for name in ("dock", "gate", "yard")},
        "model": {"path": str(models / "small.onnx")},
        "inference": {"device": "cpu", "runtime": "onnxruntime", "process": process, "confidence": 0.1},
    }


def results_of(results: list[FrameResult], camera: str) -> list[FrameResult]:
    """The results of one camera."""
    return [each for each in results if each.frame.camera == camera]


def run_scenario(
    story: Callable[[EngineHostHarness], Awaitable[None]],
    start: dict[str, Any],
    data: Path,
    *,
    retry_policy: DownloadRetryPolicy | None = None,
    wait_for_start: bool = True,
    inject: Path | None = None,
) -> EngineHostHarness:
    """Run a scenario in a module; returns the module after its end."""

    async def run() -> EngineHostHarness:
        async with running(
            start, data, retry_policy=retry_policy, wait_for_start=wait_for_start, inject=inject
        ) as module:
            await story(module)
        return module

    return asyncio.run(run())
