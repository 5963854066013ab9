"""The data of the pipeline: frames, detections, timings; resizing and drawing of pictures."""
