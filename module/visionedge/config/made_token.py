"""The HTTP token that a module makes for itself when other machines can reach it and none is configured."""

import contextlib
import logging
import secrets
from pathlib import Path

from visionedge.config.schema import HttpConfig
from visionedge.runtime.files import read_regular_file, set_aside, write_atomically
from visionedge.runtime.redaction import register_secrets

log = logging.getLogger(__name__)


class MadeToken:
    """The token of a module without `http.token` that other machines can reach.

    It is made once and kept in the data folder, readable for its owner only. In a folder that cannot be
    written it lasts until the module stops.
    """

    FILE_NAME = "http-token"
    _MAX_BYTES = 200

    def __init__(self, data: Path) -> None:
        self._path = data / self.FILE_NAME
        self._token: str | None = None

    def __repr__(self) -> str:
        return f"<MadeToken {self._path}>"

    def read(self) -> str | None:
        """The token that is kept; None if there is none that can be used."""
        try:
            token = read_regular_file(self._path, max_bytes=self._MAX_BYTES).decode("ascii").strip()
        except (OSError, ValueError):
            return None
        return token if token.isprintable() and token else None

    def lay_under(self, http: HttpConfig, *, make: bool) -> HttpConfig:
        """The section with the made token, if it lacks one; `make`: also if none was made before. Blocks."""
        if not http.lacks_token:
            return http
        if self._token is None:
            self._token = self.read() or (self._make() if make else None)
        if self._token is None:
            return http
        register_secrets([self._token])
        return http.model_copy(update={"token": self._token})

    def _make(self) -> str:
        token = secrets.token_urlsafe(24)
        try:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            set_aside(self._path)  # what cannot be read may be the token of a newer version
            write_atomically(self._path, f"{token}\n".encode(), durable=True, mode=0o600)
        except OSError as error:
            log.warning(
                "the HTTP token that was made cannot be kept in %s (%s), so `visionedge token` cannot print"
                " it: set http.token (or VISIONEDGE_HTTP_TOKEN)",
                self._path,
                error.strerror or error,
            )
        return token
