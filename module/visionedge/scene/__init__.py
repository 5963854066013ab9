"""From detections to answers: tracks, zones, lines, events and totals of a camera."""
