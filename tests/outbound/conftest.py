"""What the tests of messages on their way out share."""

from spool_harness import harness

__all__ = ["world"]
