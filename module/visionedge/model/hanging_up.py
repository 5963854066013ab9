"""An event loop whose connections end with it."""

import asyncio
import weakref
from typing import Any


class ConnectionLoop(asyncio.SelectorEventLoop):
    """A loop that can hang up: TLS would wait for the other side's farewell, which may never come."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, and remembered."""
        transport, protocol = await super().create_connection(*args, **kwargs)
        self._lines.add(transport)
        return transport, protocol

    async def hang_up(self) -> None:
        """End all connections at once."""
        for transport in tuple(self._lines):
            transport.abort()
        for _ in range(3):  # each layer tells the next one in the next round
            await asyncio.sleep(0)
