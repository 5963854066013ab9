"""Fixtures that the tests of outbound messages share."""

from spool_harness import harness

__all__ = ["harness"]
