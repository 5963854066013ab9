"""Write the SBOM of an image, CycloneDX 1.6 as JSON: `sbom.py --variant cpu --output FILE`.

Runs while the image is built, with the Python of the image, and needs nothing but the standard library. It
lists the installed Python packages, the shared libraries that their wheels carry, the bundled model and the
packages of Debian. The same content gives the same bytes: no time of the run and no random number is written.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

Component = dict[str, Any]

CYCLONEDX_VERSION = "1.6"
_NAMESPACE = uuid.UUID(
    "6d1f6a8e-3c0b-5b57-9f0a-0c9a4b1f7e11"
)  # any fixed one: serial numbers follow from contents


@dataclass(frozen=True)
class BundledLibrary:
    """What is known of a shared library in a wheel."""

    name: str
    """Name of the project that publishes it, such as ffmpeg."""
    license: str
    """SPDX expression; `license_pattern` may find another one in the file."""
    version_pattern: bytes | None = None
    """Finds the version in the file, in group 1."""
    soname_is_version: bool = False
    """The number in the file's name is the project's version."""
    cpe_vendor: str = ""
    """Vendor in the CPE dictionary, by which scanners find advisories."""


_FFMPEG = BundledLibrary("ffmpeg", "LGPL-2.1-or-later", rb"FFmpeg version (\d[\w.]*)", cpe_vendor="ffmpeg")
_OPENSSL = BundledLibrary("openssl", "OpenSSL", rb"OpenSSL (\d\.\d\.\d\w*)", cpe_vendor="openssl")
_WEBP = BundledLibrary("libwebp", "BSD-3-Clause")
_BROTLI = BundledLibrary("brotli", "MIT", soname_is_version=True, cpe_vendor="google")
_NETTLE = BundledLibrary("nettle", "LGPL-3.0-or-later OR GPL-2.0-or-later")
_OPENBLAS = BundledLibrary("openblas", "BSD-3-Clause", rb"OpenBLAS (\d+\.\d+\.\d+)")
_AMR = BundledLibrary("opencore-amr", "Apache-2.0")

LIBRARIES: Mapping[str, BundledLibrary] = {
    "libSvtAv1Enc": BundledLibrary("svt-av1", "BSD-3-Clause-Clear", soname_is_version=True),
    "libXau": BundledLibrary("libxau", "MIT-open-group"),
    "libaom": BundledLibrary("libaom", "BSD-2-Clause", rb"AOMedia Project AV1 Encoder v?(\d[\d.]+)"),
    "libasound": BundledLibrary("alsa-lib", "LGPL-2.1-or-later"),
    "libavcodec": _FFMPEG,
    "libavdevice": _FFMPEG,
    "libavfilter": _FFMPEG,
    "libavformat": _FFMPEG,
    "libavif": BundledLibrary("libavif", "BSD-2-Clause"),
    "libavutil": _FFMPEG,
    "libbrotlicommon": _BROTLI,
    "libbrotlidec": _BROTLI,
    "libcrypto": _OPENSSL,
    "libdav1d": BundledLibrary("dav1d", "BSD-2-Clause"),
    "libdrm": BundledLibrary("libdrm", "MIT"),
    "libfreetype": BundledLibrary("freetype", "FTL"),
    "libgfortran": BundledLibrary("libgfortran", "GPL-3.0-or-later WITH GCC-exception-3.1"),
    "libgmp": BundledLibrary("gmp", "LGPL-3.0-or-later OR GPL-2.0-or-later"),
    "libgnutls": BundledLibrary("gnutls", "LGPL-2.1-or-later", rb"GnuTLS (\d[\d.]+)", cpe_vendor="gnu"),
    "libharfbuzz": BundledLibrary("harfbuzz", "MIT-Modern-Variant"),
    "libhogweed": _NETTLE,
    "libjpeg": BundledLibrary(
        "libjpeg-turbo",
        "BSD-3-Clause AND IJG AND Zlib",
        rb"libjpeg-turbo version (\d[\d.]+)",
        cpe_vendor="libjpeg-turbo",
    ),
    "liblcms2": BundledLibrary("lcms2", "MIT"),
    "liblzma": BundledLibrary("xz", "0BSD", soname_is_version=True, cpe_vendor="tukaani"),
    "libmp3lame": BundledLibrary("lame", "LGPL-2.0-or-later", rb"LAME(\d\.\d+)"),
    "libnettle": _NETTLE,
    "libopenblas": _OPENBLAS,
    "libopencore-amrnb": _AMR,
    "libopencore-amrwb": _AMR,
    "libopenjp2": BundledLibrary("openjpeg", "BSD-2-Clause", soname_is_version=True, cpe_vendor="uclouvain"),
    "libopus": BundledLibrary("opus", "BSD-3-Clause", rb"libopus (\d[\d.]+)"),
    "libpng": BundledLibrary("libpng", "libpng-2.0", rb"libpng version (\d[\d.]+)", cpe_vendor="libpng"),
    "libquadmath": BundledLibrary("libquadmath", "LGPL-2.0-or-later"),
    "libscipy_openblas": _OPENBLAS,
    "libsharpyuv": _WEBP,
    "libssl": _OPENSSL,
    "libswresample": _FFMPEG,
    "libswscale": _FFMPEG,
    "libtiff": BundledLibrary("libtiff", "libtiff", rb"LIBTIFF, Version (\d[\d.]+)", cpe_vendor="libtiff"),
    "libunistring": BundledLibrary("libunistring", "LGPL-3.0-or-later OR GPL-2.0-or-later"),
    "libvpl": BundledLibrary("libvpl", "MIT"),
    "libvpx": BundledLibrary(
        "libvpx", "BSD-3-Clause", rb"WebM Project VP8 (?:En|De)coder v(\d[\d.]+)", cpe_vendor="webmproject"
    ),
    "libwebp": _WEBP,
    "libx264": BundledLibrary("x264", "GPL-2.0-or-later"),
    "libx265": BundledLibrary("x265", "GPL-2.0-or-later"),
    "libxcb": BundledLibrary("libxcb", "MIT"),
    "libzstd": BundledLibrary("zstd", "BSD-3-Clause", soname_is_version=True, cpe_vendor="facebook"),
}
"""By the beginning of the file's name, the longest one counts."""

