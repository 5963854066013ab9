"""`visionedge bench`: measured load on the pipeline, the engine and HTTP."""
