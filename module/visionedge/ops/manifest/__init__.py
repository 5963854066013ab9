"""`visionedge manifest`: deployment manifests made, checked and priced."""
