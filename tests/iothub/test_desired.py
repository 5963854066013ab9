"""Desired properties as a source of the configuration: applied, acknowledged, reported and kept on disk."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from visionedge.config.applied import Applied, SectionOutcome
from visionedge.config.schema import SECTIONS, Config
from visionedge.iothub import desired_properties
from visionedge.iothub.desired_properties import (
    ConfigurationSources,
    DesiredDocument,
    DesiredProperties,
    LastGoodFile,
)
from visionedge.runtime.retry import RetryPolicy

LOCAL: dict[str, Any] = {"telemetry": {"intervalSeconds": 5}, "model": {"path": "local.onnx"}}


class FakeConfigTarget:
    """Applies configurations like the service, rejects sections on demand, and records events."""

    def __init__(self, folder: Path, local: dict[str, Any] | None = None) -> None:
        self.path = folder / "desired.json"
        self.local = LOCAL if local is None else local
        self.applied: list[Config] = []
        self.started_with: Config | None = None
        self.refuse: dict[str, str] = {}
        self.status: Literal["pending", "rejected"] = "rejected"
        self.error: Exception | None = None
        self.events: list[tuple[str, str, Mapping[str, Any]]] = []
        self.hold: asyncio.Event | None = None
        self.given_way = asyncio.Event()
        self.retry_s = 3600.0

    def fill_disk(self, *, full: bool) -> None:
        """A file in the place of the folder: nothing can be written there, or can be again."""
        folder, away = self.path.parent, self.path.parent.with_name("away")
        if full:
            folder.rename(away)
            folder.touch()
        else:
            folder.unlink()
            away.rename(folder)

    def config_sources(self) -> ConfigurationSources:
        """The configuration sources at a start of the module."""
        return ConfigurationSources.read(self.local, LastGoodFile(self.path, "me"))

    async def apply(self, wanted: Config) -> Applied:
        """Make this the running configuration, except for the sections to refuse."""
        self.applied.append(wanted)
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        return outcome(self.refuse, self.status)

    def compare(self, wanted: Config) -> Applied:
        """The sections that differ from the last applied configuration."""
        running = self.applied[-1] if self.applied else self.started_with
        return outcome(
            {
                key: "other"
                for key, name in SECTIONS.items()
                if getattr(running, name) != getattr(wanted, name)
            }
            | self.refuse,
            self.status,
        )

    def run_scenario(self, scenario: Callable[[DesiredProperties], Awaitable[None]]) -> None:
        """Run a story with the task of a desired that belongs to a start of the module."""

        async def whole() -> None:
            sources = self.config_sources()
            self.started_with = sources.start.config
            desired = DesiredProperties(
                sources,
                self,
                lambda *event: self.events.append(event),
                cancel_pending_model=self.given_way.set,
                retry_policy=RetryPolicy(self.retry_s, 3600.0),
            )
            task = asyncio.create_task(desired.run())
            try:
                await scenario(desired)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(whole())

    @property
    def kept(self) -> DesiredDocument | None:
        """The document on disk."""
        return LastGoodFile(self.path, "me").read()


def outcome(refused: Mapping[str, str], status: Literal["pending", "rejected"]) -> Applied:
    """Every section is applied except the refused ones."""
    return Applied(
        {
            key: SectionOutcome(status, refused[key]) if key in refused else SectionOutcome("applied")
            for key in SECTIONS
        }
    )


def twin(version: int, **desired: Any) -> dict[str, Any]:
    """A twin as the hub gives it."""
    return {"desired": {**desired, "$version": version, "$metadata": {}}, "reported": {"$version": 1}}


def is_acknowledged(desired: DesiredProperties, version: int) -> bool:
    """Whether the acknowledgement answers this version."""
    entries = desired.acknowledgement.values()
    return bool(entries) and all(entry["version"] == version for entry in entries)


async def acknowledged(desired: DesiredProperties, version: int) -> dict[str, Any]:
    """Wait for the acknowledgement of a version."""
    async with asyncio.timeout(10):
        # The state changes on the loop, without an event.
        while not is_acknowledged(desired, version):  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)
    return desired.acknowledgement


def test_a_valid_document_is_applied_acknowledged_reported_and_kept(tmp_path: Path) -> None:
    """Merged over the local document; a removed key means the local value, or the default, again."""
    module = FakeConfigTarget(tmp_path)

    async def scenario(desired: DesiredProperties) -> None:
        desired.on_twin(twin(2, telemetry={"intervalSeconds": 1, "mode": "all"}, http={"port": 0}))
        answer = await acknowledged(desired, 2)
        assert {key: entry["status"] for key, entry in answer.items()} == {
            "http": "applied",
            "telemetry": "applied",
        }
        desired.on_twin(twin(3, telemetry={"mode": "none"}))
        assert (await acknowledged(desired, 3)).keys() == {"telemetry"}

    module.run_scenario(scenario)
    first, second = module.applied
    assert (first.telemetry.interval_seconds, first.telemetry.mode, first.http.port) == (1, "all", 0)
    assert (second.telemetry.interval_seconds, second.telemetry.mode, second.http.port) == (5, "none", 8080)
    assert [(code, details["sections"]) for code, _, details in module.events] == [
        ("config-applied", ["http", "telemetry"]),
        ("config-applied", ["http", "telemetry"]),
    ]
    assert module.kept == DesiredDocument(3, {"telemetry": {"mode": "none"}})


def test_a_wrong_document_changes_nothing_and_the_event_has_every_problem(tmp_path: Path) -> None:
    """Neither the running nor the saved configuration; and the next valid one is applied."""
    module = FakeConfigTarget(tmp_path)

    async def scenario(desired: DesiredProperties) -> None:
        desired.on_twin(twin(2, telemetry={"mode": "all"}))
        await acknowledged(desired, 2)
        desired.on_twin(twin(3, telemetry={"mode": "some", "x": 1}, http={"port": -1}))
        answer = await acknowledged(desired, 3)
        assert {entry["status"] for entry in answer.values()} == {"rejected"}
        desired.on_twin(twin(4, telemetry={"mode": "all"}))
        await acknowledged(desired, 4)

    module.run_scenario(scenario)
    assert len(module.applied) == 1
    (rejected,) = [details for code, _, details in module.events if code == "config-rejected"]
    assert rejected["version"] == 3
    assert len(rejected["problems"]) == 3
    assert module.kept == DesiredDocument(4, {"telemetry": {"mode": "all"}})


def test_an_unchanged_twin_is_not_applied_again(tmp_path: Path) -> None:
    """It is read once a minute, right or wrong."""
    module = FakeConfigTarget(tmp_path)

    async def scenario(desired: DesiredProperties) -> None:
        for _ in range(3):
            desired.on_twin(twin(2, telemetry={"mode": "all"}))
            await acknowledged(desired, 2)
        for _ in range(3):
            desired.on_twin(twin(3, telemetry={"mode": "some"}))
            await acknowledged(desired, 3)

    module.run_scenario(scenario)
    assert [code for code, _, _ in module.events] == ["config-applied", "config-rejected"]


def test_only_the_section_that_cannot_be_applied_is_rejected(tmp_path: Path) -> None:
    """The others are in force; the document on disk is the one in force, so a restart uses the same."""
    module = FakeConfigTarget(tmp_path)
    module.refuse = {"model": "new.onnx does not exist"}

    async def scenario(desired: DesiredProperties) -> None:
        desired.on_twin(twin(2, model={"path": "new.onnx"}, telemetry={"mode": "all"}))
        answer = await acknowledged(desired, 2)
        assert answer["model"]["reasons"] == ["model: new.onnx does not exist"]
        assert answer["telemetry"]["status"] == "applied"
        module.refuse = {}
        desired.on_twin(twin(3, model={"path": "newer.onnx"}, telemetry={"mode": "all"}))
        await acknowledged(desired, 3)

    module.run_scenario(scenario)
    assert [config.model.path for config in module.applied] == ["new.onnx", "newer.onnx"]
    assert [code for code, _, _ in module.events] == ["config-rejected", "config-applied", "config-applied"]
    assert module.kept == DesiredDocument(3, {"model": {"path": "newer.onnx"}, "telemetry": {"mode": "all"}})


def test_a_change_that_fails_is_rejected_and_the_next_one_is_processed(tmp_path: Path) -> None:
    """Any error, with its secrets masked."""
    module = FakeConfigTarget(tmp_path)
    module.error = RuntimeError("rtsp://me:hunter2@h broke")

    async def scenario(desired: DesiredProperties) -> None:
        desired.on_twin(twin(2, telemetry={"mode": "all"}))
        answer = await acknowledged(desired, 2)
        assert answer["telemetry"]["reasons"] == ["applying failed: rtsp://***@h broke"]
        module.error = None
        desired.on_twin(twin(3))
        desired.on_twin(twin(4, telemetry={}))
        assert (await acknowledged(desired, 4))["telemetry"]["status"] == "applied"

    module.run_scenario(scenario)
    # The previous document is applied again too, because the state of the failed change is unknown.
    assert [config.telemetry.mode for config in module.applied][:2] == ["all", "changes"]
    assert module.kept == DesiredDocument(4, {"telemetry": {}})


def test_of_documents_that_arrive_during_an_application_only_the_newest_is_applied_next(
    tmp_path: Path,
) -> None:
    """Those between would be undone at once."""
    module = FakeConfigTarget(tmp_path)

    async def scenario(desired: DesiredProperties) -> None:
        module.hold = asyncio.Event()
        desired.on_twin(twin(2, telemetry={"intervalSeconds": 2}))
        async with asyncio.timeout(10):
            while not module.applied:  # noqa: ASYNC110 - the double has no event for it
                await asyncio.sleep(0.001)
        for version in (3, 4, 5):
            desired.on_twin(twin(version, telemetry={"intervalSeconds": version}))
        module.hold.set()
        await acknowledged(desired, 5)

    module.run_scenario(scenario)
    assert [config.telemetry.interval_seconds for config in module.applied] == [2, 5]


def test_a_start_without_a_hub_uses_the_last_document_in_force(tmp_path: Path) -> None:
    """It is acknowledged; the same document from the hub is not applied a second time."""
    FakeConfigTarget(tmp_path).run_scenario(lambda desired: _desire(desired, 7, telemetry={"mode": "all"}))
    module = FakeConfigTarget(tmp_path)
    assert module.config_sources().start.config.telemetry.mode == "all"

    async def scenario(desired: DesiredProperties) -> None:
        assert desired.acknowledgement == {"telemetry": {"status": "applied", "version": 7}}
        desired.on_twin(twin(7, telemetry={"mode": "all"}))
        await asyncio.sleep(0)
        await acknowledged(desired, 7)

    module.run_scenario(scenario)
    assert module.applied == []
    assert module.events == []


def test_a_section_that_is_not_in_force_yet_at_the_start_has_no_acknowledgement(tmp_path: Path) -> None:
    """Sections that wait for the first engine are acknowledged when it is there, without any event."""
    wished: dict[str, Any] = {"telemetry": {"mode": "all"}, "inference": {"confidence": 0.9}}
    FakeConfigTarget(tmp_path).run_scenario(lambda desired: _desire(desired, 7, **wished))
    module = FakeConfigTarget(tmp_path)
    module.refuse = dict.fromkeys(("model", "inference"), "not in use yet: the engine is warming up")
    module.status = "pending"
    in_force = {"status": "applied", "version": 7}

    async def scenario(desired: DesiredProperties) -> None:
        assert desired.acknowledgement == {"telemetry": in_force}
        desired.on_twin(twin(7, **wished))
        await until(lambda: "version=7" in repr(desired))
        assert desired.acknowledgement == {"telemetry": in_force}
        module.refuse = {}
        desired.retry()
        await until(lambda: desired.acknowledgement == {"telemetry": in_force, "inference": in_force})

    module.run_scenario(scenario)
    assert module.applied == []
    assert module.events == []


async def _desire(desired: DesiredProperties, version: int, **document: Any) -> None:
    desired.on_twin(twin(version, **document))
    await acknowledged(desired, version)


def test_a_saved_document_that_is_no_longer_valid_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The module starts with its local document, reports it, and waits for the hub."""
    LastGoodFile(tmp_path / "desired.json", "me").keep(DesiredDocument(3, {"telemetry": {"gone": 1}}))
    start = FakeConfigTarget(tmp_path).config_sources().start
    assert start.desired is None
    assert start.config.telemetry.interval_seconds == 5
    assert "are not valid any more" in caplog.text


