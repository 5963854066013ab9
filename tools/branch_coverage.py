"""Run the tests, print which branches of the package they run through, and fail if these are too few.

    python tools/branch_coverage.py -m "not system"           # the arguments are those of pytest

Coverage measures each Python that finds its settings in the environment. The module gives its children few
variables, so `tests/conftest.py` adds those of coverage.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage

REPOSITORY = Path(__file__).resolve().parents[1]
_SETTINGS = REPOSITORY / "pyproject.toml"
MIN_BRANCHES_PERCENT = 90.0
MAX_LEFT_OUT_PERCENT = 5.0
_LISTED_FILES = 20


@dataclass(frozen=True)
class Counts:
    """The lines and branches of a file, or of all."""

    lines: int
    covered_lines: int
    left_out_lines: int
    branches: int
    covered_branches: int

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "Counts":
        """Those of a summary in the JSON report of coverage."""
        return cls(
            lines=summary["num_statements"],
            covered_lines=summary["covered_lines"],
            left_out_lines=summary["excluded_lines"],
            branches=summary["num_branches"],
            covered_branches=summary["covered_branches"],
        )

    @property
    def missed_branches(self) -> int:
        """The branches that no test runs through."""
        return self.branches - self.covered_branches

    @property
    def branches_percent(self) -> float:
        """The share of the branches that the tests run through."""
        return 100 * self.covered_branches / max(1, self.branches)

    @property
    def lines_percent(self) -> float:
        """The share of the lines that the tests run through."""
        return 100 * self.covered_lines / max(1, self.lines)

    @property
    def left_out_percent(self) -> float:
        """The share of the lines that `pyproject.toml` leaves out."""
        return 100 * self.left_out_lines / max(1, self.lines + self.left_out_lines)


def main(arguments: Sequence[str]) -> int:
    """Return 0 if the tests passed and the limits hold; else the exit code of pytest, or 1."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        exit_code = _run_tests(Path(folder), arguments)
        try:
            report = _combine(Path(folder))
        except coverage.CoverageException as error:
            print(f"coverage: {error}", file=sys.stderr)
            return exit_code or 1
    total = Counts.of(report["totals"])
    print("\n".join(list_files({name: Counts.of(file["summary"]) for name, file in report["files"].items()})))
    print(
        f"branches {total.branches_percent:.1f} % of {total.branches}, lines {total.lines_percent:.1f} % of "
        f"{total.lines}, left out {total.left_out_percent:.1f} % of the lines, "
        f"{time.monotonic() - began:.0f} s; `.venv/bin/coverage html` shows each line"
    )
    problems = find_problems(total)
    for problem in problems:
        print(f"coverage: {problem}", file=sys.stderr)
    return exit_code or bool(problems)


def list_files(files: Mapping[str, Counts]) -> list[str]:
    """Return a line for each of the files with the most missed branches."""
    order = sorted(files, key=lambda name: (-files[name].missed_branches, name))
    return [
        f"{files[name].missed_branches:5} of {files[name].branches:4} branches missed in {name}"
        for name in order[:_LISTED_FILES]
        if files[name].missed_branches
    ]


def find_problems(total: Counts) -> list[str]:
    """Return a line for each limit that does not hold."""
    problems = []
    if total.branches_percent < MIN_BRANCHES_PERCENT:
        missing = math.ceil(total.branches * MIN_BRANCHES_PERCENT / 100) - total.covered_branches
        problems.append(
            f"the tests run through {total.branches_percent:.1f} % of the branches, less than "
            f"{MIN_BRANCHES_PERCENT:.0f} %: test {missing} more, or delete code that nothing reaches"
        )
    if total.left_out_percent > MAX_LEFT_OUT_PERCENT:
        problems.append(
            f"pyproject.toml leaves out {total.left_out_percent:.1f} % of the lines, more than "
            f"{MAX_LEFT_OUT_PERCENT:.0f} %: shorten the list in [tool.coverage.report]"
        )
    return problems


def _run_tests(folder: Path, arguments: Sequence[str]) -> int:
    variables = {
        "COVERAGE_PROCESS_START": str(_SETTINGS),
        "COVERAGE_FILE": str(folder / "data" / ".coverage"),
        "COVERAGE_SOURCE": str(REPOSITORY / "module" / "visionedge"),
    }
    (folder / "data").mkdir()
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | variables, check=False).returncode


def _combine(folder: Path) -> dict[str, Any]:
    """Write `.coverage`, and return its JSON report."""
    measured = coverage.Coverage(data_file=REPOSITORY / ".coverage", config_file=str(_SETTINGS))
    measured.erase()
    measured.combine([str(folder / "data")])
    measured.save()
    measured.json_report(outfile=str(folder / "report.json"))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