_LEGACY_LICENSES = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "BSD": "BSD-3-Clause",  # PySocks, whose licence file has the three clauses
    "Eclipse Public License v2.0 / Eclipse Distribution License v1.0": "EPL-2.0 OR BSD-3-Clause",
    "LicenseRef-NVIDIA-Proprietary": "LicenseRef-NVIDIA-CUDA-Toolkit-EULA",
    "MIT License": "MIT",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA-CUDA-Toolkit-EULA",
}
_CUDNN_LICENSE = "LicenseRef-NVIDIA-cuDNN"
_LIBRARY_FILE = re.compile(r"(?P<stem>lib.+?)(?:-[0-9a-f]{8})*(?:\.[\d.]+)?\.so(?:\.(?P<soname>[\w.]+))?$")
_BUILD_LICENSE = re.compile(rb"(L?GPL) version (\d(?:\.\d)?) or later")


@dataclass
class _Found:
    """A library found in a wheel: its files and what they tell."""

    library: BundledLibrary
    files: list[str] = field(default_factory=list)
    version: str = ""
    soname: str = ""
    license: str = ""


def normalize(name: str) -> str:
    """The name of a Python package as indexes and advisories spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def license_of(distribution: Distribution) -> str:
    """The SPDX expression of a package's metadata; empty if unknown."""
    metadata = distribution.metadata
    if normalize(distribution.name).startswith("nvidia-cudnn"):
        return _CUDNN_LICENSE
    # Each field at most once; a missing one is None.
    stated: Mapping[str, str] = metadata.json  # type: ignore[assignment]  # lists are other fields
    if expression := stated.get("license_expression"):
        return _LEGACY_LICENSES.get(expression, expression)
    text = stated.get("license", "").strip()
    return _LEGACY_LICENSES.get(text, text if re.fullmatch(r"[\w.+-]+", text) else "")


def python_components(found: Iterable[Distribution]) -> Iterator[Component]:
    """A component for each installed package, the libraries of its wheel inside."""
    first = {
        normalize(one.name): one for one in reversed(list(found))
    }  # Python imports the first on its path
    for name, distribution in sorted(first.items()):
        purl = f"pkg:pypi/{name}@{distribution.version}"
        component = _component("library", name, distribution.version, purl, license_of(distribution))
        paths = [Path(str(distribution.locate_file(path))) for path in distribution.files or ()]
        if libraries := list(bundled_components(sorted(paths), purl)):
            component["components"] = libraries
        yield component


def bundled_components(paths: Iterable[Path], parent: str) -> Iterator[Component]:
    """The libraries that a repaired wheel carries in its folder NAME.libs, one component for each project."""
    found: dict[str, _Found] = {}
    for path in paths:
        match = _LIBRARY_FILE.match(path.name)
        if match is None or not path.parent.name.endswith(".libs") or not path.is_file():
            continue
        library = _library(match["stem"])
        one = found.setdefault(library.name, _Found(library))
        _read_library(one, path, match["soname"] or "")
    for name, one in sorted(found.items()):
        version = one.version or (one.soname if one.library.soname_is_version else "")
        purl = f"pkg:generic/{name}" + (f"@{version}" if version else "")
        component = _component("library", name, version, purl, one.license or one.library.license)
        component["bom-ref"] = f"{parent}#{name}"
        if one.library.cpe_vendor and version:
            component["cpe"] = f"cpe:2.3:a:{one.library.cpe_vendor}:{name}:{version}:*:*:*:*:*:*:*"
        component["properties"] = [{"name": "visionedge:file", "value": file} for file in one.files]
        yield component


