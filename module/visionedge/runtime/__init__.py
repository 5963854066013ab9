"""Shared by all packages: threads, child processes, files, retries, logs, redaction, onnxruntime."""
