"""Other precisions of a model: fp16 and int8, measured and judged."""
