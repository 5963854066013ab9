"""The page at `/`: one document with its styles and its script inside, so that it needs nothing else.

It carries no data and no secret: the script fetches those, with the token where there is one.
"""

import base64
import hashlib
from importlib.resources import files

from aiohttp import web


class Page:
    """The page, put together once from the files of the package."""

    def __init__(self) -> None:
        folder = files("visionedge.web") / "page"
        style = (folder / "style.css").read_text(encoding="utf-8")
        scripts = ("stream.js", "tiles.js", "page.js", "doctor.js")
        script = "".join((folder / name).read_text(encoding="utf-8") for name in scripts)
        html = (folder / "index.html").read_text(encoding="utf-8")
        self._body = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).encode()
        self._headers = {
            "Content-Security-Policy": _policy(style, script),
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Opener-Policy": "same-origin",
        }

    def answer(self, status: int = 200) -> web.Response:
        """The page; with status 401 it is the same one, and its script asks for the token."""
        headers = dict(self._headers)
        if status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="visionedge"'
        return web.Response(
            body=self._body, status=status, content_type="text/html", charset="utf-8", headers=headers
        )


def _policy(style: str, script: str) -> str:
    """Only this very style and script, and data from where the page came from."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
