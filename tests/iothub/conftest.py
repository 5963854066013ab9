"""Fixtures that the tests of IoT Hub share."""

from client_bench import bench

__all__ = ["bench"]
