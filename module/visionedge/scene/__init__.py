"""From detections to answers: tracks, zones, lines, events and totals of a camera. In reading order:

- `tracker`: detections become tracks; one call for each picture (`assignment`: which belongs to which).
- `rules`: what a track's path means for a zone or line, as pure functions; `schedule`: when a zone counts.
- `second_stage`: about which tracks a second model is asked, and its answers.
- `scene`: tracks become events (`events`) and totals; one call for each picture (`trail`: a track's path).
- `spatial_analysis`: events as messages of Azure AI Vision Spatial Analysis.
- `camera_scene`: all of this for the results of one camera.
- `totals`, `writer`: the file of both, and the thread that writes it.
"""
