"""Cameras: open a source, decode its pictures, make frames of them, reconnect."""
