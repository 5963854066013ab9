"""The whole edge runtime, on its own thread."""

import asyncio
import base64
import errno
import os
import secrets
import shutil
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import trustme

from edge_runtime.account import Account, Faults, ReceivedMessage
from edge_runtime.broker import PORT, Broker, MethodAnswer
from edge_runtime.workload import Workload

T = TypeVar("T")

API_VERSION = "2022-08-03"


class PortTakenError(Exception):
    """The fixed port is in use on every loopback address; the message says what to do."""


class EdgeRuntime:
    """A runtime for one module, to be used in a ``with`` block.

    On Linux all addresses 127.x.y.z are this machine. So each runtime has its own address, and the fixed port
    8883 is free there. Public methods may be called from any thread.
    """

    def __init__(
        self,
        *,
        device: str = "edge-device-1",
        module: str = "vision",
        listening: bool = True,
        on_message: Callable[[ReceivedMessage], None] | None = None,
    ) -> None:
        self.account = Account(
            hub="stand-in.azure-devices.net",
            device=device,
            module=module,
            generation="638000000000000000",
            key=secrets.token_bytes(32),
        )
        self.address = ""
        self._listening = listening
        self._on_message = on_message
        self._folder = Path(tempfile.mkdtemp(prefix="edge-runtime-"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="edge-runtime")
        self._changed = threading.Condition()
        self._messages: list[ReceivedMessage] = []
        self._ca = trustme.CA()
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.faults = Faults()
        self.broker = Broker(self.account, self.faults, self._record, self._notify)
        self.workload = Workload(self.account, self.faults, self.ca_pem)

    def __enter__(self) -> "EdgeRuntime":
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start serving on its own thread.

        Raises:
            PortTakenError: the fixed port is in use on every address.
        """
        self._thread.start()
        try:
            self._call(self._start())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop serving, and delete the folder."""
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder)

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables that edgeAgent would set."""
        return {
            "IOTEDGE_IOTHUBHOSTNAME": self.account.hub,
            "IOTEDGE_DEVICEID": self.account.device,
            "IOTEDGE_MODULEID": self.account.module,
            "IOTEDGE_GATEWAYHOSTNAME": self.address,
            "IOTEDGE_MODULEGENERATIONID": self.account.generation,
            "IOTEDGE_WORKLOADURI": f"unix://{self._folder / 'workload.sock'}",
            "IOTEDGE_APIVERSION": API_VERSION,
            "IOTEDGE_AUTHSCHEME": "sasToken",
        }

    @property
    def ca_pem(self) -> str:
        """The certificate in the trust bundle."""
        return self._ca.cert_pem.bytes().decode()

    @property
    def simulator_environ(self) -> dict[str, str]:
        """The environment variables of the simulator: no workload API, the key in a connection string."""
        ca_file = self._folder / "ca.pem"
        ca_file.write_bytes(self._ca.cert_pem.bytes())
        return {
            "EdgeHubConnectionString": (
                f"HostName={self.account.hub};GatewayHostName={self.address};DeviceId={self.account.device};"
                f"ModuleId={self.account.module};SharedAccessKey={base64.b64encode(self.account.key).decode()}"
            ),
            "EdgeModuleCACertificateFile": str(ca_file),
        }

    @property
    def messages(self) -> list[ReceivedMessage]:
        """All received messages, in order; a message that was sent twice is there twice."""
        with self._changed:
            return list(self._messages)

    def wait_for(self, condition: Callable[[list[ReceivedMessage]], bool], timeout_s: float = 20) -> list[ReceivedMessage]:
        """Wait until the messages meet a condition; returns the messages.

        Raises:
            TimeoutError: they did not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self._messages), timeout_s):
                raise TimeoutError(f"{len(self._messages)} messages; refused: {self.broker.refusals}")
            return list(self._messages)

    def wait_for_attempts(self, count: int, timeout_s: float = 20) -> None:
        """Wait for `count` attempts to connect, accepted or not.

        Raises:
            TimeoutError: they did not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.broker.attempts >= count, timeout_s):
                raise TimeoutError(f"{self.broker.attempts} attempts to connect")

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 20) -> None:
        """Wait until a condition is true; it is checked at every change of the runtime.

        Raises:
            TimeoutError: it did not become true.
        """
        with self._changed:
            if not self._changed.wait_for(condition, timeout_s):
                raise TimeoutError(f"the condition did not become true; refused: {self.broker.refusals}")

    def desire(self, patch: dict[str, Any]) -> int:
        """Change the desired properties of the module; returns the new version."""
        return self._call(self.broker.desire(patch))

    def invoke(self, name: str, payload: Any = None, timeout_s: float = 10) -> MethodAnswer:
        """Call a direct method of the module."""
        return self._call(self.broker.invoke(name, payload, timeout_s))

    def input(self, name: str, body: bytes, properties: dict[str, str] | None = None) -> None:
        """Send a message to an input of the module."""
        self._call(self.broker.input(name, body, properties or {}))

    def lose_sessions(self) -> None:
        """Delete all subscriptions; the connections stay."""
        self._loop.call_soon_threadsafe(self.broker.lose_sessions)

    def hang(self) -> None:
        """Let edgeHub hang until `resume`: connections stay, nothing is answered."""
        self._loop.call_soon_threadsafe(self.broker.flowing.clear)

    def resume(self) -> None:
        """End `hang`, and answer hanging requests to the workload API."""
        self._loop.call_soon_threadsafe(self.broker.flowing.set)
        self._loop.call_soon_threadsafe(self.workload.release)

    def hub_down(self) -> None:
        """Stop edgeHub: connections are reset, new ones refused."""
        self._call(self.broker.stop())

    def hub_up(self) -> None:
        """Start edgeHub again, at the same address, with its sessions."""
        self._call(self.broker.listen(self.address, self._tls))

    def cut(self) -> None:
        """Reset all connections; edgeHub continues to listen."""
        self._loop.call_soon_threadsafe(self.broker.cut)

    # --- on the loop's thread -------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _start(self) -> None:
        await self.workload.listen(self._folder / "workload.sock")
        for _ in range(20):
            if await self._try_listen(_loopback_address()):
                return
        raise PortTakenError(
            f"port {PORT} is in use on every loopback address; stop the process that uses it"
        )

    async def _try_listen(self, address: str) -> bool:
        """Listen on an address if the port is free there."""
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._ca.issue_cert(address, "localhost").configure_cert(self._tls)
        try:
            await self.broker.listen(address, self._tls)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        self.address = address
        if not self._listening:
            await self.broker.stop()
        return True

    async def _stop(self) -> None:
        self.broker.flowing.set()
        await self.broker.stop()
        await self.workload.stop()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _record(self, message: ReceivedMessage) -> None:
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()
        if self._on_message is not None:
            self._on_message(message)


def _loopback_address() -> str:
    """A random loopback address, which other runtimes are unlikely to use."""
    one, two = os.getpid() % 250 + 2, time.monotonic_ns() // 1000 % 250 + 2
    return f"127.{one}.{two}.{secrets.randbelow(250) + 2}"
