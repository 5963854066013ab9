"""An MJPEG camera over HTTP whose rate a test can change; it alternates between two different pictures."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

import cv2
import numpy as np

_BOUNDARY = "picture"


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that `server_close` waits for them


class MjpegServer:
    """``with MjpegServer(40) as server: …``; every connection gets `fps` pictures per second."""

    def __init__(self, fps: float) -> None:
        self._fps = fps
        self._changed = threading.Condition()
        self._ended = False
        self._pictures = [_jpeg(number) for number in range(2)]
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="mjpeg", daemon=True)

    def __enter__(self) -> "MjpegServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()  # waits for the connections
        self._thread.join()

    @property
    def url(self) -> str:
        """The address of the stream."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/stream"

    def set_fps(self, fps: float) -> None:
        """Change the rate from the next picture on."""
        with self._changed:
            self._fps = fps
            self._changed.notify_all()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
                self.end_headers()
                number = 0
                try:
                    while server._wait():
                        self.wfile.write(server._part(number))
                        number += 1
                except OSError:
                    pass  # the module is gone

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - its name there
                """Log nothing."""

        return Handler

    def _wait(self) -> bool:
        """Wait until the next picture is due; False at the end."""
        began_s = time.monotonic()
        with self._changed:
            while not self._ended:
                left_s = began_s + 1 / self._fps - time.monotonic()
                if left_s <= 0:
                    return True
                self._changed.wait(left_s)
        return False

    def _part(self, number: int) -> bytes:
        picture = self._pictures[number % len(self._pictures)]
        head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
        return head.encode() + picture + b"\r\n"


def _jpeg(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    picture = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_NEAREST)
    ok, encoded = cv2.imencode(".jpg", picture)
    assert ok
    return encoded.tobytes()
