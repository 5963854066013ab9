"""`make audit`: locks and SBOMs beside records of known vulnerabilities, in OSV's form."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

import audit
from audit import Package, affects, cvss3_score, severity_score
from repository_paths import REPOSITORY

HIGH = "CVSS:3.1/AV:N/AC:L/PR:N/UI:R/S:U/C:H/I:H/A:H"
OPENCV_LOCK = "opencv-python-headless==4.13.0.92 \\\n    --hash=sha256:00\n    # via visionedge\n"

# Written for this test from the facts of CVE-2026-8461: FFmpeg 8.0.1 in OpenCV's wheel.
OPENCV_RECORD: dict[str, Any] = {
    "id": "TEST-2026-1",
    "aliases": ["CVE-2026-8461"],
    "modified": "2026-07-01T00:00:00Z",
    "summary": "a heap write in the MagicYUV decoder of the bundled FFmpeg",
    "severity": [{"type": "CVSS_V3", "score": HIGH}],
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": "opencv-python-headless"},
            "ranges": [
                {"type": "ECOSYSTEM", "events": [{"introduced": "4.13.0.90"}, {"fixed": "4.14.0.94"}]}
            ],
        }
    ],
}


class AuditHarness:
    """A lock, records and an ignore file in a folder, and the tool run over them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.lock = folder / "run.txt"
        self.lock.write_text(OPENCV_LOCK)
        self.records = folder / "records"
        self.records.mkdir()
        self.ignore = folder / "ignore.yaml"

    def add(self, record: dict[str, Any], name: str = "") -> None:
        self.records.joinpath(f"{name or record['id']}.json").write_text(json.dumps(record))

    def run(self, *options: str, data: Path | None = None) -> tuple[int, str, str]:
        """Exit code, output, errors."""
        arguments = [
            "--lock",
            str(self.lock),
            "--ignore",
            str(self.ignore),
            "--data",
            str(data or self.records),
        ]
        code = audit.main([*arguments, *options])
        out, err = self._capsys.readouterr()
        return code, out, err


@pytest.fixture
def harness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AuditHarness:
    return AuditHarness(tmp_path, capsys)


def test_a_known_high_vulnerability_of_a_locked_package_fails(harness: AuditHarness) -> None:
    harness.add(OPENCV_RECORD)
    code, out, _ = harness.run()
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("HIGH")]
    assert "opencv-python-headless 4.13.0.92 (run.txt): TEST-2026-1 (CVE-2026-8461), severity 8.8" in line
    assert "1 records, the newest of 2026-07-01" in out


@pytest.mark.parametrize("version", ["4.14.0.94", "4.13.0.89", "5.0.0.93"])
def test_a_version_outside_the_range_passes(harness: AuditHarness, version: str) -> None:
    harness.lock.write_text(OPENCV_LOCK.replace("4.13.0.92", version))
    harness.add(OPENCV_RECORD)
    assert harness.run()[0] == 0


def test_the_locks_of_this_repository_do_not_have_that_opencv(harness: AuditHarness) -> None:
    harness.add(OPENCV_RECORD)
    requirements = REPOSITORY / "requirements"
    locks = [word for path in requirements.glob("run-*.txt") for word in ("--lock", str(path))]
    harness.lock.write_text("")
    code, out, _ = harness.run(*locks)
    assert code == 0
    assert "run-cpu.txt" in out


def test_without_records_nothing_was_checked_and_the_tool_says_so(harness: AuditHarness) -> None:
    code, out, _ = harness.run()
    assert code == 3
    assert out.startswith("audit: nothing was checked")
    assert audit.main(["--lock", str(harness.lock)]) == 3


def test_records_are_read_from_zip_files_and_from_yaml(harness: AuditHarness) -> None:
    archive = harness.folder / "all.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("TEST-2026-1.json", json.dumps(OPENCV_RECORD))
    assert harness.run(data=archive)[0] == 1
    harness.records.joinpath("record.yaml").write_text(json.dumps(OPENCV_RECORD))  # JSON is YAML
    assert harness.run()[0] == 1