def test_only_the_local_file_may_allow_insecure_settings(tmp_path: Path) -> None:
    """The acknowledgement has the path of the key, beside all other problems."""
    module = FakeConfigTarget(tmp_path, {})
    model = {"url": "http://h/m.onnx", "sha256": "0" * 64, "allowInsecure": True}

    async def scenario(desired: DesiredProperties) -> None:
        desired.on_twin(twin(2, model=model, http={"port": -1}))
        answer = await acknowledged(desired, 2)
        assert any(reason.startswith("model.allowInsecure:") for reason in answer["model"]["reasons"])
        assert answer["http"]["status"] == "rejected"

    module.run_scenario(scenario)
    assert module.applied == []


def test_a_document_that_arrives_too_late_for_this_start_is_kept_for_the_next(tmp_path: Path) -> None:
    """If the engine cannot be opened with the last good document, the twin must be able to correct it."""
    module = FakeConfigTarget(tmp_path)

    async def scenario() -> None:
        desired = DesiredProperties(
            module.config_sources(), module, lambda *event: module.events.append(event)
        )
        await desired.save_pending()
        assert module.kept is None
        desired.on_twin(twin(8, inference={"device": "npu"}))
        await desired.save_pending()
        assert module.kept is None
        desired.on_twin(twin(9, inference={"device": "cpu"}))
        await desired.save_pending()

    asyncio.run(scenario())
    assert module.kept == DesiredDocument(9, {"inference": {"device": "cpu"}})
    assert module.applied == []


