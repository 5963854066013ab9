"""A model understood: its labels, its input, its head, and the evidence for it."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from visionedge.frames.types import InputSpec
from visionedge.model.analysis.signature import read_signature
from visionedge.model.exporter_files import LABELS_JSON, read_config, read_export, read_labels_json
from visionedge.model.heads import recognise
from visionedge.model.interpretation import Reading
from visionedge.model.labels import labels_for
from visionedge.model.onnx_file import blamed_on, read_model
from visionedge.model.sidecar import read_sidecar
from visionedge.runtime.installation import bundled

log = logging.getLogger(__name__)

BUNDLED = "yolox-nano-416.onnx"


@dataclass(frozen=True, slots=True)
class Model:
    """A detector that was recognised. Small and picklable: the weights stay in the file.

    `name` is the file's stem, `sha256` is of it and its external data, `labels` has the word of each class.
    """

    name: str
    path: Path
    sha256: str
    labels: tuple[str, ...]
    reading: Reading

    @property
    def input(self) -> InputSpec:
        """The picture it wants."""
        return self.reading.spec

    @property
    def head(self) -> str:
        """The family it was recognised as."""
        return self.reading.head

    @property
    def evidence(self) -> tuple[str, ...]:
        """What decided on the head, one clause each."""
        return self.reading.evidence


def load_model(path: Path) -> Model:
    """Read a model's file and recognise what it is, with `MODEL.yaml` beside it; nothing of it is run.

    Raises:
        ModelError: it is missing, damaged, unsafe to follow, or no detector that is known; or what is stated
            beside it is wrong.
    """
    file = read_model(path)
    sidecar = read_sidecar(path)
    with blamed_on(path):
        own = {entry.key for entry in file.proto.metadata_props}
        listed = {} if "names" in own | set(sidecar.metadata) else read_labels_json(path)
        beside = {**listed, **read_export(path), **read_config(path), **sidecar.metadata}
        signature = read_signature(file.proto, beside)
        carrier = LABELS_JSON if listed else sidecar.name if "names" in sidecar.metadata else "its metadata"
        reading = recognise(signature, carrier=carrier)
        labels, origin = labels_for(
            path, signature.metadata, reading.class_count, carrier, background=reading.background
        )
    if (data_set := sidecar.data_set) is not None:
        labels, origin = data_set.labels(labels, origin)
        if data_set.names != labels:
            words = "%s: %s describes a training data set with %d class names; the file is ignored"
            log.warning(words, path, data_set.file, len(data_set.names))
    if origin == "nothing":
        log.warning("%s: no labels; put %s.labels.txt beside it, one a line", path, path.stem)
    reading = replace(reading, evidence=sidecar.evidence + reading.evidence)
    return Model(path.stem, path, file.sha256, labels, reading)


def bundled_model_path() -> Path:
    """The model that comes along.

    Raises:
        UnavailableError: it is missing from this installation.
    """
    return bundled(f"models/{BUNDLED}")
