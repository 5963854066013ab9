"""What every process of the module needs: threads, children, files, logs, redaction, onnxruntime."""