def test_a_rejected_section_is_tried_again_and_reported_once(tmp_path: Path) -> None:
    """A model server that recovers is used without another change of the twin."""
    module = FakeConfigTarget(tmp_path)
    module.refuse = {"model": "the server does not answer"}
    module.retry_s = 0.001

    async def scenario(desired: DesiredProperties) -> None:
        desired.on_twin(twin(2, model={"path": "new.onnx"}, telemetry={"mode": "all"}))
        async with asyncio.timeout(10):
            while len(module.applied) < 4:  # noqa: ASYNC110 - the double has no event for it
                await asyncio.sleep(0.001)
        assert desired.acknowledgement["model"]["status"] == "rejected"
        module.refuse = {}
        async with asyncio.timeout(10):
            while desired.acknowledgement["model"]["status"] != "applied":  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.001)

    module.run_scenario(scenario)
    assert [code for code, _, _ in module.events] == ["config-rejected", "config-applied", "config-applied"]
    assert module.kept == DesiredDocument(2, {"model": {"path": "new.onnx"}, "telemetry": {"mode": "all"}})


@pytest.mark.parametrize("name", [None, "small"])
def test_a_newer_model_replaces_a_pending_download(tmp_path: Path, name: str | None) -> None:
    """The section `model` or one of `models`; other sections wait their turn."""
    module = FakeConfigTarget(tmp_path)

    def wanted(path: str) -> dict[str, Any]:
        return {"model": {"path": path}} if name is None else {"models": {name: {"path": path}}}

    async def scenario(desired: DesiredProperties) -> None:
        module.hold = asyncio.Event()
        desired.on_twin(twin(2, **wanted("slow.onnx")))
        async with asyncio.timeout(10):
            while not module.applied:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.001)
        desired.on_twin(twin(3, **wanted("slow.onnx"), telemetry={"mode": "all"}))
        assert not module.given_way.is_set()
        desired.on_twin(twin(4, **wanted("other.onnx")))
        assert module.given_way.is_set()
        module.hold.set()
        await acknowledged(desired, 4)

    module.run_scenario(scenario)
    applied = [config.model if name is None else config.models[name] for config in module.applied]
    assert [model.path for model in applied] == ["slow.onnx", "other.onnx"]


