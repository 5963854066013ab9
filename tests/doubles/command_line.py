"""Calls the command line in this process and returns its exit code, stdout and stderr."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from visionedge.__main__ import main


@dataclass(frozen=True)
class Outcome:
    """The result of a call."""

    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """The error lines of visionedge on stderr, without log lines."""
        return [line for line in self.err.splitlines() if line.startswith("visionedge")]


class CommandLine:
    """Calls `visionedge` with arguments; fails on a traceback."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Outcome:
        """Run one verb to its end."""
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = self._capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)


def call_in(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Calls the command line in a folder with `figures.onnx`, and keeps its state there."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VISIONEDGE_DATA", str(folder / "state"))
    monkeypatch.setenv("VISIONEDGE_MODEL", "figures.onnx")
    monkeypatch.setenv("VISIONEDGE_DEVICE", "cpu")
    return CommandLine(capsys)
