"""Which build of visionedge this is: version, git revision, time.

    0.2.0+g1a2b3c4d5e6f (2026-11-30T06:05:00Z)

The build of a wheel writes the identity into the package (tools/build_hook.py); a checkout reads it from
`.git`; an archive made by `git archive` carries it in archived_commit.txt. The time is that of the commit, so
that two builds of one commit are equal. `python -m visionedge.runtime.build_identity [KEY…]` prints it.
Standard library only, as the build of the wheel imports this module too.
"""

import functools
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from visionedge import __version__
from visionedge.runtime.git_commit import Commit, GitError, read_head_commit

UNKNOWN = "unknown"

FILE_NAME = "_build.json"
"""In the package, if a wheel or a source distribution was built."""

REVISION_VARIABLE = "VISIONEDGE_REVISION"
"""The revision, for a build that has no `.git`; from `SOURCE_DATE_EPOCH` comes its time."""

_PACKAGE = Path(__file__).resolve().parents[1]
_ARCHIVE_FILE = "archived_commit.txt"
_HASH_DIGITS = 12
_REVISION = re.compile(r"g?([0-9a-f]{7,64})(-dirty)?")
_ARCHIVED = re.compile(r"([0-9a-f]{40,64}) (\d+)")


@dataclass(frozen=True, slots=True)
class BuildIdentity:
    """The identity of a build; `str` gives the one string.

    Attributes:
        version: the version of visionedge.
        revision: 12 digits of the commit, with `-dirty` if it was built with changed files; or `unknown`.
        built_at: the time of the commit in UTC, `2026-11-30T06:05:00Z`; or `unknown`.
        reason: why the revision is unknown; empty if it is known.
    """

    version: str
    revision: str = UNKNOWN
    built_at: str = UNKNOWN
    reason: str = ""

    def __str__(self) -> str:
        if self.revision == UNKNOWN:
            return f"{self.version}+{UNKNOWN}"
        time = "" if self.built_at == UNKNOWN else f" ({self.built_at})"
        return f"{self.version}+g{self.revision.replace('-', '.')}{time}"

    def document(self) -> dict[str, str]:
        """As JSON, with the same keys in every place."""
        document = {"version": self.version, "revision": self.revision, "builtAt": self.built_at}
        return document | ({"reason": self.reason} if self.reason else {})

    def to_json(self) -> str:
        """The content of `FILE_NAME`; equal for two builds of one commit."""
        return json.dumps(self.document(), indent=1) + "\n"


@functools.cache
def read_build_identity() -> BuildIdentity:
    """The identity of the code that runs; files are read once. A checkout is not searched for changes."""
    found = _read_built(_PACKAGE / FILE_NAME)
    if found is not None:
        return found
    root = _PACKAGE.parents[1]
    if _PACKAGE.parent.name == "module" and (root / "pyproject.toml").is_file():
        return find_build_identity(root, {})
    return BuildIdentity(__version__, reason=f"{FILE_NAME} is missing in the package")


def find_build_identity(root: Path, environ: Mapping[str, str]) -> BuildIdentity:
    """The identity of the sources in `root`; raises nothing.

    The first that is known counts: `VISIONEDGE_REVISION`, `.git`, an archive made by `git archive`.
    """
    time_s = environ.get("SOURCE_DATE_EPOCH", "")
    default = Commit("", int(time_s) if time_s.isascii() and time_s.isdigit() else None)
    given = _REVISION.fullmatch(environ.get(REVISION_VARIABLE, ""))
    git, reason = root / ".git", ""
    try:
        # The build of an image makes the folder even where it has nothing to copy into it.
        is_git = git.is_file() or (git / "HEAD").is_file()
        commit: Commit | None = read_head_commit(git) if is_git else _read_archived(root)
    except GitError as error:
        commit, reason = None, str(error)
    if given is not None:
        known = commit is not None and commit.hash.startswith(given[1])
        return _of(commit if known and commit else replace(default, hash=given[1]), dirty=bool(given[2]))
    if commit is None:
        return BuildIdentity(__version__, reason=reason or f"no .git, and {REVISION_VARIABLE} is not set")
    return _of(commit)


def _of(commit: Commit, *, dirty: bool = False) -> BuildIdentity:
    built_at = UNKNOWN
    if commit.time_s is not None:
        built_at = f"{datetime.fromtimestamp(commit.time_s, UTC):%Y-%m-%dT%H:%M:%SZ}"
    return BuildIdentity(__version__, commit.hash[:_HASH_DIGITS] + ("-dirty" if dirty else ""), built_at)


def _read_built(path: Path) -> BuildIdentity | None:
    try:
        document = json.loads(path.read_bytes())
        return BuildIdentity(
            str(document["version"]),
            str(document["revision"]),
            str(document["builtAt"]),
            str(document.get("reason", "")),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return BuildIdentity(__version__, reason=f"{FILE_NAME} cannot be read ({type(error).__name__})")


def _read_archived(root: Path) -> Commit | None:
    """The commit of an archive: `git archive` replaces the placeholders in the file (.gitattributes)."""
    try:
        text = (root / "module" / "visionedge" / _ARCHIVE_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = _ARCHIVED.fullmatch(text.strip())
    return None if found is None else Commit(found[1], int(found[2]))


def main(keys: list[str]) -> int:
    """Print the identity, or the values of some of its keys; the exit code."""
    document = read_build_identity().document()
    if not set(keys) <= document.keys():
        sys.stderr.write(f"build_identity: the keys are {', '.join(document)}\n")
        return 2
    for line in [document[key] for key in keys] or [str(read_build_identity())]:
        sys.stdout.write(f"{line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
