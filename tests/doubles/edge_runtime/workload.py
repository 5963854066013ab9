"""The workload API on a unix socket: signs with the module's key and returns the trusted CA."""

import asyncio
import base64
import binascii
import json
from pathlib import Path
from typing import Any

from aiohttp import web

from edge_runtime.account import Account, Faults

API_VERSIONS = frozenset(
    {
        "2018-06-28",
        "2019-01-30",
        "2019-10-22",
        "2019-11-05",
        "2020-07-07",
        "2020-10-10",
        "2021-12-07",
        "2022-08-03",
    }
)
"""The versions of the API that runtimes have used; a module sends the version in its environment."""


class Workload:
    """The workload API of one module."""

    def __init__(self, account: Account, faults: Faults, ca_pem: str) -> None:
        self._account = account
        self._faults = faults
        self._ca_pem = ca_pem
        self._runner: web.AppRunner | None = None
        self.requests: list[str] = []
        self._released = asyncio.Event()

    async def listen(self, path: Path) -> None:
        """Start listening on a socket at `path`."""
        app = web.Application(middlewares=[self._checked])
        app.router.add_post("/modules/{module}/genid/{generation}/sign", self._sign)
        app.router.add_get("/trust-bundle", self._trust_bundle)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(path)).start()

    async def stop(self) -> None:
        """Stop listening."""
        self.release()
        if self._runner is not None:
            await self._runner.cleanup()

    def release(self) -> None:
        """Answer the hanging requests."""
        self._released.set()
        self._released = asyncio.Event()

    @web.middleware
    async def _checked(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        version = request.query.get("api-version")
        if version not in API_VERSIONS:
            return _error(400, f"unknown api-version {version}")
        response: web.StreamResponse = await handler(request)
        return response

    async def _sign(self, request: web.Request) -> web.Response:
        faults, text = self._faults, await request.text()
        if faults.hang_signing:
            await self._released.wait()
        if faults.drop_signing:
            # As edgelet does with more than ten requests at once: close the socket without an answer.
            assert request.transport is not None
            request.transport.close()
        if faults.fail_signing:
            return _error(500, "the key store does not answer")
        wanted = (self._account.module, self._account.generation)
        if (request.match_info["module"], request.match_info["generation"]) != wanted:
            return _error(404, "no such module")
        try:
            # Like edgelet, use only `data` of the three fields.
            data = base64.b64decode(json.loads(text)["data"], validate=True)
        except (ValueError, KeyError, TypeError, binascii.Error):
            return _error(400, "the request holds no data")
        return web.json_response({"digest": self._account.sign(data + b"?" * faults.wrong_signing)})

    async def _trust_bundle(self, _request: web.Request) -> web.Response:
        if self._faults.fail_trust_bundle:
            return _error(500, "the trust bundle cannot be read")
        return web.json_response({"certificate": self._ca_pem})


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"message": text}, status=status)
