"""The process that reads scene events for `bench pipeline --events`: how old each is when it arrives.

    python -m visionedge.ops.bench.event_reader URL SECONDS

Prints an `EventAges` as JSON, or ``{"error": …}`` with exit code 1. A process of its own reads an event as
soon as it comes, whatever the benchmark does.
"""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

EVENTS_PATH = "/api/v1/events/stream"
_CLOCK_STEP_NS = 20_000_000
_FIRST_ANSWER_S = 10.0


@dataclass(slots=True)
class EventAges:
    """For each event the time in ms from the capture of its frame (`at`) to its arrival.

    `after_clock_steps`: events that do not count, because the clock was set between the two.
    """

    ages_ms: list[float] = field(default_factory=list)
    after_clock_steps: int = 0


class AgeMeter:
    """Measures ages by the monotonic clock and the UTC time at its start, in ns."""

    def __init__(self, monotonic_ns: int, utc_ns: int) -> None:
        self._offset_ns = utc_ns - monotonic_ns
        self._began_ns = utc_ns
        self.ages = EventAges()

    def add(self, at: str, monotonic_ns: int, utc_ns: int) -> None:
        """An event that arrives now; one of a frame that was captured before the start does not count."""
        at_ns = round(datetime.fromisoformat(at).timestamp() * 1e9)
        if abs(utc_ns - monotonic_ns - self._offset_ns) > _CLOCK_STEP_NS:
            self.ages.after_clock_steps += 1
        elif at_ns >= self._began_ns:
            self.ages.ages_ms.append(round((monotonic_ns + self._offset_ns - at_ns) / 1e6, 3))


def read_events(url: str, seconds: float) -> EventAges:
    """The ages of all events that arrive within the seconds.

    Raises:
        OSError, HTTPException: the module does not answer, refuses, or ends.
    """
    parts = urlsplit(url)
    connection = HTTPConnection(str(parts.hostname), parts.port, timeout=_FIRST_ANSWER_S)
    try:
        connection.connect()
        sock = connection.sock  # the connection forgets it where the stream ends with it
        connection.request("GET", EVENTS_PATH)
        response = connection.getresponse()
        if response.status != 200:
            raise HTTPException(f"{EVENTS_PATH} answers {response.status}")
        meter = AgeMeter(time.monotonic_ns(), time.time_ns())
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            sock.settimeout(left_s)
            try:
                line = response.readline()
            except TimeoutError:
                break
            if not line:
                raise HTTPException("the stream of events has ended")
            if line.startswith(b"data: "):
                meter.add(json.loads(line[6:])["at"], time.monotonic_ns(), time.time_ns())
        return meter.ages
    finally:
        connection.close()


def main(arguments: Iterable[str]) -> int:
    """The process; its exit code."""
    url, seconds = arguments
    document: dict[str, object]
    try:
        document = asdict(read_events(url, float(seconds)))
    except (OSError, HTTPException, ValueError, KeyError) as error:
        document = {"error": str(error) or type(error).__name__}
    sys.stdout.write(json.dumps(document) + "\n")
    return 1 if "error" in document else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
