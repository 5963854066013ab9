"""Look up the newest stable Python slim image and write its digest into requirements/base.txt.

    python tools/base_digest.py                     # docker.io/library/python
    python tools/base_digest.py --image HOST/NAME   # a mirror of it

Asks the registry by the Docker Registry HTTP API v2, also with a token. The digest is computed from the
manifest that the registry sends. Without an answer the file stays as it is: exit code 1.
"""

import argparse
import datetime as dt
import hashlib
import http.client
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE_FILE = Path(__file__).resolve().parents[1] / "requirements/base.txt"

_PYTHON_MINORS = range(11, 15)  # the locks have wheels for these
_DEBIAN = ("bookworm", "trixie")  # oldest first
_TAG = re.compile(r"3\.(\d+)\.(\d+)-slim-(\w+)")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
)
_MAX_ANSWER_BYTES = 8 * 2**20
_MAX_PAGES = 100
_TIMEOUT_S = 30


class LookupFailedError(Exception):
    """The registry gave no usable answer; the text says why."""


@dataclass(frozen=True)
class BaseImage:
    """A base image, pinned."""

    name: str
    """With registry, without tag: docker.io/library/python."""
    tag: str
    digest: str
    looked_up: dt.date

    @property
    def reference(self) -> str:
        """What FROM takes: the digest decides, the tag is for people."""
        return f"{self.name}:{self.tag}@{self.digest}"


def read_base(path: Path = BASE_FILE) -> BaseImage | None:
    """The image in the file, None without a file.

    Raises ValueError if the file has another form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    fields = dict(re.findall(r"^([\w-]+): (\S+)$", text, re.MULTILINE))
    try:
        looked_up = dt.date.fromisoformat(fields["looked-up"])
        found = BaseImage(fields["name"], fields["tag"], fields["digest"], looked_up)
    except KeyError as missing:
        raise ValueError(
            f"{path}: {missing.args[0]} is missing; `make base-digest` writes the file"
        ) from None
    if not _DIGEST.fullmatch(found.digest):
        raise ValueError(f"{path}: {found.digest!r} is not a digest; `make base-digest` writes the file")
    return found


def render_base(image: BaseImage) -> str:
    """The text of the file."""
    return (
        "# The base of the images, by digest: `make base-digest` looks it up, `make image` uses it.\n"
        f"name: {image.name}\ntag: {image.tag}\ndigest: {image.digest}\nlooked-up: {image.looked_up}\n"
    )


def newest_tag(tags: Iterable[str]) -> str | None:
    """The tag of the newest stable Python on the newest Debian, such as 3.13.9-slim-trixie."""
    found = []
    for tag in tags:
        match = _TAG.fullmatch(tag)
        if match and int(match[1]) in _PYTHON_MINORS and match[3] in _DEBIAN:
            found.append((int(match[1]), int(match[2]), _DEBIAN.index(match[3]), tag))
    return max(found)[-1] if found else None


class Registry:
    """One repository of a registry, read only."""

    def __init__(self, image: str) -> None:
        """Take an image's name as Docker writes it, without a tag."""
        host, _, path = image.partition("/")
        if not path or not ("." in host or ":" in host or host == "localhost"):
            host, path = "docker.io", image
        if host == "docker.io" and "/" not in path:
            path = f"library/{path}"
        self.name = f"{host}/{path}"
        address = "registry-1.docker.io" if host == "docker.io" else host
        self._root = f"{_scheme(address)}://{address}"
        self._path = path
        self._token = ""

    def tags(self) -> list[str]:
        """All tags. Raises LookupFailedError."""
        address, found = f"{self._root}/v2/{self._path}/tags/list?n=1000", list[str]()
        for _ in range(_MAX_PAGES):
            body, headers = self._get(address, "application/json")
            found += [tag for tag in _parse_object(body, address).get("tags") or [] if isinstance(tag, str)]
            match = re.match(r'<([^>]+)>; *rel="?next"?', headers.get("Link") or "")
            if match is None:
                return found
            address = urllib.parse.urljoin(address, match[1])
        raise LookupFailedError(f"{self.name} has more than {_MAX_PAGES} pages of tags")

    def digest(self, tag: str) -> str:
        """The digest of a tag, computed from its manifest. Raises LookupFailedError."""
        body, headers = self._get(f"{self._root}/v2/{self._path}/manifests/{tag}", _MANIFESTS)
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if (stated := headers.get("Docker-Content-Digest")) and stated != digest:
            raise LookupFailedError(
                f"{self.name}:{tag} has the digest {digest}, but the registry says {stated}"
            )
        if not _parse_object(body, tag).get("schemaVersion"):
            raise LookupFailedError(f"the answer for {self.name}:{tag} is not a manifest")
        return digest

    def _get(self, address: str, accept: str) -> tuple[bytes, http.client.HTTPMessage]:
        if not address.startswith(self._root + "/"):
            raise LookupFailedError(f"{self.name} points to another server: {address}")
        headers = {"Accept": accept}
        try:
            return _fetch(address, headers | self._authorization())
        except urllib.error.HTTPError as error:
            challenge = error.headers.get("WWW-Authenticate") or ""
            error.close()
            if error.code != http.HTTPStatus.UNAUTHORIZED or self._token:
                raise LookupFailedError(f"{address} answers {error.code} {error.reason}") from None
        self._token = self._fetch_token(challenge)
        try:
            return _fetch(address, headers | self._authorization())
        except urllib.error.HTTPError as error:
            error.close()
            raise LookupFailedError(f"{address} answers {error.code} {error.reason}, with a token") from None

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _fetch_token(self, challenge: str) -> str:
        kind, _, text = challenge.partition(" ")
        parts = dict(re.findall(r'(\w+)="([^"]*)"', text))
        realm = urllib.parse.urlsplit(parts.pop("realm", ""))
        if kind.lower() != "bearer" or realm.scheme != _scheme(realm.netloc):
            raise LookupFailedError(f"{self.name} wants a login of an unknown kind: {kind or 'none named'}")
        address = realm._replace(query=urllib.parse.urlencode(parts)).geturl()
        try:
            body, _ = _fetch(address, {})
        except urllib.error.HTTPError as error:
            error.close()
            raise LookupFailedError(f"{realm.netloc} gives no token: {error.code} {error.reason}") from None
        answer = _parse_object(body, realm.netloc)
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str):
            raise LookupFailedError(f"the answer of {realm.netloc} has no token")
        return token


