"""A real RTSP server on loopback, in a process of its own, that can be killed, halted and started again.

with RtspServer(folder) as server:
    uri = server.uri("cam.mp4")     # an H.264 clip in `folder`, looped for ever
"""

import importlib.util
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import pytest

_START_LIMIT_S = 15.0


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RtspServer:
    """Serves the H.264 MP4 files of a folder over RTSP (TCP only); keeps its port over restarts."""

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("aio_rtsp_toolkit") is None:
            pytest.skip("needs aio-rtsp-toolkit[server]")
        self._folder = folder
        self.port = free_port()
        self._control_port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "RtspServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def uri(self, clip: str, login: str = "") -> str:
        """The address of a looped clip; `login` (``user:password@``) is accepted unseen."""
        return f"rtsp://{login}127.0.0.1:{self.port}/{clip}?play_count=0"

    def start(self) -> None:
        """Start it and wait until it listens."""
        program = Path(sys.executable).with_name("rtsp-server")
        options = ["-d", str(self._folder), "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(
            [str(program), *options, "-cp", str(self._control_port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + _START_LIMIT_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                raise RuntimeError(f"the RTSP server did not start on port {self.port}")

    def kill(self) -> None:
        """Kill it, if it is running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def halt(self) -> None:
        """Freeze it: connections stay open, but nothing is sent."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume it after `halt`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _listens(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 0.2):
                return True
        except OSError:
            # A pause between attempts; the loop ends when the port answers.
            time.sleep(0.02)
            return False
