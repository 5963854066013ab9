"""The variants of a model that are found: beside it or in the data folder, undamaged and its own."""

import json
import os
from pathlib import Path

import pytest

from tiny_models import TinyDetector
from visionedge.errors import ModelError
from visionedge.model.model import Model, load_model
from visionedge.model.parity import Parity, Tolerance
from visionedge.model.quantization.variants import (
    _list_reports,
    find_variants,
    make_tolerance_document,
    make_variant_path,
    require_variant,
    save_variant,
    select_variants,
)

GOOD = Parity(pictures=8, boxes=100, matched=0.97, score_shift=0.01, max_score_shift=0.1)


def kept(folder: Path) -> tuple[Model, Path]:
    """A model with an int8 variant beside it."""
    model = load_model(TinyDetector().save(folder / "tiny.onnx"))
    path = make_variant_path(model, "int8")
    save_variant(
        path, TinyDetector(seed=1).proto(), model, "int8", report("a test's", "2026-01-01T00:00:00Z")
    )
    return model, path


def keep_for_openvino(model: Model) -> Path:
    path = make_variant_path(model, "int8", runtime="openvino")
    document = report("for OpenVINO", "2026-01-01T00:00:00Z")
    save_variant(path, TinyDetector(seed=2).proto(), model, "int8", document, runtime="openvino")
    return path


def report(recipe: str, at: str) -> dict[str, object]:
    return {
        "recipe": recipe,
        "parity": GOOD.document(),
        "tolerance": make_tolerance_document(Tolerance()),
        "made": {"at": at},
    }


def test_a_variant_is_found_beside_its_model(tmp_path: Path) -> None:
    model, path = kept(tmp_path)
    (found,) = find_variants(model)
    assert (found.precision, found.path, found.parity, found.refusal) == ("int8", path, GOOD, None)
    assert found.of(model).interpretation == model.interpretation


@pytest.mark.parametrize("harm", ["network", "report", "size", "gone", "schema", "other model"])
def test_a_damaged_or_foreign_variant_is_excluded(tmp_path: Path, harm: str) -> None:
    """With a word in the log, and without an error: fp32 is always there."""
    model, path = kept(tmp_path)
    file = path.with_suffix(".json")
    document = json.loads(file.read_bytes())
    if harm == "network":
        TinyDetector(seed=9).save(path)
    elif harm == "report":
        file.write_text("{")
    elif harm == "size":
        os.truncate(file, 3 << 30)  # takes no room on the disk
    elif harm == "gone":
        path.unlink()
    elif harm == "schema":
        file.write_text(json.dumps(document | {"schema": "visionedge/parity/0"}))
    else:
        model = load_model(TinyDetector(seed=5).save(model.path))
    assert find_variants(model) == ()


def test_a_variant_with_other_preprocessing_is_excluded(tmp_path: Path) -> None:
    """Its ranges were set by pictures that were prepared as they then were."""
    model, _ = kept(tmp_path)
    model.path.with_suffix(".yaml").write_text(json.dumps({"input": {"color": "rgb"}}))
    assert find_variants(load_model(model.path)) == ()


def test_the_newer_of_two_variants_is_used(tmp_path: Path) -> None:
    """One beside the model, one in the data folder."""
    model, _ = kept(tmp_path)
    data = tmp_path / "data"
    save_variant(
        make_variant_path(model, "int8", data=data),
        TinyDetector(seed=3).proto(),
        model,
        "int8",
        report("the newer one", "2026-02-01T00:00:00Z"),
    )
    assert [variant.recipe for variant in find_variants(model, data)] == ["the newer one"]
    assert [variant.recipe for variant in find_variants(model)] == ["a test's"]


def test_a_variant_for_openvino_stands_beside_the_general_one(tmp_path: Path) -> None:
    """OpenVINO computes its own one, onnxruntime the general one."""
    model, general = kept(tmp_path)
    own = keep_for_openvino(model)
    assert own.name == "tiny.int8.openvino.onnx"
    found = find_variants(model)
    assert [variant.path for variant in found] == [general, own]
    assert [variant.path for variant in select_variants(found, "onnxruntime")] == [general]
    assert [variant.path for variant in select_variants(found, "openvino")] == [own]
    assert require_variant(model, "int8", None).path == general
    general.unlink()
    with pytest.raises(ModelError, match="has no int8 variant"):
        require_variant(model, "int8", None)


def test_a_variant_for_openvino_under_the_name_of_the_general_one_is_excluded(tmp_path: Path) -> None:
    model, general = kept(tmp_path)
    own = keep_for_openvino(model)
    own.replace(general)
    own.with_suffix(".json").replace(general.with_suffix(".json"))
    assert find_variants(model) == ()


def test_a_data_folder_that_may_not_be_entered_has_no_variants(tmp_path: Path) -> None:
    """Root may enter every folder, so for this moment the process is another user."""
    model, _ = kept(tmp_path)
    closed = tmp_path / "closed"
    (closed / "variants").mkdir(parents=True)
    closed.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        list(_list_reports(model, "int8", closed, None))
    finally:
        os.seteuid(user)
        closed.chmod(0o700)