def _scheme(address: str) -> str:
    """Registries are asked by https; by http only on this machine, as Docker does it."""
    return "http" if address.partition(":")[0] in ("localhost", "127.0.0.1") else "https"


def _fetch(address: str, headers: dict[str, str]) -> tuple[bytes, http.client.HTTPMessage]:
    request = urllib.request.Request(address, headers=headers)  # noqa: S310 - https, or this machine
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - as above
            body = answer.read(_MAX_ANSWER_BYTES + 1)
            found: http.client.HTTPMessage = answer.headers
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise LookupFailedError(
            f"{urllib.parse.urlsplit(address).netloc} does not answer: {reason}"
        ) from None
    if len(body) > _MAX_ANSWER_BYTES:
        raise LookupFailedError(f"the answer of {address} is larger than {_MAX_ANSWER_BYTES} bytes")
    return body, found


def _parse_object(body: bytes, source: str) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LookupFailedError(f"the answer for {source} is not a JSON object")
    return found


def look_up(image: str, today: dt.date) -> BaseImage:
    """The newest stable Python slim image. Raises LookupFailedError."""
    registry = Registry(image)
    tag = newest_tag(registry.tags())
    if tag is None:
        raise LookupFailedError(f"{registry.name} has no tag such as 3.13.9-slim-{_DEBIAN[-1]}")
    return BaseImage(registry.name, tag, registry.digest(tag), today)


def main(argv: list[str]) -> int:
    """Write the file: 0, or 1 if nothing could be looked up."""
    parser = argparse.ArgumentParser(description="write the digest of the newest Python slim image")
    parser.add_argument(
        "--image", default="python", help="name of the image, with its registry if not docker.io"
    )
    parser.add_argument("--output", type=Path, default=BASE_FILE)
    arguments = parser.parse_args(argv)
    try:
        found = look_up(arguments.image, dt.datetime.now(dt.UTC).date())
    except LookupFailedError as error:
        print(
            f"base-digest: no digest was looked up: {error}; {arguments.output.name} is unchanged",
            file=sys.stderr,
        )
        return 1
    arguments.output.write_text(render_base(found), encoding="utf-8")
    print(f"{arguments.output}: {found.reference}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