def test_a_lower_severity_is_shown_and_passes(harness: AuditHarness) -> None:
    harness.add({**OPENCV_RECORD, "severity": [], "database_specific": {"severity": "MODERATE"}})
    code, out, _ = harness.run()
    assert code == 0
    assert "lower   opencv-python-headless" in out


def test_an_unknown_severity_counts_as_high_until_an_alias_says_more(harness: AuditHarness) -> None:
    """PyPI's own records have no severity; those of GitHub about the same vulnerability do."""
    harness.add({**OPENCV_RECORD, "severity": []})
    code, out, _ = harness.run()
    assert code == 1
    assert "severity unknown" in out
    low = {"severity": [{"type": "CVSS_V3", "score": HIGH.replace("/C:H/I:H/A:H", "/C:N/I:N/A:L")}]}
    harness.add({**OPENCV_RECORD, **low, "id": "TEST-GHSA-2"})
    code, out, _ = harness.run()
    assert code == 0
    assert out.count("opencv-python-headless 4.13.0.92 (") == 1


def test_a_withdrawn_record_does_not_count(harness: AuditHarness) -> None:
    harness.add({**OPENCV_RECORD, "withdrawn": "2026-08-01T00:00:00Z"})
    harness.add({**OPENCV_RECORD, "id": "TEST-2", "affected": []})
    assert harness.run()[0] == 0


def test_an_ignored_vulnerability_passes_until_its_date(harness: AuditHarness) -> None:
    harness.add(OPENCV_RECORD)
    entry = {"id": "CVE-2026-8461", "package": "opencv-python-headless", "reason": "PyAV decodes"}
    harness.ignore.write_text(json.dumps([entry])[:-2] + ', "until": 9999-12-31}]')
    code, out, _ = harness.run()
    assert code == 0
    assert "ignored opencv-python-headless" in out
    harness.ignore.write_text(json.dumps([entry])[:-2] + ', "until": 2026-01-31}]')
    code, out, _ = harness.run()
    assert code == 1
    assert "ended on 2026-01-31: judge it again" in out


@pytest.mark.parametrize(
    "text",
    [
        "- {id: CVE-1, package: x, until: 2027-01-31}",
        "- {id: CVE-1, package: x, reason: '', until: 2027-01-31}",
        "- {id: CVE-1, package: x, reason: y, until: soon}",
        "{id: CVE-1}",
        "[",
    ],
)
def test_an_entry_without_a_reason_or_a_date_is_refused(harness: AuditHarness, text: str) -> None:
    harness.add(OPENCV_RECORD)
    harness.ignore.write_text(text)
    code, _, err = harness.run()
    assert code == 2
    assert err.startswith("audit: ignore.yaml")


def test_the_ignore_file_of_this_repository_can_be_read() -> None:
    audit.read_ignored(audit.IGNORE_FILE)


def test_missing_and_damaged_files_give_one_line(harness: AuditHarness) -> None:
    harness.records.joinpath("x.json").write_text("{")
    assert harness.run()[0] == 2
    code, _, err = harness.run(data=harness.folder / "gone")
    assert (code, err.count("\n")) == (2, 1)
    bom = harness.folder / "x.cdx.json"
    bom.write_text("{}")
    assert harness.run("--sbom", str(bom), data=bom)[0] == 2


