"""Inference: slots and batches, the model's head, the compiled graph, the engine, the truth about devices."""
