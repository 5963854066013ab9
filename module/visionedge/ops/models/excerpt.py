"""Pictures from all over a video, however long it is."""

from pathlib import Path

from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.frames.types import Picture


def excerpt(path: Path, most: int) -> list[Picture]:
    """At most so many pictures of a video, equally far apart; half as many at least where it has them.

    Raises:
        SourceError: it cannot be opened or decoded.
    """
    source, every, count = open_source(CameraUri("file", str(path))), 1, 0
    kept: list[Picture] = []
    try:
        while (decoded := source.read()) is not None:
            if count % every == 0:
                kept.append(decoded.picture())
            count += 1
            if len(kept) > most:
                # It is longer than was thought: of those that are kept, every second one goes.
                kept, every = kept[::2], every * 2
    finally:
        source.close()
    return kept
