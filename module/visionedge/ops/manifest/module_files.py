"""The module.json that a template's image placeholder stands for, looked up as the tools of IoT Edge do.

`${MODULEDIR<FOLDER>.PLATFORM}` is the module.json in FOLDER, relative to the template's folder, and
`${MODULES.NAME.PLATFORM}` is modules/NAME/module.json. Where there is none, the tools leave the placeholder
in the manifest without an error, and the device refuses the deployment.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionedge.ops.manifest.agent import Module
from visionedge.ops.manifest.findings import Findings
from visionedge.runtime.files import read_regular

_FOLDER = re.compile(r"\$\{MODULEDIR<(?P<folder>[^<>]*)>(?:\.(?P<platform>[^{}]+))?\}")
_NAME = re.compile(r"\$\{MODULES\.(?P<name>[^.{}]+)(?:\.(?P<platform>[^{}]+))?\}")
_MODULES = "modules"
_MOST_BYTES = 2**20


def check_module_files(modules: Mapping[str, Module], folder: Path, findings: Findings) -> None:
    """Judge the images of a template that are built from a module.json; `folder` is the template's."""
    for module in modules.values():
        if found := _FOLDER.fullmatch(module.image):
            _judge(module, Path(found["folder"]), found["platform"], folder, findings)
        elif found := _NAME.fullmatch(module.image):
            _judge(module, Path(_MODULES) / found["name"], found["platform"], folder, findings)


def _judge(module: Module, inner: Path, platform: str | None, folder: Path, findings: Findings) -> None:
    where, file = module.image_place(), folder / inner / "module.json"
    try:
        document = json.loads(read_regular(file, most_bytes=_MOST_BYTES))
        platforms = document["image"]["tag"]["platforms"]
        known = dict(platforms)
    except OSError as error:
        what = f"leads to {inner}/module.json, which cannot be read ({error.strerror}): it is never filled in"
        findings.error(where, what, _instead(folder, platform))
        return
    except (ValueError, KeyError, TypeError, RecursionError):
        what = f"leads to {inner}/module.json, which is no JSON with image.tag.platforms"
        findings.error(where, what, "write it as the tools of IoT Edge make it")
        return
    # Without a platform, or with the suffix of a debug build, the tools take the one they are set to.
    if platform is None or platform == "debug":
        return
    if platform not in known:
        remedy = f"known there: {', '.join(map(str, known)) or 'none'}"
        findings.error(
            where, f"names the platform {platform}, which {inner}/module.json does not have", remedy
        )
    elif not _dockerfile(folder / inner, known[platform]).is_file():
        remedy = f"mend image.tag.platforms in {inner}/module.json"
        findings.error(where, f"is built from {_shown(known[platform])}, which is not there", remedy)


def _dockerfile(folder: Path, entry: Any) -> Path:
    return folder / (entry if isinstance(entry, str) and "\0" not in entry else "")


def _shown(entry: Any) -> str:
    return entry if isinstance(entry, str) else "no file"


def _instead(folder: Path, platform: str | None) -> str:
    """The placeholder that would do, where a module.json is near."""
    near = sorted(file.parent.name for file in folder.glob("*/module.json"))
    if not near:
        return (
            "write ${MODULEDIR<FOLDER>.PLATFORM} with the folder of the module.json, or the name of an image"
        )
    return f"write ${{MODULEDIR<./{near[0]}>{f'.{platform}' if platform else ''}}}"
