"""Chaos: the whole module against the stand-in runtime, with everything going wrong, and the laws checked.

    make chaos SECONDS=600 SEED=1

Broker stops, hangs, resets in mid-publish, swallowed PUBACKs, half-open connections, lost sessions, failing
signatures, refused connections, and `kill -9` of the module, in an order that the seed decides. Afterwards:
every `messageSequence` of both outputs arrived at least once, in order after de-duplication by message id,
each camera's frames in order, no gap between arrivals above a minute, and memory flat. One JSON document on
stdout; exit code 1 if a law was broken.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from edge_runtime.account import ReceivedMessage
from edge_runtime.contract import check_messages
from edge_runtime.packets import NOT_AUTHORIZED
from edge_runtime.runtime import EdgeRuntime
from module_process import ModuleProcess
from visionedge.iothub.identity import Identity
from visionedge.outbound.spool import SPOOL_FILE_NAME
from visionedge.outbound.sqlite_store import MessageStore, SpoolLimits

LONGEST_GAP_S = 60.0
_WARM_S = 15.0
_FLAT = 1.25

CONFIG = {
    "cameras": {name: {"uri": "demo:", "fps": 4} for name in ("dock", "gate")},
    "telemetry": {"mode": "all", "intervalSeconds": 0.2, "fillSeconds": 0.2, "maxPerDay": 10_000_000},
    "inference": {"device": "cpu"},
}

# Faults that are switched on for some seconds, and those that happen in a moment.
LASTING = (
    *("swallow", "swallow_pubacks", "swallow_connacks", "swallow_subacks", "silent_twin", "forget_sessions"),
    *("fail_signing", "drop_signing", "wrong_signing", "hang_signing", "fail_trust_bundle"),
)
QUICK = ("stop", "reset", "reset_publishes", "reset_pubacks", "lose_sessions", "refuse", "fail_signing")
SLOW = (*QUICK, *LASTING, "hang", "slow")


@dataclass(slots=True)
class ModuleRun:
    """One start of the module: how its memory went, in MB, against the seconds since it was ready."""

    rss_mb: list[tuple[float, float]] = field(default_factory=list)

    @property
    def warm(self) -> list[float]:
        """Without the first seconds, in which models and buffers are still made."""
        return [mb for at_s, mb in self.rss_mb if at_s >= _WARM_S]


class Chaos:
    """One run."""

    def __init__(self, seconds: float, seed: int, kill_every_s: float, kinds: tuple[str, ...]) -> None:
        self._seconds = seconds
        self._kill_every_s = kill_every_s
        self._kinds = kinds
        self._random = random.Random(seed)  # noqa: S311 - the same run again, no secret
        self._runtime = EdgeRuntime()
        self._pause = threading.Event()
        self.faults: Counter[str] = Counter()
        self.runs: list[ModuleRun] = []
        self.kills = 0

    def run(self) -> dict[str, Any]:
        """Run it all; the figures, with `broken` laws by name."""
        with tempfile.TemporaryDirectory() as name, self._runtime:
            folder = Path(name)
            (folder / "vision.json").write_text(json.dumps(CONFIG))
            until_s = time.monotonic() + self._seconds
            while time.monotonic() < until_s or self.kills < 2:
                self._run_until_kill(folder)
            self._restore_hub()
            self._drain(folder)
            last_numbers, waiting = self._spool(folder / "data" / SPOOL_FILE_NAME)
            return self._check(self._runtime.messages, last_numbers, waiting)

    # --- what happens ---------------------------------------------------------------------------------------

    def _run_until_kill(self, folder: Path) -> None:
        """One life of the module, ended by `kill -9` in the middle of whatever it does."""
        run = ModuleRun()
        self.runs.append(run)
        with self._start(folder) as module:
            module.ready()
            ready_s = time.monotonic()
            end_s = ready_s + self._kill_every_s
            while time.monotonic() < end_s:
                self._inject_one_fault(end_s)
                run.rss_mb.append((time.monotonic() - ready_s, rss_mb(module.pid)))
            self.kills += 1  # leaving the block kills it

    def _start(self, folder: Path) -> ModuleProcess:
        arguments = ("--config", str(folder / "vision.json"))
        return ModuleProcess(folder / "data", *arguments, environ=self._runtime.environ)

    def _inject_one_fault(self, end_s: float) -> None:
        """A fault for some seconds, then quiet for some."""
        kind = self._random.choice(self._kinds)
        self.faults[kind] += 1
        end_fault = self._start_fault(kind)
        self._wait(self._random.uniform(0.2, 6.0), end_s)
        end_fault()
        self._wait(self._random.uniform(0.5, 6.0), end_s)

    def _start_fault(self, kind: str) -> Callable[[], None]:
        """Let something go wrong; what mends it."""
        runtime, faults = self._runtime, self._runtime.faults
        match kind:
            case "stop":
                runtime.hub_down()
                return runtime.hub_up
            case "hang":
                runtime.hang()
                return runtime.resume
            case "reset":
                runtime.cut()
            case "lose_sessions":
                runtime.lose_sessions()
            case "reset_publishes" | "reset_pubacks":
                setattr(faults, kind, self._random.randint(1, 4))
            case "refuse":
                faults.refuse_code = NOT_AUTHORIZED
                runtime.cut()
            case "slow":
                faults.puback_delay_s = 0.3
            case _:
                setattr(faults, kind, True)
                # Most of them matter only to who connects.
                if kind not in ("swallow", "swallow_pubacks", "silent_twin"):
                    runtime.cut()
        return self._end_faults

    def _end_faults(self) -> None:
        self._runtime.faults.end()
        self._runtime.resume()

    def _wait(self, seconds: float, end_s: float) -> None:
        self._pause.wait(max(0.0, min(seconds, end_s - time.monotonic())))

    def _restore_hub(self) -> None:
        self._end_faults()
        if not self._runtime.broker.listening:
            self._runtime.hub_up()

    def _drain(self, folder: Path) -> None:
        """A last life without faults, until the hub has everything; it ends as it should."""
        with self._start(folder) as module:
            module.ready()
            self._runtime.wait_for(lambda _: _is_spool_empty(module), LONGEST_GAP_S)
            code = module.stop(10)
            if code != 0:
                raise AssertionError(f"the last life ended with {code}:\n{module.log}")

    # --- what must be so ------------------------------------------------------------------------------------

    def _spool(self, path: Path) -> tuple[dict[str, int], int]:
        """The last numbers that were given, and how many messages are left."""
        identity = Identity.from_environ(self._runtime.environ)
        assert identity is not None
        store = MessageStore(path, identity.owner, SpoolLimits())
        store.close()
        return store.last_numbers, store.count

    def _check(self, messages: list[ReceivedMessage], last_numbers: dict[str, int], waiting: int) -> dict[str, Any]:
        once = {message.message_id: message for message in reversed(messages)}
        gaps = [(b.received_ns - a.received_ns) / 1e9 for a, b in pairwise(messages)]
        broken = [
            *self._order(messages),
            *(
                f"{output}: numbers missing"
                for output in last_numbers
                if not _has_all_numbers(messages, output, last_numbers)
            ),
        ]
        longest_s = max(gaps, default=0.0)
        if longest_s > LONGEST_GAP_S:
            broken.append(f"a gap of {longest_s:.1f} s")
        memory = self._memory()
        if memory["grownInALife"] > _FLAT or memory["grownOverLives"] > _FLAT:
            broken.append(f"memory: {memory}")
        return {
            "seconds": self._seconds,
            "kills": self.kills,
            "faults": dict(sorted(self.faults.items())),
            "messages": dict(Counter(m.output for m in once.values())),
            "duplicates": len(messages) - len(once),
            "lastNumbers": last_numbers,
            "waitingAtTheEnd": waiting,
            "longestGapSeconds": round(longest_s, 1),
            "memory": memory,
            "broken": broken,
        }

    def _order(self, messages: list[ReceivedMessage]) -> list[str]:
        """Contract, order of numbers, order of each camera."""
        try:
            check_messages(messages)
        except AssertionError as error:
            return [f"contract: {str(error)[:500]}"]
        return []

    def _memory(self) -> dict[str, float]:
        """MB, and how much the memory grew within a life and from the first to the last."""
        warm = [run.warm for run in self.runs if len(run.warm) >= 4]
        if not warm:
            return {"largestMb": 0.0, "grownInALife": 1.0, "grownOverLives": 1.0}
        ends = [sum(each[-2:]) / 2 for each in warm]
        return {
            "largestMb": round(max(max(each) for each in warm), 1),
            "grownInALife": round(
                max(end / (sum(each[:2]) / 2) for end, each in zip(ends, warm, strict=True)), 3
            ),
            "grownOverLives": round(ends[-1] / ends[0], 3),
        }


def _has_all_numbers(messages: list[ReceivedMessage], output: str, last_numbers: dict[str, int]) -> bool:
    """Whether the numbers 1 to the last that was given have arrived, and no other."""
    there = {m.json()["messageSequence"] for m in messages if m.output == output}
    return there == set(range(1, last_numbers[output] + 1))


def _is_spool_empty(module: ModuleProcess) -> bool:
    """Whether nothing waits but what has just been made."""
    return int(module.get("/api/v1/status")["hub"]["waiting"]) <= 1


def rss_mb(pid: int) -> float:
    """The resident memory of a process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)


def main() -> int:
    """Run it; 1 if a law was broken."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-every", type=float, default=60, metavar="SECONDS")
    arguments = parser.parse_args()
    figures = Chaos(arguments.seconds, arguments.seed, arguments.kill_every, SLOW).run()
    sys.stdout.write(json.dumps({"seed": arguments.seed, **figures}, indent=2) + "\n")
    return 1 if figures["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
