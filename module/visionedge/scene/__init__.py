"""What happens in front of a camera: tracks from detections. No I/O, no clock, no thread."""
