"""The engine in a process of its own, which may be lost: supervisor, workers, protocol."""
