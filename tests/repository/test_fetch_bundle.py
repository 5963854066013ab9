"""deploy/fleet/fetch_bundle.py: the zip that the direct method `bundle` gives, over a stand-in for `az`."""

import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from repository_paths import REPOSITORY

SCRIPT = REPOSITORY / "deploy" / "fleet" / "fetch_bundle.py"

# It answers as the module does; the file `busy` has the errors that it gives first.
_AZ = """#!{python}
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, {module!r})
from visionedge.app.support_bundle import SupportBundle
from visionedge.iothub.direct_methods import DirectMethod, MethodDispatcher

folder = Path(__file__).parent
words = sys.argv[1:]
assert words[:3] == ["iot", "hub", "invoke-module-method"], words
given = dict(zip(words[3::2], words[4::2]))
wanted = {{"--hub-name": "hub", "--module-id": "vision", "--method-name": "bundle"}}
assert wanted.items() <= given.items(), words
if given["--device-id"] != "edge-01":
    sys.exit("ERROR: something before\\nERROR: device not found")
busy = folder / "busy"
left = busy.read_text().split()
busy.write_text(" ".join(left[1:]))

async def zipped():
    return (folder / "data").read_bytes()

async def answer():
    bundle = SupportBundle(zipped)
    await bundle.answer({{}})
    methods = MethodDispatcher({{"bundle": DirectMethod(bundle.answer, 5, {{"id": str, "chunk": int}})}})
    return await methods.answer("bundle", json.loads(given["--method-payload"]))

if left:
    print(json.dumps({{"status": int(left[0]), "payload": {{"error": {{"code": "c", "message": "m"}}}}}}))
else:
    result = asyncio.run(answer())
    print(json.dumps({{"status": result.status, "payload": result.document}}))
"""


class Device:
    """A device with a bundle, behind the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = random.Random(1).randbytes(250_000)  # noqa: S311 - content of a zip
        (folder / "data").write_bytes(self.data)
        self.busy("")
        az = folder / "az"
        az.write_text(_AZ.format(python=sys.executable, module=str(REPOSITORY / "module")))
        az.chmod(az.stat().st_mode | stat.S_IXUSR)

    def busy(self, errors: str) -> None:
        """Answer the next calls with these statuses."""
        (self.folder / "busy").write_text(errors)

    def fetch(self, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the script."""
        folders = f"{self.folder}{os.pathsep}{os.environ['PATH']}" if path is None else path
        return subprocess.run(
            [sys.executable, str(SCRIPT), "--hub", "hub", "--wait", "0", *arguments],
            cwd=self.folder,
            env={**os.environ, "PATH": folders},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """A device."""
    return Device(tmp_path)


def test_the_zip_is_put_together_and_written(device: Device) -> None:
    """Also if the module is still making it at first."""
    device.busy("409 409 504 503")
    done = device.fetch("--device", "edge-01", "-o", "x.zip")
    assert (done.returncode, done.stdout, done.stderr) == (0, "x.zip: 250,000 bytes\n", "")
    assert (device.folder / "x.zip").read_bytes() == device.data


@pytest.mark.parametrize(
    ("errors", "name", "line"),
    [
        ("404", "edge-01", "edge-01: 404 c: m"),
        ("409 " * 12, "edge-01", "edge-01: 409 c: m"),
        ("", "edge-02", "az: ERROR: device not found"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_no_file(
    device: Device, errors: str, name: str, line: str
) -> None:
    device.busy(errors)
    done = device.fetch("--device", name)
    assert (done.returncode, done.stderr) == (1, f"{line}\n")
    assert not (device.folder / f"{name}.zip").exists()


def test_without_az_it_says_so(device: Device) -> None:
    done = device.fetch("--device", "edge-01", path="/nonexistent")
    assert (done.returncode, done.stderr) == (1, "az is not installed\n")


def test_a_folder_that_does_not_exist_is_one_line(device: Device) -> None:
    done = device.fetch("--device", "edge-01", "-o", "none/x.zip")
    assert (done.returncode, done.stderr) == (1, "none/x.zip: cannot be written: No such file or directory\n")
