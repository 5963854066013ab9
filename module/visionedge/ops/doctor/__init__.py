"""`visionedge doctor`: what this machine offers, what is used, the first broken link to the GPU, its remedy.

`facts` gathers (files, and probes with time limits), `gpu_checks` (NVIDIA), `intel_checks` and
`system_checks` evaluate the facts, `remedies` has the instructions for this environment, `report` has the
text and the JSON document.
"""
