"""The families of detectors that are understood: a module here with a tuple `HEADS` is all it takes."""

import importlib
import pkgutil

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

    The metadata key ``visionedge.head`` states it outright; the shapes must agree all the same.

    Raises:
        ModelError: none fits, or several do; the message says what was seen.
    """
    heads = known_heads() if heads is None else heads
    stated = signature.metadata.get("visionedge.head")
    if stated is not None:
        heads = tuple(head for head in heads if head.name == stated)
        if not heads:
            raise ModelError(f"its metadata states the unknown head '{stated}'; {_known()}")
    readings = [reading for head in heads if (reading := head.read(signature)) is not None]
    if len(readings) == 1:
        return readings[0]
    if readings:
        names = " and ".join(reading.head for reading in readings)
        raise ModelError(
            f"several heads fit ({names}); state one in its metadata as 'visionedge.head'. Seen: {signature}"
        )
    if stated is not None:
        raise ModelError(
            f"its metadata states the head '{stated}', which its shapes are not. Seen: {signature}"
        )
    raise ModelError(f"is no detector that is known here. Seen: {signature}; {_known()}")


def _known() -> str:
    return f"known heads: {', '.join(head.name for head in known_heads())}"
