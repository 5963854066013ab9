"""From a model to the one graph that runs: bytes in, rows out."""
