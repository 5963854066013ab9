"""The HTTP clients of `bench http`, run as ``python -m visionedge.ops.bench.http_clients``.

Each client keeps one connection open and sends its requests at fixed times: a request that is due while an
earlier one is unanswered waits, and its waiting counts as latency. A `ClientLoad` comes as a line of JSON on
stdin. The process prints ``ready``, starts at a line ``go``, and prints its `ClientResults` as JSON.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import aiohttp


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """`rate` requests per second from `clients` connections together, for the addresses in turn.

    A response that is missing `limit_s` after the last request counts as ``no answer``.
    """

    urls: Sequence[str]
    headers: Mapping[str, str]
    clients: int
    rate: float
    seconds: float
    limit_s: float = 10.0


@dataclass(slots=True)
class ClientResults:
    """Latencies in ms from when each request was due, statuses with counts, and processor time."""

    latencies_ms: list[float] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0


async def run_clients(load: ClientLoad) -> ClientResults:
    """Send all requests on schedule, and wait for the responses."""
    results, count = ClientResults(), round(load.rate * load.seconds)
    used_s, began_s = time.process_time(), time.monotonic()

    async def run_client(session: aiohttp.ClientSession, number: int) -> None:
        for index in range(number, count, load.clients):
            due_s = began_s + index / load.rate
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            status = await _request(session, load.urls[index % len(load.urls)])
            results.statuses[status] = results.statuses.get(status, 0) + 1
            results.latencies_ms.append((time.monotonic() - due_s) * 1000)

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=load.clients), headers=load.headers
    ) as session:
        clients = [asyncio.create_task(run_client(session, number)) for number in range(load.clients)]
        _, late = await asyncio.wait(clients, timeout=load.seconds + load.limit_s)
        for client in late:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    if missing := count - sum(results.statuses.values()):
        results.statuses["no answer"] = missing
    results.cpu_s = time.process_time() - used_s
    return results


async def _request(session: aiohttp.ClientSession, url: str) -> str:
    """The status of the response, or the kind of error."""
    try:
        async with session.get(url, allow_redirects=False) as response:
            await response.read()
            return str(response.status)
    except (aiohttp.ClientError, TimeoutError) as error:
        return type(error).__name__


def main() -> None:
    """Read the load, wait for `go`, run the clients, and print the results."""
    load = ClientLoad(**json.loads(sys.stdin.readline()))
    print("ready", flush=True)  # noqa: T201 - the protocol with the parent
    if sys.stdin.readline():
        json.dump(asdict(asyncio.run(run_clients(load))), sys.stdout)


if __name__ == "__main__":
    main()
