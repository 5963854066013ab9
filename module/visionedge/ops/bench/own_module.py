"""A module in a process of its own, for a load that is put on it."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from visionedge.errors import VisionedgeError
from visionedge.runtime.child_process import start
from visionedge.runtime.redaction import redact

_READY = re.compile(r"ready: open (http://\S+)/")
_STOP_S = 15.0


@contextmanager
def own_module(cameras: int, arguments: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """A module with so many cameras of the clip, its address and the number of its process; stopped after.

    `arguments` are for `visionedge run`.

    Raises:
        VisionedgeError: it does not start.
    """
    given = [word for n in range(cameras) for word in ("--camera", f"bench-{n}=demo:")]
    words = ("run", "--http", "127.0.0.1:0", *given, *arguments)
    # A file, not a pipe: nobody reads it while the bench runs, and it must never fill up.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        module = start("visionedge", *words, stdout=log, stderr=log)
        try:
            yield _address(module, log.fileno()), module.pid
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
