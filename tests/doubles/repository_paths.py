"""The paths of the repository and of the shared test data."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("VISIONEDGE_SHARED") or REPOSITORY.parent / "shared") / "data"
"""Pictures, videos and models that are too large for the repository."""
