"""A model: its untrusted file read, its family recognised, one graph compiled, other precisions made."""
