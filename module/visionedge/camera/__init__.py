"""Cameras: opened, decoded, time-stamped, reconnected, counted."""
