"""Devices and sessions on them: what was asked for, what is used, and what goes wrong."""
