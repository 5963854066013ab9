"""What version 0.1 has left behind keeps working: a configuration, a twin, the plain files of a data folder.

The files in `version_0_1` were written by that version. A key that was renamed is refused with its new name.
"""

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from next_version import Kind, next_format
from visionedge.camera.registry import SequenceStore
from visionedge.config.documents import read_configuration
from visionedge.config.load import parse_config
from visionedge.config.schema import Config
from visionedge.engine.engine_choice import CHOICES_FOLDER
from visionedge.engine.plan import PlanCache, PlanKey
from visionedge.errors import ConfigError
from visionedge.iothub.desired_properties import (
    DESIRED_FILE_NAME,
    ConfigurationSources,
    LastGoodFile,
    overlay_desired,
    read_desired_document,
)
from visionedge.model.model_store import make_model_path
from visionedge.model.quantization.variants import VARIANTS_FOLDER
from visionedge.outbound import sqlite_store
from visionedge.outbound.spool import Spool
from visionedge.runtime.threads import ThreadGroup

VERSION_0_1 = Path(__file__).with_name("version_0_1")
ENVIRON = {"DOCK_USER": "me", "DOCK_PASSWORD": "pass"}
OWNER = "hub.example/site-3/vision"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A copy of the data folder of version 0.1."""
    return Path(shutil.copytree(VERSION_0_1 / "data", tmp_path / "data"))


def local() -> dict[str, Any]:
    return read_configuration(VERSION_0_1 / "vision.yaml", ENVIRON)


def twin() -> dict[str, Any]:
    return {"desired": json.loads((VERSION_0_1 / "desired_properties.json").read_text())}


# --- configuration ------------------------------------------------------------------------------------------


def test_a_configuration_of_version_0_1_is_read() -> None:
    config = parse_config(local())
    assert list(config.cameras) == ["dock", "yard", "clip"]
    assert config.cameras["dock"].uri == "rtsp://me:pass@192.0.2.5/stream1"
    assert (config.cameras["dock"].fps, config.cameras["yard"].fps) == (10, 5)
    assert config.cameras["yard"].tls is not None
    assert config.inference.fallback == "degrade"
    assert config.inference.parity == "off"
    assert config.telemetry.spool_hours == 168


def test_that_configuration_has_every_section_of_the_schema() -> None:
    """So that a key that is renamed later cannot be missed."""
    sections = {key for key in local() if not key.startswith("x-")}
    assert sections == set(Config().model_dump(by_alias=True)) - {"events", "log", "models"}  # newer than 0.1


def test_the_renamed_key_is_refused_with_its_new_name() -> None:
    document = {**local(), "overload": {"ladder": ["gate", "fps"]}}
    with pytest.raises(ConfigError) as refused:
        parse_config(document)
    assert refused.value.problems == ("overload.ladder: unknown key; it is called 'levels' now",)
    assert parse_config({**local(), "overload": {"levels": ["gate", "fps"]}}).overload.levels == (
        "gate",
        "fps",
    )


def test_the_desired_properties_of_a_twin_are_read() -> None:
    desired = read_desired_document(twin())
    assert desired is not None
    assert desired.version == 7
    config = parse_config(overlay_desired(local(), desired.document))
    assert config.cameras["dock"].fps == 2
    assert config.cameras["gate"].enabled is False
    assert config.inference.classes == ("person", "car")
    assert (config.telemetry.mode, config.overload.when) == ("all", "always")


# --- data folder --------------------------------------------------------------------------------------------


def test_the_last_good_desired_properties_are_in_force_at_a_start_without_a_hub(data: Path) -> None:
    last_good = LastGoodFile(data / DESIRED_FILE_NAME, OWNER)
    start = ConfigurationSources.read(local(), last_good).start
    assert last_good.file.lost is None
    assert start.desired == read_desired_document(twin())
    assert start.config.inference.confidence == 0.45


def test_last_good_desired_properties_with_a_renamed_key_are_ignored_and_the_log_names_it(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The module starts with its local file, and the twin is refused with the same words."""
    path = data / DESIRED_FILE_NAME
    document = json.loads(path.read_text())
    document["desired"]["overload"] = {"ladder": ["fps"]}
    path.write_text(json.dumps(document))
    start = ConfigurationSources.read(local(), LastGoodFile(path, OWNER)).start
    assert start.desired is None
    assert "overload.ladder: unknown key; it is called 'levels' now" in caplog.text


def test_the_sequence_numbers_of_cameras_continue(data: Path) -> None:
    """With a clock that was set back, too."""
    sequences = SequenceStore(data / "sequences.json", lambda: 1_600_000_000.0)
    assert sequences.file.lost is None
    assert sequences.first("dock") > 1_700_000_012_345
    assert sequences.first("yard") > 1_700_000_000_077
    assert (sequences.last_epoch("dock"), sequences.last_epoch("yard")) == (4, 1)


@pytest.mark.parametrize(
    "kinds", [[], ["additive"], ["incompatible"]], ids=["today", "next", "next and back"]
)
def test_the_waiting_messages_are_sent_and_the_numbers_continue(
    data: Path, kinds: list[Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under today's version, after an update to a made-up next one, and after a roll-back from it."""
    path = data / "spool.db"
    with sqlite3.connect(path) as database:
        database.executescript((data / "spool.sql").read_text())
    database.close()
    sent: list[str] = []

    def run() -> Spool:
        """One run of a version, which sends what waits."""
        spool = Spool(path, OWNER, ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}")))
        for _ in range(3):
            spool._write_and_refill()
            while (message := spool.peek()) is not None:
                sent.append(message.message_id)
                spool.settle(message)
        spool._close_store()
        return spool

    for kind in kinds:
        with monkeypatch.context() as patch:
            patch.setattr(sqlite_store, "FORMAT", next_format(kind))
            assert run().spent == {"2026-11-29": 41}
    spool = run()
    assert sent == [
        f"0a1b2c3d-{name}" for name in ("detections-3", "detections-4", "detections-5", "events-1")
    ]
    assert spool.last_numbers == {"detections": 5, "events": 1}
    assert not list(data.glob("*.aside"))


def test_a_measured_plan_of_version_0_1_is_used(data: Path) -> None:
    """By the same versions, that is: after an update plans are measured afresh in any case."""
    versions = ("visionedge 0.1.0", "onnxruntime 1.22.0")
    graph = hashlib.sha256(b"graph").hexdigest()
    key = PlanKey(graph, "cpu", "Example CPU", versions, 4, 8, None)
    plan = PlanCache(data / "plans").load(key)
    assert plan is not None
    assert (plan.choice.lanes, plan.choice.batch, plan.buckets) == (2, 1, (1,))
    assert plan.table[0].frames_per_s == 46.5


def test_downloaded_models_and_variants_are_found_at_their_old_paths(data: Path) -> None:
    sha256 = "0123456789ABCDEF" * 4
    assert make_model_path(data, sha256) == data / "models" / f"{sha256.lower()}.onnx"
    assert (CHOICES_FOLDER, VARIANTS_FOLDER) == ("engines", "variants")
