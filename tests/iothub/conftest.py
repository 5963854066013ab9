"""Fixtures that the tests of IoT Hub share."""

from hub_client_harness import harness

__all__ = ["bench"]
