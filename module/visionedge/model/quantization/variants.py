"""Variants of a model in other precisions: a network beside it or in the data folder, each with a report.

    MODEL.int8.onnx    the network, same inputs and outputs as the model's
    MODEL.int8.json    its model, how it was made, and its comparison with fp32 (``visionedge/parity/1``)

``MODEL.int8.openvino.onnx`` is a variant for OpenVINO only, which computes it instead of the other one: where
integers pay differs between runtimes.

In the data folder they are named by the sha256 of the model. A variant is used only with its report, and
only for the very model and preprocessing that it was made for.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx

from visionedge.errors import ModelError, VisionedgeError
from visionedge.model.model import Model
from visionedge.model.onnx_file import read_model_file
from visionedge.model.parity import Parity, Tolerance
from visionedge.model.quantization.search import Precision
from visionedge.runtime.files import read_regular_file, write_atomically

log = logging.getLogger(__name__)

REPORT_SCHEMA = "visionedge/parity/1"
VARIANTS_FOLDER = "variants"
VariantRuntime = Literal["openvino"]
"""A runtime that has variants of its own."""

_KINDS: tuple[tuple[Precision, VariantRuntime | None], ...] = (
    ("int8", None),
    ("int8", "openvino"),
    ("fp16", None),
)
_MAX_REPORT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Variant:
    """A network of a model in another precision, and its report.

    `refusal`: why it must not be used, or None. `runtime`: the only one that computes it, or None.
    """

    precision: Precision
    path: Path
    sha256: str
    recipe: str
    parity: Parity
    tolerance: Tolerance
    refusal: str | None
    made_at: str = ""
    runtime: VariantRuntime | None = None

    def of(self, model: Model) -> Model:
        """The model with this network and the same interpretation."""
        return replace(model, path=self.path, sha256=self.sha256)


def find_variants(model: Model, data: Path | None = None, into: Path | None = None) -> tuple[Variant, ...]:
    """The variants of a model, for each precision and runtime the one that was made last.

    They are looked for beside the model (or in the folder `into` instead) and in the data folder.

    Damaged files, and those of other models, are logged and skipped.
    """
    newest: list[Variant] = []
    for precision, runtime in _KINDS:
        found = [
            _read_variant(model, precision, runtime, report)
            for report in _list_reports(model, precision, data, into, runtime)
        ]
        if there := [variant for variant in found if variant is not None]:
            newest.append(max(there, key=lambda variant: variant.made_at))
    return tuple(newest)


def select_variants(variants: Iterable[Variant], runtime: str) -> list[Variant]:
    """Those that a runtime computes: its own in place of the general one of the same precision."""
    fitting = [variant for variant in variants if variant.runtime in (None, runtime)]
    own = {variant.precision for variant in fitting if variant.runtime is not None}
    return [variant for variant in fitting if variant.runtime is not None or variant.precision not in own]


def is_usable(variant: Variant, tolerance: Tolerance | None = None) -> bool:
    """Whether it is within a tolerance: by default the one that it was made with."""
    return variant.parity.refusal(tolerance or variant.tolerance) is None


def make_variant_path(
    model: Model,
    precision: Precision,
    folder: Path | None = None,
    data: Path | None = None,
    *,
    runtime: VariantRuntime | None = None,
) -> Path:
    """Where a variant of a model lies: in `folder` under the model's name, or under `data` by its sum."""
    name = ".".join([precision, *filter(None, [runtime]), "onnx"])
    if data is not None:
        return data / VARIANTS_FOLDER / f"{model.sha256[:32]}.{name}"
    return (folder or model.path.parent) / f"{model.path.stem}.{name}"


def hash_preprocess(model: Model) -> str:
    """A hash of the preprocessing, for which the ranges of a variant were measured."""
    interpretation = model.interpretation
    size = (interpretation.input.name, interpretation.input.width_px, interpretation.input.height_px)
    return hashlib.sha256(repr((interpretation.head, size, interpretation.preprocess)).encode()).hexdigest()[
        :32
    ]


