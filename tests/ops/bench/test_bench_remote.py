"""`bench remote`: the servers and the CPU in turns, and the way there by the configuration."""

import json
from pathlib import Path

import pytest

from scripted_inference import HttpInferenceServer, InferenceModel
from tiny_models import TinyDetector
from visionedge.__main__ import main


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path / "data"))


def write_config(folder: Path, url: str, path: Path) -> Path:
    """A configuration with one server."""
    section = {"url": url, "model": "tiny", "insecure": True}
    document = {"inference": {"device": "remote", "remote": section}, "model": {"path": str(path)}}
    config = folder / "vision.json"
    config.write_text(json.dumps(document), encoding="utf-8")
    return config


def test_both_sides_are_measured_for_each_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = TinyDetector().save(tmp_path / "tiny.onnx")
    with HttpInferenceServer(InferenceModel(path)) as server:
        config = write_config(tmp_path, server.url, path)
        short = ["--seconds", "0.01", "--rounds", "5", "--batch", "1,3", "--json", str(tmp_path / "r.json")]
        assert main(["bench", "remote", "--config", str(config), *short]) == 0
        assert {1, 3} <= set(server.model.batches)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["schema"], report["servers"]) == ("visionedge/bench-remote/1", [server.url])
    assert [row["batch"] for row in report["batches"]] == [1, 3]
    for row in report["batches"]:
        assert row["remoteMs"] > 0
        assert row["localMs"] > 0
        assert row["remoteToLocal"] > 0
    text = capsys.readouterr().out
    assert main(["bench", "compare", *[str(tmp_path / "r.json")] * 2]) == 0
    assert "remote to local, batch 3" in capsys.readouterr().out
    assert "remote ms   local ms   remote/local" in text


def test_without_a_server_the_benchmark_ends_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = TinyDetector().save(tmp_path / "tiny.onnx")
    config = write_config(tmp_path, "http://127.0.0.1:9", path)
    assert main(["bench", "remote", "--config", str(config)]) == 3
    assert "Connection refused (remote-unreachable)" in capsys.readouterr().err


def test_without_a_configuration_the_benchmark_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VISIONEDGE_CONFIG", raising=False)
    assert main(["bench", "remote"]) == 2
    assert "inference.remote: 'device: remote' needs 'url' and 'model'" in capsys.readouterr().err
