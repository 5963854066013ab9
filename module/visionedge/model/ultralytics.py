"""What Ultralytics and the YOLOs around it have in common: how a picture is prepared, what metadata says."""

from visionedge.model.analysis.signature import Signature
from visionedge.model.interpretation import Preprocess
from visionedge.model.labels import class_names

YOLO_INPUT = Preprocess("rgb", 1 / 255, fit="letterbox", anchor="center", pad=114)
"""YOLOv5 to YOLOv12, YOLO26, YOLOv6: RGB from 0 to 1 in the middle of a grey letterbox."""


def detects(signature: Signature, classes: int | None = None) -> bool:
    """Whether its metadata lets it be a detector of so many classes.

    A model for poses or masks has columns that would pass for classes; its task or its names tell.
    """
    if signature.metadata.get("task", "detect") != "detect":
        return False
    if classes is None:
        return True
    names = class_names(signature.metadata)
    return classes > 0 and (names is None or len(names) == classes)


def origin(signature: Signature) -> tuple[str, ...]:
    """What its metadata says of where it comes from, as evidence."""
    author, text = (signature.metadata.get(key, "") for key in ("author", "description"))
    if not author and not text:
        return ()
    return (f"its metadata: {' '.join(f'{text} {author}'.split())[:80]}",)
