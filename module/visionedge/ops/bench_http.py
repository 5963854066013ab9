"""`visionedge bench http`: clients on the result endpoints of a module, and what they cost its pipeline.

Requests leave on schedule whether the earlier ones were answered or not, and their latency counts from when
they were due. Stretches with and without clients take turns in one run.
"""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import aiohttp
import numpy as np

from visionedge.errors import VisionedgeError
from visionedge.ops.bench_report import machine
from visionedge.uris import redact

_READY = re.compile(r"ready: open (http://\S+)/")
_SETTLE_S = 0.5
_LIMIT_S = 10.0
_STOP_S = 15.0


@dataclass(frozen=True, slots=True)
class HttpLoad:
    """What to ask, and how often: `rate` requests per second in all, from `clients` connections.

    Without `url` a module of its own is started, with so many `cameras` of the clip. `token` is the module's.
    """

    url: str | None = None
    token: str | None = None
    clients: int = 16
    rate: float = 200.0
    seconds: float = 5.0
    rounds: int = 3
    cameras: int = 16
    arguments: tuple[str, ...] = ()


@dataclass(slots=True)
class Stretch:
    """One stretch: the latencies of its answers in ms, their statuses, and the frames analysed meanwhile."""

    latencies_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    took_s: float = 0.0
    frames: int = 0
    replaced: int = 0

    @property
    def frames_per_s(self) -> float:
        """What the pipeline did."""
        return self.frames / self.took_s


