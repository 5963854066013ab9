"""Keeping the promise: what is given up, in a declared order, while the device cannot carry what is asked."""