def _library(stem: str) -> BundledLibrary:
    known = [prefix for prefix in LIBRARIES if stem.startswith(prefix)]
    return LIBRARIES[max(known, key=len)] if known else BundledLibrary(stem, "")


def _read_library(found: _Found, path: Path, soname: str) -> None:
    data = path.read_bytes()
    found.files.append(path.name)
    found.soname = found.soname or soname
    pattern = found.library.version_pattern
    if pattern and not found.version and (version := re.search(pattern, data)):
        found.version = version[1].decode().rstrip(".")
    if found.library is _FFMPEG and not found.license and (terms := _BUILD_LICENSE.search(data)):
        number = terms[2].decode()
        found.license = f"{terms[1].decode()}-{number if '.' in number else f'{number}.0'}-or-later"


def debian_components(status: str, distribution: str) -> Iterator[Component]:
    """A component for each installed package of dpkg's status file; `distribution` is such as debian-12."""
    for paragraph in sorted(status.split("\n\n")):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", paragraph, re.MULTILINE))
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version = fields["Package"], fields["Version"]
        qualifiers = f"arch={fields['Architecture']}&distro={distribution}"
        purl = f"pkg:deb/debian/{name}@{quote(version, safe='~')}?{qualifiers}"
        component = _component("library", name, version, purl, "")
        match = re.fullmatch(r"(\S+)(?: \((.+)\))?", fields.get("Source") or name)
        if match:
            component["properties"] = [
                {"name": "visionedge:debian-source", "value": match[1]},
                {"name": "visionedge:debian-source-version", "value": match[2] or version},
            ]
        yield component


def model_components(folder: Path) -> Iterator[Component]:
    """The bundled models, with their hashes."""
    for path in sorted(folder.glob("*.onnx")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        component = _component(
            "machine-learning-model", path.stem, "", f"pkg:generic/{path.stem}", "Apache-2.0"
        )
        yield {**component, "hashes": [{"alg": "SHA-256", "content": digest}]}


def _component(kind: str, name: str, version: str, purl: str, license_expression: str) -> Component:
    component: Component = {"type": kind, "bom-ref": purl, "name": name, "purl": purl}
    if version:
        component["version"] = version
    if license_expression:
        component["licenses"] = [{"expression": license_expression}]
    return component


def document(variant: str, components: list[Component], environ: Mapping[str, str]) -> dict[str, Any]:
    """The whole CycloneDX document; the environment has REVISION and CREATED of the source."""
    own = next((one for one in components if one["name"] == "visionedge"), {})
    image: Component = {
        "type": "container",
        "bom-ref": f"visionedge-{variant}",
        "name": f"visionedge-{variant}",
    }
    if version := own.get("version"):
        image["version"] = version
    revision = environ.get("REVISION", "")
    if revision and revision != "unknown":
        image["properties"] = [{"name": "visionedge:revision", "value": revision}]
    metadata: dict[str, Any] = {"component": image}
    if created := environ.get("CREATED"):
        metadata["timestamp"] = created
    content = json.dumps([metadata, components], sort_keys=True)
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{CYCLONEDX_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": CYCLONEDX_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}",
        "version": 1,
        "metadata": metadata,
        "components": components,
    }


def _debian_distribution(os_release: str) -> str:
    fields = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', os_release, re.MULTILINE))
    return f"{fields.get('ID', 'debian')}-{fields.get('VERSION_ID', '')}".rstrip("-")


def main(argv: list[str]) -> int:
    """Write the file; 0 or an exception, which ends the build of the image."""
    parser = argparse.ArgumentParser(description="write the SBOM of the image that this program runs in")
    parser.add_argument("--variant", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    found = list(distributions())
    components = list(python_components(found))
    for one in found:
        if one.name == "visionedge":
            components += model_components(Path(str(one.locate_file("visionedge/_bundled/models"))))
    status = Path("/var/lib/dpkg/status")
    if status.is_file():
        release = _debian_distribution(Path("/etc/os-release").read_text(encoding="utf-8"))
        components += debian_components(status.read_text(encoding="utf-8"), release)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document(arguments.variant, components, os.environ), indent=1) + "\n"
    arguments.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
