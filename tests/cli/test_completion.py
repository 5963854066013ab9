"""`visionedge completion`: what shells offer with its scripts, asked of the shells themselves."""

import shutil
import subprocess

import pytest

from command_line import CommandLine
from visionedge.__main__ import build_parser
from visionedge.cli.completion import SHELLS, generate_script

BASH = """
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_visionedge
printf '%s\\n' "${COMPREPLY[@]}"
"""


def run(shell: str, code: str, *words: str) -> list[str]:
    """What a shell prints, line by line; a script with a slip in it prints to stderr and fails the test."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    bare = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    ended = subprocess.run(
        [shell, *bare, "-c", code, *words], capture_output=True, text=True, check=False, timeout=30
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.split("\n")[:-1]


def in_bash(*typed: str) -> set[str]:
    """What bash offers for the last of these words."""
    return set(run("bash", generate_script("bash", build_parser()) + BASH, "bash", *typed)) - {""}


def in_fish(line: str) -> set[str]:
    """What fish offers at the end of a line, descriptions left away."""
    code = generate_script("fish", build_parser()) + f"complete -C '{line}'\n"
    return {row.split("\t")[0] for row in run("fish", code)}


def test_commands_and_subcommands_are_completed() -> None:
    assert {"run", "detect", "model", "bench", "doctor", "manifest", "completion"} <= in_bash(
        "visionedge", ""
    )
    assert in_bash("visionedge", "bench", "pi") == {"pipeline"}
    assert in_bash("visionedge", "completion", "z") == {"zsh"}


def test_options_of_the_command_are_completed() -> None:
    """Also behind the values of others."""
    assert in_bash("visionedge", "run", "--camera", "demo=demo:", "--dev") == {"--device"}
    assert "--annotate" in in_bash("visionedge", "detect", "--")
    assert "--annotate" not in in_bash("visionedge", "run", "--")


def test_choices_are_completed_after_their_option_and_files_elsewhere() -> None:
    """No word of ours leaves the shell to complete files."""
    assert in_bash("visionedge", "run", "--log-level", "w") == {"warning"}
    assert in_bash("visionedge", "run", "--config", "") == set()


def test_fish_gets_the_same_completions() -> None:
    assert in_fish("visionedge bench pi") == {"pipeline"}
    assert in_fish("visionedge run --dev") == {"--device"}
    assert in_fish("visionedge run --log-level w") == {"warning"}


def test_zsh_accepts_the_script() -> None:
    """It completes with bash's functions."""
    code = (
        "autoload -U compinit && compinit -D\n"
        + generate_script("zsh", build_parser())
        + "print $_comps[visionedge]\n"
    )
    (found,) = run("zsh", code)
    assert "_visionedge" in found


@pytest.mark.parametrize("shell", SHELLS)
def test_the_completion_command_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On stdout alone, to be read by the shell."""
    outcome = CommandLine(capsys)("completion", shell)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == generate_script(shell, build_parser())
