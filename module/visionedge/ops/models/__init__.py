"""`visionedge model`: models inspected, compiled, evaluated."""
