"""What happens in front of a camera. No I/O, no clock, no thread. In reading order:

- `tracker`: detections become tracks; one call for each picture.
- `assignment`: which detection belongs to which track.
"""
