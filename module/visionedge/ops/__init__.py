"""Tools for an operator: bench, doctor, manifest, model tools, detect. The module needs none of them."""
