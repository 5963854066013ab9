"""Build the wheel, install it into an empty environment of every supported Python here, and try it there."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
_LIMIT_S = 600


def main() -> int:
    """0 when the wheel works in every Python that this machine has."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = _build(Path(folder))
        outcomes = {version: _try(version, wheel, Path(folder)) for version in PYTHONS}
    for version, outcome in outcomes.items():
        print(f"wheel: Python {version}: {outcome}")
    tried = [outcome for outcome in outcomes.values() if outcome != "not here, not run"]
    return 0 if tried and all(outcome == "works" for outcome in tried) else 1


def _build(folder: Path) -> Path:
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], REPOSITORY)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _try(version: str, wheel: Path, folder: Path) -> str:
    """What came of one version of Python, in words."""
    python = _find_python(version, folder)
    if python is None:
        return "not here, not run"
    environment, data = folder / version, folder / f"data-{version}"
    try:
        _run([python, "-m", "venv", str(environment)], folder)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        _run([*pip, f"visionedge[cpu] @ {wheel.as_uri()}"], folder)
        _check(environment / "bin" / "visionedge", data, folder)
    except subprocess.CalledProcessError as error:
        return f"FAILED: {' '.join(map(str, error.cmd))}: {(error.stderr or error.stdout)[-2000:]}"
    return "works"


def _find_python(version: str, folder: Path) -> str | None:
    """On the PATH, or one that pyenv installed and does not show there."""
    installed = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for python in (f"python{version}", *map(str, installed)):
        try:
            _run([python, "-c", "import venv, ensurepip"], folder)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    return None


def _check(visionedge: Path, data: Path, folder: Path) -> None:
    """The command answers, and the module detects something on its own clip."""
    _run([str(visionedge), "--version"], folder)
    _run([str(visionedge), "config", "schema"], folder)
    messages = data.with_suffix(".jsonl")
    words = ["run", "--camera", "door=demo:", "--http", "127.0.0.1:0", "--device", "cpu"]
    _run([str(visionedge), *words, "--duration", "15", "--messages", str(messages)], folder, data)
    documents = [json.loads(line) for line in messages.read_text(encoding="utf-8").splitlines()]
    if not any(frame["detections"] for each in documents for frame in each.get("frames", [])):
        raise subprocess.CalledProcessError(1, [str(visionedge), *words], "", "no detection in its messages")


def _run(command: list[str], folder: Path, data: Path | None = None) -> None:
    """In the folder, without our own source: only what the wheel installed is found."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CI")}
    subprocess.run(
        command,
        cwd=folder,
        env={**environ, "VISIONEDGE_DATA": str(data or folder / "data")},
        capture_output=True,
        text=True,
        check=True,
        timeout=_LIMIT_S,
    )


if __name__ == "__main__":
    sys.exit(main())
