"""The SBOM of an image: valid CycloneDX, and the same bytes for the same content."""

import json
from collections.abc import Mapping
from importlib.metadata import PathDistribution, distributions
from pathlib import Path

import pytest

import sbom

STATUS = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Source: glibc (2.36-9+deb12u13)
Version: 2.36-9+deb12u13

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: apt
Status: install ok installed
Architecture: amd64
Version: 1:2.6.1~rc1
"""


def make_wheel(site: Path, name: str, metadata: str, files: Mapping[str, bytes]) -> PathDistribution:
    """An installed package."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{metadata}\n")
    for path, data in files.items():
        site.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
        site.joinpath(path).write_bytes(data)
    info.joinpath("RECORD").write_text("".join(f"{path},,\n" for path in files))
    return PathDistribution(info)


def test_the_document_of_this_environment_is_valid_by_the_schema_of_cyclonedx() -> None:
    json_validator = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    components = [*sbom.python_components(distributions()), *sbom.debian_components(STATUS, "debian-12")]
    environ = {"REVISION": "abc", "CREATED": "2026-11-30T06:00:00Z"}
    document = sbom.document("cpu", components, environ)
    validator = json_validator.JsonStrictValidator(schema.SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(document)) is None
    names = {component["name"] for component in components}
    assert {"visionedge", "numpy", "opencv-python-headless", "libc6"} <= names


def test_libraries_in_a_wheel_are_listed_with_version_and_licence_as_far_as_the_file_tells(
    tmp_path: Path,
) -> None:
    folder = "video.libs"
    distribution = make_wheel(
        tmp_path,
        "video",
        "License-Expression: BSD-3-Clause",
        {
            f"{folder}/libavcodec-0123abcd.so.62.28.102": b"FFmpeg version 8.1.2\0LGPL version 3 or later",
            f"{folder}/libavutil-0123abcd.so.60.26.102": b"\0FFmpeg version 8.1.2\0",
            f"{folder}/libcrypto-0123abcd.so.1.1.1k": b"\0OpenSSL 1.1.1k  FIPS 25 Mar 2021\0",
            f"{folder}/liblzma-0123abcd.so.5.8.4": b"",
            f"{folder}/libx264-0123abcd.so.165": b"",
            f"{folder}/libscipy_openblas64_-0123abcd.so": b"\0OpenBLAS 0.3.31.188.0\0",
            f"{folder}/libunheard-0123abcd.so.3": b"",
            "video/__init__.py": b"",
        },
    )
    (component,) = sbom.python_components([distribution])
    found = {
        one["name"]: (one.get("version"), [terms["expression"] for terms in one.get("licenses", ())])
        for one in component["components"]
    }
    assert found == {
        "ffmpeg": ("8.1.2", ["LGPL-3.0-or-later"]),
        "libunheard": (None, []),
        "openblas": ("0.3.31", ["BSD-3-Clause"]),
        "openssl": ("1.1.1k", ["OpenSSL"]),
        "x264": (None, ["GPL-2.0-or-later"]),
        "xz": ("5.8.4", ["0BSD"]),
    }
    ffmpeg = component["components"][0]
    assert ffmpeg["cpe"] == "cpe:2.3:a:ffmpeg:ffmpeg:8.1.2:*:*:*:*:*:*:*"
    assert len(ffmpeg["properties"]) == 2, "one component, two files"


@pytest.mark.parametrize(
    ("name", "metadata", "license_expression"),
    [
        ("a", "License-Expression: MIT-CMU", "MIT-CMU"),
        ("a", "License: Apache 2.0", "Apache-2.0"),
        ("a", "License: MPL-2.0", "MPL-2.0"),
        ("a", "License: Do what you like with it", ""),
        ("a", "", ""),
        ("nvidia-cudnn-cu12", "License: NVIDIA Proprietary Software", "LicenseRef-NVIDIA-cuDNN"),
        (
            "nvidia-cublas-cu12",
            "License: NVIDIA Proprietary Software",
            "LicenseRef-NVIDIA-CUDA-Toolkit-EULA",
        ),
    ],
)
def test_licences_are_spdx_expressions_or_absent(
    tmp_path: Path, name: str, metadata: str, license_expression: str
) -> None:
    assert sbom.license_of(make_wheel(tmp_path, name, metadata, {})) == license_expression


def test_only_installed_packages_of_debian_are_listed_with_their_source() -> None:
    first, second = sbom.debian_components(STATUS, "debian-12")
    assert first["purl"] == "pkg:deb/debian/apt@1%3A2.6.1~rc1?arch=amd64&distro=debian-12"
    assert (second["name"], second["version"]) == ("libc6", "2.36-9+deb12u13")
    assert {one["name"]: one["value"] for one in second["properties"]} == {
        "visionedge:debian-source": "glibc",
        "visionedge:debian-source-version": "2.36-9+deb12u13",
    }


def test_the_same_content_gives_the_same_bytes_and_another_one_another_serial_number() -> None:
    components = list(sbom.debian_components(STATUS, "debian-12"))
    first, again = (sbom.document("cpu", components, {}) for _ in range(2))
    assert first == again
    assert sbom.document("cpu", components[:1], {})["serialNumber"] != first["serialNumber"]
    assert "timestamp" not in first["metadata"]


def test_the_file_is_written_for_the_environment_that_runs_the_tool(tmp_path: Path) -> None:
    file = tmp_path / "share/sbom.cdx.json"
    assert sbom.main(["--variant", "gpu", "--output", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["metadata"]["component"]["name"] == "visionedge-gpu"
    assert "numpy" in {component["name"] for component in document["components"]}
