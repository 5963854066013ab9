"""Logging: one line an event on stderr, UTC, and never a secret."""

import logging
import sys
import time

from visionedge.uris import redact


class RedactingFormatter(logging.Formatter):
    """Masks secrets in whatever is logged, tracebacks included: the last edge before people read it."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        """The finished text of a record, without its secrets."""
        return redact(super().format(record))


def set_up(level: str = "INFO") -> None:
    """Send the log to stderr. Called once, by the command line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(threadName)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These tell of their own insides at INFO; their errors reach us as exceptions.
    for chatty in ("azure", "paho", "aiohttp.access", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