def test_libraries_in_wheels_and_packages_of_debian_are_compared_too(harness: AuditHarness) -> None:
    """The records name a library as OSS-Fuzz does, and Debian's source package."""
    bom = harness.folder / "sbom.cdx.json"
    ffmpeg = {"name": "ffmpeg", "version": "8.0.1", "purl": "pkg:generic/ffmpeg@8.0.1"}
    wheel = {"name": "opencv", "version": "1", "purl": "pkg:pypi/opencv@1", "components": [ffmpeg]}
    properties = [
        {"name": "visionedge:debian-source", "value": "glibc"},
        {"name": "visionedge:debian-source-version", "value": "2.36-9+deb12u9"},
    ]
    libc = {"name": "libc6", "version": "2.36-9+deb12u9", "purl": "pkg:deb/debian/libc6@x?distro=debian-12"}
    document = {"bomFormat": "CycloneDX", "components": [wheel, {**libc, "properties": properties}]}
    bom.write_text(json.dumps(document))
    for number, (ecosystem, name, fixed) in enumerate(
        [("OSS-Fuzz", "ffmpeg", "8.0.3"), ("Debian:12", "glibc", "2.36-9+deb12u10")]
    ):
        events = [{"introduced": "0"}, {"fixed": fixed}]
        affected = {
            "package": {"ecosystem": ecosystem, "name": name},
            "ranges": [{"type": "ECOSYSTEM", "events": events}],
        }
        harness.add({**OPENCV_RECORD, "id": f"TEST-{number}", "aliases": [], "affected": [affected]})
    code, out, _ = harness.run("--sbom", str(bom))
    assert code == 1
    assert "HIGH    ffmpeg 8.0.1 (sbom.cdx.json)" in out
    assert "HIGH    glibc 2.36-9+deb12u9 (sbom.cdx.json)" in out


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.0~rc1-1", "1.0-1"),
        ("1.0-1", "1.0-1+deb12u1"),
        ("1.0-9", "1.0-10"),
        ("2.0-1", "1:1.0-1"),
        ("1.0", "1.0a"),
        ("1.0a", "1.0.1"),
        ("1.0-1", "1.0.1-1"),
        ("0", "0~1"),
    ],
)
def test_versions_of_debian_are_ordered_as_dpkg_orders_them(older: str, newer: str) -> None:
    assert audit._debian_key(older) < audit._debian_key(newer)


@pytest.mark.parametrize(
    ("older", "newer"), [("1.1.1k", "1.1.1w"), ("1.1.1", "1.1.1a"), ("8.0.1", "8.0.3"), ("0", "0.0.1")]
)
def test_versions_of_libraries_are_ordered(older: str, newer: str) -> None:
    assert audit._version_key(older) < audit._version_key(newer)


@pytest.mark.parametrize(
    ("events", "affected"),
    [
        ([{"introduced": "0"}], True),
        ([{"introduced": "0"}, {"fixed": "2.0"}], False),
        ([{"introduced": "0"}, {"last_affected": "2.0"}], True),
        ([{"introduced": "0"}, {"last_affected": "1.9"}], False),
        ([{"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "1.5"}, {"fixed": "2.1"}], True),
        ([{"introduced": "2.0.1"}], False),
    ],
)
def test_the_last_event_at_or_below_a_version_decides(events: list[dict[str, str]], affected: bool) -> None:
    part = {
        "package": {"ecosystem": "PyPI", "name": "A_b"},
        "ranges": [{"type": "ECOSYSTEM", "events": events}],
    }
    assert affects({"affected": [part]}, Package("PyPI", "a-b", "2.0", "lock")) is affected
    assert not affects({"affected": [part]}, Package("Debian:12", "A_b", "2.0", "lock"))


@pytest.mark.parametrize(
    ("vector", "score"),
    [
        (HIGH, 8.8),
        ("CVSS:3.0/AV:N/AC:L/PR:N/UI:N/S:C/C:H/I:H/A:H", 10.0),
        ("CVSS:3.1/AV:L/AC:H/PR:L/UI:N/S:U/C:L/I:N/A:N", 2.5),
        ("CVSS:3.1/AV:N/AC:L/PR:N/UI:R/S:C/C:L/I:L/A:N", 6.1),
        ("CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:N/I:N/A:N", 0.0),
        ("CVSS:3.1/AV:N", None),
        ("CVSS:4.0/AV:N/AC:L/AT:N/PR:N/UI:N/VC:H/VI:H/VA:H/SC:N/SI:N/SA:N", None),
    ],
)
def test_base_scores_are_those_of_the_standard(vector: str, score: float | None) -> None:
    """The expected numbers are those of NVD's calculator for such vectors."""
    assert cvss3_score(vector) == score


def test_the_highest_stated_severity_counts() -> None:
    part = {"ecosystem_specific": {"severity": "CRITICAL"}}
    assert severity_score({"database_specific": {"severity": "low"}, "affected": [part]}) == 9.0
