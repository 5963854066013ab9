"""A `data.yaml` of Ultralytics, which often lies beside a model under the name of its `MODEL.yaml`.

It describes the data that a model was trained with and not how the model is read, so only its class names are
taken, and only where neither the model nor a file of labels names its classes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_KEYS = frozenset({"path", "train", "val", "test", "nc", "names", "channels", "download"})


@dataclass(frozen=True, slots=True)
class DataSet:
    """The name of the file, and the names of the classes; none where they cannot be read."""

    file: str
    names: tuple[str, ...]

    def labels(self, labels: tuple[str, ...], origin: str) -> tuple[tuple[str, ...], str]:
        """The labels of a model and where they came from, by the names of the data set where these fit.

        `labels` and `origin` are what is known without it; no label where the number of classes is unknown.
        """
        is_guess = origin == "nothing" or origin.endswith("by their number")
        fits = bool(self.names) and len(labels) in (0, len(self.names))
        return (self.names, self.file) if is_guess and fits else (labels, origin)


def data_set_of(file: str, document: Mapping[str, Any], keys_of_ours: Collection[str]) -> DataSet | None:
    """The data set that a document describes; None where it is a `MODEL.yaml`."""
    keys = set(document)
    is_one = "train" in keys or "val" in keys or ("names" in keys and keys <= _KEYS)
    if not is_one or keys & set(keys_of_ours):
        return None
    names = document.get("names")
    if isinstance(names, Mapping):
        by_id = {str(key): name for key, name in names.items()}
        names = [by_id.get(str(number)) for number in range(len(by_id))]
    readable = isinstance(names, list) and all(isinstance(name, str | int) for name in names)
    return DataSet(file, tuple(_printable(str(name)) for name in names) if readable and names else ())


def _printable(name: str) -> str:
    """A name as it may stand in a line of a log."""
    return "".join(character if character.isprintable() else "?" for character in name).strip() or "?"
