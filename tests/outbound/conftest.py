"""What the tests of messages on their way out share."""

from spool_world import world

__all__ = ["world"]
