"""What flows through the pipeline: frames, detections, timings, and how pictures are fitted and drawn."""
