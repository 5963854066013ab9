"""A container registry on loopback: tags in pages, manifests, a token that must be fetched first."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a token of the stand-in"
PAGE_SIZE = 3


class RegistryStandIn(ThreadingHTTPServer):
    """Serves one repository, ``library/python``."""

    def __init__(self, tags: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tags = tags
        self.wants_token = True
        self.challenge = (
            'Bearer realm="{root}/token",service="stand-in",scope="repository:library/python:pull"'
        )
        self.stated_digest = ""
        """Sent instead of the true one."""
        self.next_page = "/v2/library/python/tags/list?last={last}"
        self.asked: list[str] = []
        """The paths of all requests."""

    @property
    def host(self) -> str:
        """Its address, as it stands in an image's name."""
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def image(self) -> str:
        """The repository's name."""
        return f"{self.host}/library/python"

    @staticmethod
    def manifest(tag: str) -> bytes:
        """The bytes that the tag stands for."""
        return json.dumps({"schemaVersion": 2, "annotations": {"tag": tag}, "manifests": []}).encode()

    def digest(self, tag: str) -> str:
        """The true digest of a tag."""
        return f"sha256:{hashlib.sha256(self.manifest(tag)).hexdigest()}"


class _Handler(BaseHTTPRequestHandler):
    server: RegistryStandIn

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        path, _, query = self.path.partition("?")
        if path == "/token":
            self._send(200, json.dumps({"token": TOKEN}).encode())
        elif self.server.wants_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            challenge = self.server.challenge.format(root=f"http://{self.server.host}")
            self._send(401, b"{}", {"WWW-Authenticate": challenge})
        elif path == "/v2/library/python/tags/list":
            self._send_tags(urllib.parse.parse_qs(query).get("last", [""])[0])
        elif path.startswith("/v2/library/python/manifests/") and path.rpartition("/")[2] in self.server.tags:
            tag = path.rpartition("/")[2]
            stated = self.server.stated_digest or self.server.digest(tag)
            self._send(200, self.server.manifest(tag), {"Docker-Content-Digest": stated})
        else:
            self._send(404, b"{}")

    def _send_tags(self, last: str) -> None:
        start = self.server.tags.index(last) + 1 if last else 0
        page = self.server.tags[start : start + PAGE_SIZE]
        headers = {}
        if start + PAGE_SIZE < len(self.server.tags):
            headers["Link"] = f'<{self.server.next_page.format(last=page[-1])}>; rel="next"'
        self._send(200, json.dumps({"name": "library/python", "tags": page}).encode(), headers)

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Log nothing."""


@contextmanager
def serve_registry(tags: list[str]) -> Iterator[RegistryStandIn]:
    """A running registry with these tags."""
    with RegistryStandIn(tags) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
