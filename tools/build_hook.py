"""Writes the build identity into a wheel or a source distribution; hatchling calls it (pyproject.toml).

It fails no build: an identity that cannot be found is `unknown`, with the reason, and the build says so.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_STATUS_LIMIT_S = 10.0
_PACKAGE_FOLDERS = {"wheel": "visionedge", "sdist": "module/visionedge"}


class BuildIdentityHook(BuildHookInterface[BuilderConfig]):
    """Adds `_build.json` to the package. An editable install has none: a checkout reads `.git` itself."""

    PLUGIN_NAME = "build-identity"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the file into a temporary folder, and have it included."""
        root = Path(self.root)
        sys.path.insert(0, str(root / "module"))
        try:
            from visionedge.runtime.build_identity import (
                FILE_NAME,
                REVISION_VARIABLE,
                UNKNOWN,
                find_build_identity,
            )
        finally:
            sys.path.pop(0)
        is_built = (root / "module" / "visionedge" / FILE_NAME).exists()  # an unpacked source distribution
        if version == "editable" or is_built:
            return
        identity = find_build_identity(root, os.environ)
        if identity.revision == UNKNOWN:
            sys.stderr.write(f"visionedge: the build identity is unknown: {identity.reason}\n")
        elif REVISION_VARIABLE not in os.environ and _has_changes(root):
            identity = replace(identity, revision=f"{identity.revision}-dirty")
        self._folder = tempfile.TemporaryDirectory(prefix="visionedge-build-")
        path = Path(self._folder.name) / FILE_NAME
        path.write_text(identity.to_json(), encoding="utf-8")
        build_data["force_include"][str(path)] = f"{_PACKAGE_FOLDERS[self.target_name]}/{FILE_NAME}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the temporary folder."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def _has_changes(root: Path) -> bool:
    """Whether tracked files differ from the commit; False where git cannot tell."""
    git = root / ".git"
    if not git.exists() or (git.is_dir() and not (git / "index").is_file()):
        return False  # without an index only the commit was copied here, as into the build of an image
    command = ["git", "--no-optional-locks", "-C", str(root), "status", "--porcelain", "--untracked-files=no"]
    try:
        asked = subprocess.run(command, capture_output=True, check=False, timeout=_STATUS_LIMIT_S)
    except (OSError, subprocess.SubprocessError):
        return False
    return asked.returncode == 0 and bool(asked.stdout.strip())
