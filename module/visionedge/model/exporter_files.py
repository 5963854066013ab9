"""`cvexport.manifest`: what Azure Custom Vision puts beside a model that it exports."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import Signature
from visionedge.model.interpretation import stated_object
from visionedge.runtime.files import read_regular

KEY = "cvexport.manifest"
LABELS_JSON = "labels.json"
_LONGEST_BYTES = 1 << 20


def read_export(path: Path) -> Mapping[str, str]:
    """The manifest beside the model at `path` as metadata; nothing where there is none, or that of another.

    Raises:
        ModelError: it cannot be read, or is none.
    """
    beside = path.with_name(KEY)
    if not beside.is_file():
        return {}
    try:
        document = json.loads(beside.read_bytes()[:_LONGEST_BYTES].decode("utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{beside}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ModelError(f"{beside}: is no JSON object as Custom Vision writes it; remove it or export again")
    if document.get("ModelFileName", path.name) != path.name:
        return {}
    size = [document.get(key) for key in ("ScaleHeight", "ScaleWidth")]
    return {KEY: json.dumps(document)} | ({"imgsz": json.dumps(size)} if None not in size else {})


def read_labels_json(path: Path) -> Mapping[str, str]:
    """The list of labels that Azure AutoML puts beside a model, as metadata; nothing where there is none.

    Raises:
        ModelError: it cannot be read.
    """
    beside = path.with_name(LABELS_JSON)
    if not beside.exists():
        return {}
    try:
        names = json.loads(read_regular(beside, most_bytes=_LONGEST_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{beside}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{beside}: is no JSON list of labels as Azure AutoML writes it; remove it or export again"
        )
    return {"names": json.dumps(names)}


def manifest(signature: Signature) -> Mapping[str, Any] | None:
    """The manifest of a model, None where there is none for it.

    Raises:
        ModelError: the model carries one itself that is none.
    """
    return stated_object(signature, KEY) if KEY in signature.metadata else None