def bench_http(load: HttpLoad, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and give the report as a document. `tell` hears of the progress.

    Raises:
        VisionedgeError: the module cannot be started or reached, or answers nothing.
    """
    if load.url is not None:
        return asyncio.run(measure(load, load.url.rstrip("/"), tell))
    tell(f"starting a module with {load.cameras} cameras")
    with own_module(load) as url:
        return asyncio.run(measure(load, url, tell))


@contextmanager
def own_module(load: HttpLoad) -> Iterator[str]:
    """A module in a process of its own, and its address; stopped afterwards."""
    cameras = [word for n in range(load.cameras) for word in ("--camera", f"bench-{n}=demo:")]
    command = [sys.executable, "-m", "visionedge", "run", "--http", "127.0.0.1:0", *cameras, *load.arguments]
    # A file, not a pipe: nobody reads it while the bench runs, and it must never fill up.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        module = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield _address(module, log.fileno())
        finally:
            module.terminate()
            try:
                module.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                module.kill()
                module.wait()


def _address(module: "subprocess.Popen[bytes]", log: int) -> str:
    """Where the module listens, as soon as it is ready."""

    while True:
        text = os.pread(log, 1 << 20, 0).decode(errors="replace")
        if found := _READY.search(text):
            return found[1]
        try:
            code = module.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        last = (text.strip().splitlines() or ["it said nothing"])[-1]
        raise VisionedgeError(f"the module ended with {code}: {redact(last)}")


async def measure(load: HttpLoad, url: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure a module that runs at this address; see `bench_http`."""
    headers = {"Authorization": f"Bearer {load.token}"} if load.token else {}
    timeout = aiohttp.ClientTimeout(total=_LIMIT_S)
    connector = aiohttp.TCPConnector(limit=load.clients)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        status = await _status(session, url)
        paths = [f"{url}/api/v1/cameras/{camera['name']}/frame" for camera in status["cameras"]]
        if not paths:
            raise VisionedgeError(f"{redact(url)} has no camera to ask for")
        asked: list[Stretch] = []
        left_alone: list[Stretch] = []
        for number in range(load.rounds):
            # With clients first every other time: none always comes after the same.
            for busy in (False, True) if number % 2 == 0 else (True, False):
                (asked if busy else left_alone).append(
                    await _stretch(session, url, load, paths if busy else [])
                )
                await asyncio.sleep(_SETTLE_S)
            tell(_progress(number + 1, load, asked[-1], left_alone[-1]))
    return _report(load, status, asked, left_alone)


async def _stretch(session: aiohttp.ClientSession, url: str, load: HttpLoad, paths: list[str]) -> Stretch:
    stretch = Stretch()
    before, began_s = await _counted(session, url), time.monotonic()
    if paths:
        await asyncio.gather(
            *(_client(session, load, number, paths, stretch) for number in range(load.clients))
        )
    left_s = began_s + load.seconds - time.monotonic()
    await asyncio.sleep(max(0.0, left_s))
    after = await _counted(session, url)
    stretch.frames, stretch.replaced = after[0] - before[0], after[1] - before[1]
    stretch.took_s = time.monotonic() - began_s
    return stretch


async def _client(
    session: aiohttp.ClientSession, load: HttpLoad, number: int, paths: list[str], stretch: Stretch
) -> None:
    """One of the clients: each of its requests has its own moment, which lateness does not move."""
    began_s = time.monotonic()
    for request in range(number, round(load.rate * load.seconds), load.clients):
        due_s = began_s + request / load.rate
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        try:
            async with session.get(paths[request % len(paths)]) as answer:
                await answer.read()
                stretch.statuses[str(answer.status)] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            stretch.statuses[type(error).__name__] += 1
        stretch.latencies_ms.append((time.monotonic() - due_s) * 1000)


async def _status(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The module's status.

    Raises:
        VisionedgeError: it does not give one.
    """
    try:
        async with session.get(f"{url}/api/v1/status") as answer:
            if answer.status != 200:
                raise VisionedgeError(
                    f"{redact(url)} answers {answer.status}; give --token where it wants one"
                )
            found: dict[str, Any] = await answer.json()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise VisionedgeError(f"{redact(url)} cannot be asked: {redact(str(error)) or 'no answer'}") from None
    return found


async def _counted(session: aiohttp.ClientSession, url: str) -> tuple[int, int]:
    """Frames so far: analysed, and replaced by newer ones."""
    cameras = (await _status(session, url))["cameras"]
    analysed = sum(int(camera["framesAnalysed"]) for camera in cameras)
    return analysed, sum(int(camera["dropped"].get("replaced", 0)) for camera in cameras)


# --- figures ------------------------------------------------------------------------------------------------


def _report(
    load: HttpLoad, status: dict[str, Any], asked: list[Stretch], left_alone: list[Stretch]
) -> dict[str, Any]:
    statuses = sum((stretch.statuses for stretch in asked), Counter[str]())
    pairs = list(zip(asked, left_alone, strict=True))
    kept = [a.frames_per_s / b.frames_per_s for a, b in pairs if b.frames]
    return {
        "schema": "visionedge/bench-http/1",
        "machine": machine() | {"effectiveDevice": status["engine"].get("effective")},
        "load": {
            "clients": load.clients,
            "rate": load.rate,
            "cameras": len(status["cameras"]),
            "seconds": load.seconds,
            "rounds": load.rounds,
            "ownModule": load.url is None,
        },
        "model": (status.get("model") or {}).get("name"),
        "http": {
            "answersPerSecond": round(median(len(s.latencies_ms) / s.took_s for s in asked), 2),
            "latencyMs": {
                f"p{q}": round(median(float(np.percentile(s.latencies_ms, q)) for s in asked), 3)
                for q in (50, 95, 99)
            },
            "statuses": dict(sorted(statuses.items())),
            "rounds": [
                {f"p{q}": round(float(np.percentile(s.latencies_ms, q)), 3) for q in (50, 95, 99)}
                for s in asked
            ],
        },
        "pipeline": {
            "withClients": [round(s.frames_per_s, 3) for s in asked],
            "withoutClients": [round(s.frames_per_s, 3) for s in left_alone],
            "kept": round(median(kept), 4) if kept else None,
            "replacedWithoutClients": sum(stretch.replaced for stretch in left_alone),
        },
    }


def _progress(number: int, load: HttpLoad, asked: Stretch, left_alone: Stretch) -> str:
    p99_ms = float(np.percentile(asked.latencies_ms, 99))
    return (
        f"round {number}/{load.rounds}: p99 {p99_ms:.1f} ms; pipeline {asked.frames_per_s:.1f} frames/s with"
        f" clients, {left_alone.frames_per_s:.1f} without"
    )


def caution(report: Mapping[str, Any]) -> str:
    """What to know before anybody believes the pipeline's figure; nothing if it was at its limit."""
    if report["pipeline"]["replacedWithoutClients"]:
        return ""
    return (
        "The pipeline had time to spare: all frames were analysed with or without clients, so what these cost"
        " it cannot be seen. Give more --cameras."
    )


def words(report: Mapping[str, Any]) -> str:
    """The report for people."""
    load, http, pipeline = report["load"], report["http"], report["pipeline"]
    latency = "  ".join(f"{key} {value:.1f}" for key, value in http["latencyMs"].items())
    kept = "no frames came" if pipeline["kept"] is None else f"{pipeline['kept']:.1%} of its frames/s kept"
    return (
        f"{load['clients']} clients, {load['rate']:g} requests/s on the newest frames of {load['cameras']}"
        f" cameras\n  {http['answersPerSecond']:.1f} answers/s  latency ms {latency}  {http['statuses']}\n"
        f"  pipeline: {kept} ({_range(pipeline['withClients'])} with clients,"
        f" {_range(pipeline['withoutClients'])} without)\n"
        f"{caution(report)}"
    ).rstrip() + "\n"


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"
