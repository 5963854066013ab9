"""A short recount run; `make recount` is the long one."""

from pathlib import Path

import pytest

from recount_run import RecountRun


@pytest.mark.shared
@pytest.mark.timeout(300)  # the module starts four times
def test_every_event_is_counted_again_over_kills_a_model_change_a_lost_device_and_a_reconnect(
    shared_data: Path, tmp_path: Path
) -> None:
    figures = RecountRun(15, shared_data, tmp_path).run()
    assert figures["broken"] == []
    assert [*figures["models"]] == ["bundled_yolox_nano_416", "picodet_s_416_coco80"]
    assert figures["devices"].keys() == {"cuda", "cpu"}
    assert figures["types"].keys() >= {"zone-entered", "zone-left", "zone-lost", "line-crossed"}
    assert "hall 2" in figures["epochs"]