# --- what is not in force, or not on disk, yet --------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that changes on the loop or on a thread of it."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - as in `acknowledged`
            await asyncio.sleep(0.001)


def test_a_document_that_a_full_disk_rejects_is_acknowledged_as_not_saved_and_saved_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after that brings back nothing that was switched off."""
    monkeypatch.setattr(desired_properties, "_SAVE_RETRY_S", 0.01)
    module = FakeConfigTarget(tmp_path)
    module.fill_disk(full=True)

    async def scenario(desired: DesiredProperties) -> None:
        desired.on_twin(twin(2, telemetry={"mode": "none"}))
        answer = await acknowledged(desired, 2)
        assert answer == {"telemetry": {"status": "applied", "version": 2, "kept": False}}
        assert module.kept is None
        module.fill_disk(full=False)
        await until(lambda: module.kept is not None)
        await until(lambda: "kept" not in desired.acknowledgement["telemetry"])
        assert desired.acknowledgement == {"telemetry": {"status": "applied", "version": 2}}

    module.run_scenario(scenario)
    assert module.config_sources().start.config.telemetry.mode == "none"


def test_a_section_that_waits_for_the_engine_is_applied_once_it_is_open(tmp_path: Path) -> None:
    """Until then it is not acknowledged as applied; sections without desired properties get no answer."""
    module = FakeConfigTarget(tmp_path)
    module.refuse = dict.fromkeys(("model", "inference"), "not in use yet: the engine is warming up")

    async def scenario(desired: DesiredProperties) -> None:
        desired.on_twin(twin(2, telemetry={"mode": "all"}, inference={"confidence": 0.9}))
        answer = await acknowledged(desired, 2)
        assert {key: entry["status"] for key, entry in answer.items()} == {
            "telemetry": "applied",
            "inference": "rejected",
        }
        assert module.kept == DesiredDocument(2, {"telemetry": {"mode": "all"}})
        module.refuse = {}
        desired.retry()
        await until(lambda: desired.acknowledgement["inference"]["status"] == "applied")
        await until(
            lambda: (
                module.kept
                == DesiredDocument(2, {"telemetry": {"mode": "all"}, "inference": {"confidence": 0.9}})
            )
        )

    module.run_scenario(scenario)
    assert [config.inference.confidence for config in module.applied] == [0.9, 0.9]


def test_a_rejected_section_does_not_mark_pending_sections_as_applied(tmp_path: Path) -> None:
    """A document that equals the one before the rejection is applied too."""
    module = FakeConfigTarget(tmp_path)

    async def scenario(desired: DesiredProperties) -> None:
        module.refuse = {"inference": "not in use yet"}
        desired.on_twin(twin(2, inference={"confidence": 0.9}))
        await acknowledged(desired, 2)
        module.refuse = {}
        desired.on_twin(twin(3, inference={}))
        await acknowledged(desired, 3)

    module.run_scenario(scenario)
    assert [config.inference.confidence for config in module.applied] == [0.9, 0.3]


def test_a_reloaded_local_document_stays_below_the_twin(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A document that is not valid, alone or with the twin, is logged with every problem and not used."""
    caplog.set_level("INFO")
    module = FakeConfigTarget(tmp_path)

    async def scenario(desired: DesiredProperties) -> None:
        desired.on_twin(twin(2, telemetry={"mode": "all"}))
        await acknowledged(desired, 2)
        desired.reload(lambda: {"telemetry": {"intervalSeconds": 7, "mode": "none"}, "http": {"port": 1}})
        await until(lambda: "the configuration file is applied: http, model, telemetry" in caplog.text)
        desired.reload(lambda: {"telemetry": {"intervalSeconds": -7, "x": 1}})
        await until(lambda: "the configuration file is not used: 2 problems" in caplog.text)
        desired.on_twin(twin(3, telemetry={}))
        await acknowledged(desired, 3)

    module.run_scenario(scenario)
    answer = [(each.telemetry.interval_seconds, each.telemetry.mode) for each in module.applied]
    assert answer == [(5, "all"), (7, "all"), (7, "none")]
    assert "telemetry.x" in caplog.text


def test_a_section_of_the_file_that_cannot_be_applied_stays_unchanged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are applied; read once more the file is tried again."""
    caplog.set_level("INFO")
    module = FakeConfigTarget(tmp_path)

    async def scenario(desired: DesiredProperties) -> None:
        module.refuse = {"http": "the port is in use"}
        desired.reload(lambda: {"telemetry": {"intervalSeconds": 7}, "http": {"port": 1}})
        await until(lambda: "the configuration file is applied: model, telemetry" in caplog.text)
        module.refuse = {}
        desired.reload(lambda: {"telemetry": {"intervalSeconds": 7}, "http": {"port": 1}})
        await until(lambda: "the configuration file is applied: http" in caplog.text)

    module.run_scenario(scenario)
    assert [each.http.port for each in module.applied] == [1, 1]
    assert "http: the port is in use; this section stays as it was" in caplog.text