def save_variant(
    path: Path,
    network: onnx.ModelProto,
    model: Model,
    precision: Precision,
    report: Mapping[str, Any],
    *,
    runtime: VariantRuntime | None = None,
) -> None:
    """Write a variant and its report, the report last: without it the network is not used.

    `report` says the rest: recipe, parity, tolerance, refused, speed, tried, made.

    Raises:
        OSError: it cannot be written.
    """
    content = network.SerializeToString()
    document = {
        "schema": REPORT_SCHEMA,
        "model": {"name": model.name, "sha256": model.sha256, "preparation": hash_preprocess(model)},
        "variant": {
            "precision": precision,
            "runtime": runtime,
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        **report,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    report_path = path.with_suffix(".json")
    report_path.unlink(missing_ok=True)
    write_atomically(path, content)
    write_atomically(report_path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _list_reports(
    model: Model,
    precision: Precision,
    data: Path | None,
    into: Path | None,
    runtime: VariantRuntime | None = None,
) -> Iterator[Path]:
    places = [make_variant_path(model, precision, data=data, runtime=runtime)] if data is not None else []
    for place in (*places, make_variant_path(model, precision, into, runtime=runtime)):
        report = place.with_suffix(".json")
        # Unlike Path.is_file, this also answers for a folder that may not be entered.
        if os.path.isfile(report) and place != model.path:  # noqa: PTH113
            yield report


def _read_variant(
    model: Model, precision: Precision, runtime: VariantRuntime | None, report: Path
) -> Variant | None:
    path = report.with_suffix(".onnx")
    try:
        document = _read_document(report)
        if (words := _explain_mismatch(document, model, precision, runtime)) is not None:
            log.warning("%s: %s; not used", path, words)
            return None
        sha256 = _check_sum(path, document["variant"]["sha256"])
        return replace(_variant(document, precision, path, sha256), runtime=runtime)
    except (
        OSError,
        ArithmeticError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
        VisionedgeError,
    ) as error:
        log.warning("%s: cannot be used (%s); make the variant again", report, error)
        return None


def _variant(document: Mapping[str, Any], precision: Precision, path: Path, sha256: str) -> Variant:
    parity, tolerance = Parity.from_document(document["parity"]), _parse_tolerance(document["tolerance"])
    refusal = document.get("refused") or parity.refusal(tolerance)
    made_at = str(document["made"]["at"])
    return Variant(precision, path, sha256, str(document["recipe"]), parity, tolerance, refusal, made_at)


def _read_document(report: Path) -> Mapping[str, Any]:
    document: Mapping[str, Any] = json.loads(read_regular_file(report, max_bytes=_MAX_REPORT_BYTES))
    if document["schema"] != REPORT_SCHEMA:
        raise ValueError(f"its schema is {document['schema']}")
    return document


def _check_sum(path: Path, expected: str) -> str:
    if (sha256 := read_model_file(path).sha256) != expected:
        raise ValueError("the network is not the one it was written for")
    return sha256


def _explain_mismatch(
    document: Mapping[str, Any], model: Model, precision: Precision, runtime: VariantRuntime | None
) -> str | None:
    """Why a report does not belong to this model and its preprocessing; None if it does."""
    if document["variant"]["precision"] != precision:
        return f"is {document['variant']['precision']} by its report"
    if document["variant"].get("runtime") != runtime:
        return f"was made for {document['variant'].get('runtime') or 'every runtime'} by its report"
    if document["model"]["sha256"] != model.sha256:
        return f"is a variant of another version of {model.name}"
    if document["model"]["preparation"] != hash_preprocess(model):
        return f"was made for another preprocessing of {model.name}"
    return None


def make_tolerance_document(tolerance: Tolerance) -> dict[str, float]:
    """A tolerance as reports have it."""
    return {
        "unmatched": tolerance.unmatched,
        "scoreShift": tolerance.score_shift,
        "apLoss": tolerance.ap_loss,
    }


def _parse_tolerance(document: Mapping[str, Any]) -> Tolerance:
    return Tolerance(float(document["unmatched"]), float(document["scoreShift"]), float(document["apLoss"]))


def require_variant(
    model: Model, precision: Precision, data: Path | None, into: Path | None = None
) -> Variant:
    """The variant of a precision, for every runtime, that the configuration demands.

    Raises:
        ModelError: there is none, or its report refuses it; and how to make one.
    """
    remedy = f"visionedge model compile {model.path} --precision {precision}"
    remedy += " --calibrate DIR" if precision == "int8" else ""
    variant = next(
        (v for v in find_variants(model, data, into) if (v.precision, v.runtime) == (precision, None)), None
    )
    if variant is None:
        raise ModelError(f"{model.path}: has no {precision} variant; make one: {remedy}")
    if variant.refusal is not None:
        raise ModelError(
            f"{model.path}: its {precision} variant is refused by its report: {variant.refusal};"
            f" make it again: {remedy}"
        )
    return variant
