"""Files and playlists over HTTP for FFmpeg: it parses, and what it asks for is fetched here.

So redirects and segments at other hosts, logins and proxies are decided in one place.
"""

from visionedge.camera.sources import diagnosis
from visionedge.camera.sources.base import Limits
from visionedge.camera.sources.connecting import without_login
from visionedge.camera.sources.http_client import Answer, HttpClient
from visionedge.camera.sources.http_pictures import refusal
from visionedge.errors import SourceError


class HttpFile:
    """What is behind one address, as a file that can be read, and sought in where the server allows it."""

    def __init__(self, client: HttpClient, url: str, read_timeout_s: float) -> None:
        self._client, self._url, self._timeout_s = client, url, read_timeout_s
        self._at = 0
        self._left = b""
        first = self._ask(0)
        self._answer: Answer | None = first
        self._size = first.head.length

    def __repr__(self) -> str:
        return f"<HttpFile {self._client.name} at={self._at}>"

    def read(self, size: int) -> bytes:
        """Up to so many bytes; empty at the end."""
        if self._answer is None and (self._size is None or self._at < self._size):
            self._answer = self._ask(self._at)
        try:
            while self._answer is not None and not self._left and not self._answer.over:
                self._left = self._answer.read(self._timeout_s)
        except TimeoutError:
            raise SourceError(diagnosis.silent(self._client.name, self._timeout_s)) from None
        data, self._left = self._left[:size], self._left[size:]
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go on at another place, from the next `read` on."""
        if whence == 2 and self._size is None:
            raise OSError("the length is not known")
        at = offset + (0, self._at, self._size or 0)[whence]
        if 0 <= at - self._at < len(self._left):
            self._left = self._left[at - self._at :]
        elif at != self._at:
            self._answer, self._left = None, b""
        self._at = at
        return at

    def tell(self) -> int:
        """Where it is."""
        return self._at

    def seekable(self) -> bool:
        """A stream without an end has only one direction."""
        return self._size is not None

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _ask(self, at: int) -> Answer:
        answer = self._client.get({"Range": f"bytes={at}-"} if at else None, url=self._url)
        if answer.head.status >= 300:
            raise SourceError(refusal(self._client, answer))
        if at and answer.head.status != 206:  # a server without ranges begins at the beginning
            while at > 0 and not answer.over:
                data = answer.read(self._timeout_s)
                self._left = data[at:]
                at -= len(data)
        return answer


class HttpFiles:
    """Opens whatever one camera's container asks for. Used by one thread, but for `interrupt`.

    `name` is what FFmpeg is to open. With `hides_name` it tells nothing: FFmpeg takes the end of an address
    for a format, and any `.cgi` for one of 2003.
    """

    def __init__(self, target: str, limits: Limits, *, hides_name: bool) -> None:
        self._target, self._limits = target, limits
        self.name = "http:" if hides_name else without_login(target)
        self._addresses = {self.name: target}
        self._clients: list[HttpClient] = []
        self._interrupted = False
        self.error: SourceError | None = None
        """The last that was refused: FFmpeg goes on behind a segment that it cannot open."""

    def __repr__(self) -> str:
        return f"<HttpFiles open={len(self._clients)} error={self.error!r}>"

    def open(self, url: str, _flags: int, _options: dict[str, str]) -> HttpFile:
        """The file behind an address that FFmpeg asks for."""
        self._clients = [client for client in self._clients if client.open]
        client = HttpClient(self._target, self._limits)
        self._clients.append(client)
        client.interrupted = self._interrupted
        try:
            return HttpFile(client, self._addresses.get(url, url), self._limits.read_timeout_s)
        except SourceError as error:
            client.close()
            self.error = error
            raise

    def interrupt(self) -> None:
        """Let whatever waits end at once."""
        self._interrupted = True
        for client in tuple(self._clients):
            client.interrupt()

    def close(self) -> None:
        """Hang up everywhere: FFmpeg does not close all that it opened."""
        for client in self._clients:
            client.close()
        self._clients.clear()
