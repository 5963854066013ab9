"""Build a container image with all its labels, and keep its SBOM in build/: what `make image` runs.

    python tools/build_image.py --variant cpu --image visionedge:cpu --flags "--network host"

The Dockerfiles also build by themselves (`docker build`, the tools of IoT Edge). Labels that need git or the
looked-up base are added here, each only if its value is known.
"""

import argparse
import datetime as dt
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from base_digest import BaseImage, read_base

REPOSITORY = Path(__file__).resolve().parents[1]
SBOM_IN_IMAGE = "/opt/visionedge/share/sbom.cdx.json"

# The licences of libraries that only PyAV's wheel carries.
_PYAV_LICENSES = (
    "(LGPL-3.0-or-later OR GPL-2.0-or-later)",
    "BSD-3-Clause-Clear",
    "GPL-2.0-or-later",
    "LGPL-3.0-or-later",
)
_LABEL = "org.opencontainers.image"


@dataclass(frozen=True)
class Source:
    """What the image is built from."""

    version: str
    revision: str = ""
    """Commit, with -dirty if a tracked file differs from it."""
    created: str = ""
    """The commit's time: the same commit gives the same image."""
    url: str = ""


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    variant: str
    image: str
    base_image: str = ""
    with_pyav: str = ""
    flags: str = ""
    with_openvino: str = ""


def build_command(request: Request, source: Source, base: BaseImage | None, licenses: str) -> list[str]:
    """The arguments of `docker`; `licenses` is the Dockerfile's own label."""
    base = None if request.base_image else base
    build_args = {
        "BASE_IMAGE": request.base_image or (base.reference if base else ""),
        "WITH_PYAV": request.with_pyav,
        "WITH_OPENVINO": request.with_openvino,
        "VERSION": source.version,
        "REVISION": source.revision,
        "CREATED": source.created,
    }
    labels = {
        "source": source.url,
        "created": source.created,
        "base.name": f"{base.name}:{base.tag}" if base else request.base_image,
        "base.digest": base.digest if base else "",
        "licenses": without_pyav(licenses) if request.with_pyav == "0" else "",
    }
    command = ["build", "--file", f"Dockerfile.{request.variant}", "--tag", request.image]
    for name, value in build_args.items():
        command += ["--build-arg", f"{name}={value}"] if value else []
    for name, value in labels.items():
        command += ["--label", f"{_LABEL}.{name}={value}"] if value else []
    return [*command, *shlex.split(request.flags), "."]


def without_pyav(licenses: str) -> str:
    """An SPDX expression without the terms that only PyAV's libraries need."""
    return " AND ".join(term for term in licenses.split(" AND ") if term not in _PYAV_LICENSES)


def dockerfile_licenses(text: str) -> str:
    """The label of a Dockerfile's text."""
    match = re.search(rf'{re.escape(_LABEL)}\.licenses="([^"]+)"', text)
    if match is None:
        raise ValueError("the Dockerfile has no label for the licences")
    return match[1]


def read_source(repository: Path, environ: Mapping[str, str]) -> Source:
    """Version, commit and origin of a checkout; what is unknown is empty."""
    text = (repository / "module/visionedge/__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    if match is None:
        raise ValueError("module/visionedge/__init__.py has no __version__")
    revision = _git(repository, "rev-parse", "HEAD")
    if revision and _git(repository, "status", "--porcelain", "--untracked-files=no"):
        revision += "-dirty"
    seconds = _git(repository, "log", "-1", "--format=%ct")
    created = dt.datetime.fromtimestamp(int(seconds), dt.UTC).strftime("%FT%TZ") if seconds else ""
    origin = environ.get("SOURCE_URL") or _git(repository, "remote", "get-url", "origin")
    return Source(match[1], revision, created, public_url(origin))


def public_url(address: str) -> str:
    """The address without login and ending; empty if it is none of the web."""
    parts = urlsplit(address)
    if parts.scheme != "https" or not parts.hostname:
        return ""
    return f"https://{parts.netloc.rpartition('@')[2]}{parts.path.removesuffix('.git')}"


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def keep_sbom(docker: str, image: str, target: Path) -> None:
    """Copy the SBOM out of an image without running it, so that it may be of another processor."""
    create = [docker, "create", "--network", "none", image]
    container = subprocess.run(create, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    try:
        target.parent.mkdir(exist_ok=True)
        subprocess.run([docker, "cp", f"{container}:{SBOM_IN_IMAGE}", str(target)], check=True)
    finally:
        subprocess.run([docker, "rm", "--volumes", container], stdout=subprocess.DEVNULL, check=True)


def main(argv: list[str]) -> int:
    """Build: 0, 1 if Docker failed, 2 for a wrong file."""
    parser = argparse.ArgumentParser(description="build a container image of visionedge")
    parser.add_argument("--variant", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--image", required=True)
    parser.add_argument("--base-image", default="")
    parser.add_argument("--with-pyav", default="")
    parser.add_argument(
        "--with-openvino", default="", help="1: OpenVINO, for Intel GPUs and CPUs (variant cpu)"
    )
    parser.add_argument("--flags", default="")
    arguments = parser.parse_args(argv)
    if arguments.with_openvino == "1" and arguments.variant != "cpu":
        parser.error("OpenVINO is part of the CPU image only: WITH_OPENVINO=1 needs VARIANT=cpu")
    docker = os.environ.get("DOCKER") or "docker"
    request = Request(
        arguments.variant,
        arguments.image,
        arguments.base_image,
        arguments.with_pyav,
        arguments.flags,
        arguments.with_openvino,
    )
    try:
        source, base = read_source(REPOSITORY, os.environ), read_base()
    except ValueError as error:
        print(f"image: {error}", file=sys.stderr)
        return 2
    if base is None and not request.base_image:
        print(
            "image: requirements/base.txt is missing, so the base is a moving tag and the image has no label"
        )
        print(f"image: {_LABEL}.base.digest; `make base-digest` looks a digest up")
    licenses = dockerfile_licenses((REPOSITORY / f"Dockerfile.{request.variant}").read_text(encoding="utf-8"))
    command = [docker, *build_command(request, source, base, licenses)]
    sbom = REPOSITORY / f"build/sbom-{request.variant}.cdx.json"
    try:
        subprocess.run(command, cwd=REPOSITORY, check=True)
        keep_sbom(docker, request.image, sbom)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"image: {request.image} was not built: {error}", file=sys.stderr)
        return 1
    print(f"image: {request.image}; its SBOM: {sbom.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
