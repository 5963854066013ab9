"""The families of detectors that are understood: a module here with a tuple `HEADS` is all it takes."""

import importlib
import pkgutil
from dataclasses import replace

from visionedge.errors import ModelError
from visionedge.inference.reading import Head, Reading
from visionedge.inference.signature import Signature


def known_heads() -> tuple[Head, ...]:
    """All heads, in the order of their modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(head for module in modules for head in module.HEADS)


def recognise(signature: Signature, heads: tuple[Head, ...] | None = None) -> Reading:
    """The one reading that fits; a model is never guessed at.

    ``visionedge.head`` in its metadata (or `head` in `MODEL.yaml`) states it outright; the shapes must agree
    all the same. ``visionedge.nms`` says whether boxes still need suppression.

    Raises:
        ModelError: none fits, or several do; the message says what was seen.
    """
    heads = known_heads() if heads is None else heads
    stated = signature.metadata.get("visionedge.head")
    if stated is not None:
        heads = tuple(head for head in heads if head.name == stated)
        if not heads:
            raise ModelError(f"the head stated for it, '{stated}', is unknown; {_known()}")
    readings = [reading for head in heads if (reading := head.read(signature)) is not None]
    if len(readings) == 1:
        return _with_stated(readings[0], signature)
    if readings:
        names = " and ".join(reading.head for reading in readings)
        raise ModelError(
            f"several heads fit ({names}); state one as head in MODEL.yaml beside it. Seen: {signature}"
        )
    if stated is not None:
        raise ModelError(f"the head stated for it, '{stated}', is not what its shapes are. Seen: {signature}")
    raise ModelError(f"is no detector that is known here. Seen: {signature}; {_known()}")


def _with_stated(reading: Reading, signature: Signature) -> Reading:
    """The reading with the evidence for an open size, and with what ``visionedge.nms`` says."""
    evidence = reading.evidence + ((signature.size,) if signature.size else ())
    stated = signature.metadata.get("visionedge.nms")
    if stated is None:
        return replace(reading, evidence=evidence)
    if stated not in ("true", "false"):
        raise ModelError("visionedge.nms must be true or false")
    suppress = stated == "true"
    clause = f"boxes are {'' if suppress else 'not '}suppressed, as stated"
    return replace(reading, suppress=suppress, evidence=(*evidence, clause))


def _known() -> str:
    return f"known heads: {', '.join(head.name for head in known_heads())}"
