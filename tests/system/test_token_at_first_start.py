"""A module that other machines can reach, started without a token."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

from module_process import ModuleProcess

pytestmark = pytest.mark.system


def print_token(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`visionedge token` beside the module, as `docker exec` runs it."""
    return run_beside(data, "token", *arguments)


def run_beside(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command with the data folder of the module, and nothing else of its environment."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("IOTEDGE_", "VISIONEDGE_"))}
    environ |= {"VISIONEDGE_DATA": str(data)}
    return subprocess.run(
        [sys.executable, "-m", "visionedge", *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def status_of(url: str, token: str | None = None) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - http, by ready()
    try:
        with urllib.request.urlopen(request, timeout=15) as answer:  # noqa: S310 - http, by ready()
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_it_makes_a_token_which_the_command_token_prints(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert print_token(data).returncode == 1
    with ModuleProcess(data, "--http", "0.0.0.0:0") as module:
        url = module.ready()
        printed = print_token(data)
        assert printed.returncode == 0
        token = printed.stdout.strip()
        assert status_of(f"{url}api/v1/status")[0] == 401
        assert status_of(f"{url}api/v1/status", "wrong")[0] == 401
        assert status_of(f"{url}healthz")[0] == 200
        code, body = status_of(f"{url}api/v1/status", token)
        assert (code, json.loads(body)["http"]) == (200, {"access": "token"})
        assert token not in status_of(f"{url}api/v1/log", token)[1].decode()
        assert "visionedge token" in module.log
        assert token not in module.log
        module.stop()
    with ModuleProcess(data, "--http", "0.0.0.0:0") as module:
        assert status_of(f"{module.ready()}api/v1/status", token)[0] == 200
        module.stop()


def test_the_bundle_of_the_doctor_has_the_state_of_a_module_that_made_its_token(tmp_path: Path) -> None:
    data, bundle = tmp_path / "data", tmp_path / "b.zip"
    with ModuleProcess(data, "--http", "0.0.0.0:0") as module:
        port = module.ready().rstrip("/").rpartition(":")[2]
        done = run_beside(data, "doctor", "--http", f"127.0.0.1:{port}", "--bundle", str(bundle))
        assert done.returncode == 0, done.stderr
        token = print_token(data).stdout.strip()
        module.stop()
    with zipfile.ZipFile(bundle) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert json.loads(texts["module/status.json"])["http"] == {"access": "token"}
    assert "visionedge token" in texts["module/log.txt"]
    assert token
    assert all(token not in text for text in texts.values())


def test_who_wants_it_open_gets_it_open_and_a_warning(tmp_path: Path) -> None:
    data, config = tmp_path / "data", tmp_path / "vision.yaml"
    config.write_text("cameras: {demo: {uri: 'demo:'}}\nhttp: {allowAnonymous: true}\n")
    with ModuleProcess(data, "--config", str(config), "--http", "0.0.0.0:0") as module:
        code, body = status_of(f"{module.ready()}api/v1/status")
        assert (code, json.loads(body)["http"]) == (200, {"access": "anonymous"})
        assert "allowAnonymous" in module.log
        printed = print_token(data, "--config", str(config))
        assert printed.returncode == 1
        assert "allowAnonymous" in printed.stderr
        module.stop()
