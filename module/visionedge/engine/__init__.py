"""Computes batches of pictures on a device: batching, lanes, plan, sessions, processes."""
