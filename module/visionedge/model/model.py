"""A loaded model: its labels, its input, its head, and the evidence for them.

`load_model` reads the file and the files beside it, and recognises the family. Nothing is executed.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from visionedge.frames.types import InputSpec
from visionedge.model.analysis.signature import read_signature
from visionedge.model.exporter_files import (
    LABELS_JSON,
    read_custom_vision_manifest,
    read_labels_json,
    read_paddle_config,
)
from visionedge.model.heads import interpret_model
from visionedge.model.interpretation import ModelInterpretation
from visionedge.model.labels import choose_labels, note_labels_file
from visionedge.model.onnx_file import read_model_file, wrap_model_errors
from visionedge.model.sidecar import read_sidecar
from visionedge.runtime.installation import find_bundled_file

log = logging.getLogger(__name__)

BUNDLED_MODEL = "yolox-nano-416.onnx"


@dataclass(frozen=True, slots=True)
class Model:
    """A detector or classifier that was recognised. Small and picklable: the weights stay in the file.

    `name` is the file's stem, `sha256` that of the file and its external data, `labels` has one per class.
    """

    name: str
    path: Path
    sha256: str
    labels: tuple[str, ...]
    interpretation: ModelInterpretation

    @property
    def input(self) -> InputSpec:
        """How pictures must be resized for it."""
        return self.interpretation.input_spec

    @property
    def original_sha256(self) -> str:
        """The SHA-256 of the file from which a compiled graph was made, else of the file itself."""
        return self.interpretation.compiled_from or self.sha256

    @property
    def head(self) -> str:
        """The family it was recognised as."""
        return self.interpretation.head

    @property
    def is_classifier(self) -> bool:
        """Whether its detections are the best classes of the whole picture, however unlikely."""
        return self.interpretation.is_classifier

    @property
    def evidence(self) -> tuple[str, ...]:
        """Why the head was chosen, one clause each."""
        return self.interpretation.evidence


def load_model(path: Path) -> Model:
    """Read a model file, with `MODEL.yaml` beside it, and recognise its family; nothing in it is executed.

    Raises:
        ModelError: the file is missing, damaged, unsafe, or neither a known detector nor a classifier; or a
            statement beside it is wrong.
    """
    file = read_model_file(path)
    sidecar = read_sidecar(path)
    with wrap_model_errors(path):
        own = {entry.key for entry in file.proto.metadata_props}
        listed = {} if "names" in own | set(sidecar.metadata) else read_labels_json(path)
        beside = {
            **listed,
            **note_labels_file(path),
            **read_custom_vision_manifest(path),
            **read_paddle_config(path),
            **sidecar.metadata,
        }
        signature = read_signature(file.proto, beside)
        label_source = (
            LABELS_JSON if listed else sidecar.name if "names" in sidecar.metadata else "its metadata"
        )
        interpretation = interpret_model(signature, label_source=label_source)
        labels, origin = choose_labels(
            path,
            signature.metadata,
            interpretation.class_count,
            label_source,
            background=interpretation.background,
            are_objects=not interpretation.is_classifier,
        )
    if (data_yaml := sidecar.data_yaml) is not None:
        labels, origin = data_yaml.labels(labels, origin)
        if data_yaml.names != labels:
            text = "%s: %s describes a training data set with %d class names; the file is ignored"
            log.warning(text, path, data_yaml.file, len(data_yaml.names))
    if origin == "nothing":
        log.warning("%s: no labels; put them into %s.labels.txt beside it, one per line", path, path.stem)
    interpretation = replace(interpretation, evidence=sidecar.evidence + interpretation.evidence)
    return Model(path.stem, path, file.sha256, labels, interpretation)


def find_bundled_model() -> Path:
    """The path of the bundled model.

    Raises:
        UnavailableError: it is missing from this installation.
    """
    return find_bundled_file(f"models/{BUNDLED_MODEL}")
