"""Compare the locked packages and the SBOMs with known vulnerabilities: what `make audit` runs.

    python tools/audit.py --data all.zip         # OSV's export of an ecosystem, or a folder of records
    python tools/audit.py --data records/ --sbom build/sbom-cpu.cdx.json

The records have OSV's form (JSON or YAML). Nothing is downloaded. Exit codes: 0 nothing of high severity, 1
something of high severity, 2 bad arguments or files, 3 no records, so nothing was checked. A record without a
severity counts as high, because nobody judged it. requirements/audit-ignore.yaml names what was judged, the
reason, and the last day.
"""

import argparse
import datetime as dt
import json
import math
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version

REPOSITORY = Path(__file__).resolve().parents[1]
IGNORE_FILE = REPOSITORY / "requirements/audit-ignore.yaml"
HIGH_SCORE = 7.0

Record = dict[str, Any]


class AuditError(Exception):
    """A file that cannot be used; exit code 2."""


@dataclass(frozen=True, order=True)
class Package:
    """A package of a lock or of an SBOM."""

    ecosystem: str
    """As OSV writes it: PyPI, Debian:12; empty for a library inside a wheel."""
    name: str
    version: str
    origin: str = field(compare=False)
    """The file that lists it."""


@dataclass(frozen=True)
class Finding:
    """A package that a record affects."""

    package: Package
    record: Record
    score: float | None
    """CVSS base score, None if nobody gave one."""

    @property
    def names(self) -> frozenset[str]:
        """The record's name and its other names."""
        return frozenset([str(self.record["id"]), *map(str, self.record.get("aliases") or ())])

    @property
    def is_high(self) -> bool:
        """Whether it must be dealt with."""
        return self.score is None or self.score >= HIGH_SCORE

    def __str__(self) -> str:
        """One line for people."""
        severity = "severity unknown" if self.score is None else f"severity {self.score:.1f}"
        others = ", ".join(sorted(self.names - {self.record["id"]}))
        names = f"{self.record['id']}" + (f" ({others})" if others else "")
        text = " ".join(str(self.record.get("summary") or self.record.get("details") or "").split())[:120]
        package = self.package
        return f"{package.name} {package.version} ({package.origin}): {names}, {severity}: {text}"


@dataclass(frozen=True)
class Ignored:
    """A vulnerability that was judged not to matter here, for some time."""

    id: str
    package: str
    reason: str
    until: dt.date


# Packages


def read_lock(path: Path) -> Iterator[Package]:
    """The pinned packages of a requirements file."""
    for name, version in re.findall(
        r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text("utf-8"), re.MULTILINE
    ):
        yield Package("PyPI", _normalize(name), version, path.name)


def read_sbom(path: Path) -> Iterator[Package]:
    """The components of a CycloneDX document that have a version, at any depth. Raises AuditError."""
    document = _parse(path.name, path.read_text("utf-8"))
    if not isinstance(document, dict) or document.get("bomFormat") != "CycloneDX":
        raise AuditError(f"{path} is not an SBOM in CycloneDX's form")
    todo = list(document.get("components") or ())
    while todo:
        component = todo.pop()
        todo += component.get("components") or ()
        yield from _component_packages(component, path.name)


def _component_packages(component: Mapping[str, Any], origin: str) -> Iterator[Package]:
    purl, version = str(component.get("purl", "")), str(component.get("version") or "")
    if purl.startswith("pkg:pypi/"):
        yield Package("PyPI", _normalize(str(component["name"])), version, origin)
    elif purl.startswith("pkg:deb/"):
        properties = {one["name"]: one["value"] for one in component.get("properties") or ()}
        match = re.search(r"distro=debian-(\d+)", purl)
        name = properties.get("visionedge:debian-source", component["name"])
        source_version = properties.get("visionedge:debian-source-version", version)
        yield Package(f"Debian:{match[1]}" if match else "Debian", str(name), str(source_version), origin)
    elif purl.startswith("pkg:generic/") and version:
        yield Package("", str(component["name"]).lower(), version, origin)


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# Records


def read_records(paths: Iterable[Path]) -> Iterator[Record]:
    """Every record of folders, zip files and single files. Raises AuditError."""
    for path in paths:
        if path.is_dir():
            files = (one for one in sorted(path.rglob("*")) if one.suffix in (".json", ".yaml", ".yml"))
            texts: Iterable[tuple[str, str]] = ((str(one), one.read_text("utf-8")) for one in files)
        elif zipfile.is_zipfile(path):
            texts = _zip_texts(path)
        elif path.is_file():
            texts = [(str(path), path.read_text("utf-8"))]
        else:
            raise AuditError(f"{path} does not exist")
        for name, text in texts:
            record = _parse(name, text)
            if isinstance(record, dict) and "id" in record and not record.get("withdrawn"):
                yield record


def _zip_texts(path: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith((".json", ".yaml", ".yml")):
                yield name, archive.read(name).decode("utf-8")


def _parse(name: str, text: str) -> object:
    try:
        return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise AuditError(f"{name} cannot be read: {str(error).splitlines()[0]}") from None


def affects(record: Record, package: Package) -> bool:
    """Whether the record names this version of this package."""
    return any(
        _is_same_package(part.get("package") or {}, package) and _has_version(part, package)
        for part in record.get("affected") or ()
    )


def _is_same_package(named: Mapping[str, Any], package: Package) -> bool:
    ecosystem, name = str(named.get("ecosystem", "")), str(named.get("name", ""))
    if package.ecosystem == "PyPI":
        return ecosystem == "PyPI" and _normalize(name) == package.name
    if package.ecosystem:
        return ecosystem in (package.ecosystem, package.ecosystem.partition(":")[0]) and name == package.name
    return ecosystem in ("", "GIT", "OSS-Fuzz", "generic") and name.lower() == package.name


def _has_version(part: Mapping[str, Any], package: Package) -> bool:
    if package.version in map(str, part.get("versions") or ()):
        return True
    key = _debian_key if package.ecosystem.startswith("Debian") else _version_key
    ranges = (one for one in part.get("ranges") or () if one.get("type") in ("ECOSYSTEM", "SEMVER"))
    return any(_in_range(one.get("events") or (), package.version, key) for one in ranges)


def _in_range(events: Iterable[Mapping[str, Any]], version: str, key: Any) -> bool:
    """OSV's rule: the last event at or below the version decides."""
    this, affected = key(version), False
    marked = [(key(str(value)), kind) for event in events for kind, value in event.items()]
    for bound, kind in sorted(marked, key=lambda one: one[0]):
        if kind == "introduced" and bound <= this:
            affected = True
        elif (kind == "fixed" and bound <= this) or (kind == "last_affected" and bound < this):
            affected = False
    return affected


@dataclass(frozen=True, order=True)
class _Comparable:
    """A version as something that can be compared; `0` is below all."""

    key: tuple[Any, ...]


def _version_key(version: str) -> _Comparable:
    """Python's order, with a letter behind the number as in OpenSSL's 1.1.1k."""
    if version == "0":
        return _Comparable((0,))
    if match := re.fullmatch(r"(\d+(?:\.\d+)*)([a-z]?)", version):
        return _Comparable((1, Version(match[1]), match[2]))
    try:
        return _Comparable((1, Version(version), ""))
    except InvalidVersion:
        return _Comparable((1, Version(re.match(r"(?:\d+(?:\.\d+)*)?", version)[0] or "0"), version))  # type: ignore[index]  # matches


def _debian_key(version: str) -> _Comparable:
    """Debian's order (Policy 5.6.12): epoch, upstream, revision."""
    if version == "0":
        return _Comparable((0,))
    epoch, _, rest = version.rpartition(":")
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return _Comparable((1, int(epoch or 0), *_debian_parts(upstream), (0,), *_debian_parts(revision)))


def _debian_parts(text: str) -> Iterator[tuple[Any, ...]]:
    for letters, digits in re.findall(r"(\D*)(\d*)", text)[:-1] or [("", "")]:
        # `~` sorts before the end, the end before letters, letters before all else.
        order = [-1 if c == "~" else ord(c) if c.isalpha() else ord(c) + 256 for c in letters]
        yield (*order, 0, int(digits or 0))


# Severity


_V3_WEIGHTS = {
    "AV": {"N": 0.85, "A": 0.62, "L": 0.55, "P": 0.2},
    "AC": {"L": 0.77, "H": 0.44},
    "UI": {"N": 0.85, "R": 0.62},
    "C": {"H": 0.56, "L": 0.22, "N": 0.0},
}
_PRIVILEGES = {"U": {"N": 0.85, "L": 0.62, "H": 0.27}, "C": {"N": 0.85, "L": 0.68, "H": 0.5}}
_WORDS = {"CRITICAL": 9.0, "HIGH": 7.0, "MODERATE": 5.0, "MEDIUM": 5.0, "LOW": 2.0, "NONE": 0.0}


def severity_score(record: Record) -> float | None:
    """The highest score that the record states: a CVSS 3 vector, or the word of its database."""
    scores = [
        score
        for one in record.get("severity") or ()
        if (score := cvss3_score(str(one.get("score", "")))) is not None
    ]
    parts = [record, *(record.get("affected") or ())]
    for part in parts:
        for place in ("database_specific", "ecosystem_specific"):
            word = str((part.get(place) or {}).get("severity", "")).upper()
            scores += [_WORDS[word]] if word in _WORDS else []
    return max(scores, default=None)


def cvss3_score(vector: str) -> float | None:
    """The base score of a CVSS 3.0 or 3.1 vector, None for anything else."""
    if not vector.startswith("CVSS:3."):
        return None
    try:
        m = dict(part.split(":", 1) for part in vector.split("/")[1:])
        changed = m["S"] == "C"
        loss = 1 - math.prod(1 - _V3_WEIGHTS["C"][m[one]] for one in "CIA")
        exploitability = 8.22 * _PRIVILEGES[m["S"]][m["PR"]]
        exploitability *= math.prod(_V3_WEIGHTS[one][m[one]] for one in ("AV", "AC", "UI"))
    except (KeyError, ValueError):
        return None
    impact = 7.52 * (loss - 0.029) - 3.25 * (loss - 0.02) ** 15 if changed else 6.42 * loss
    if impact <= 0:
        return 0.0
    total = min((1.08 if changed else 1.0) * (impact + exploitability), 10.0)
    return math.ceil(round(total * 100_000) / 10_000) / 10


# The audit


def audit(packages: Iterable[Package], records: Iterable[Record]) -> list[Finding]:
    """What is affected. Records of one vulnerability give one finding, with their highest score."""
    by_name: dict[str, list[Package]] = defaultdict(list)
    for package in sorted(set(packages)):
        by_name[package.name].append(package)
    found: list[Finding] = []
    for record in records:
        names = {str((part.get("package") or {}).get("name", "")) for part in record.get("affected") or ()}
        keys = {form for name in names for form in (_normalize(name), name, name.lower())}
        for package in [one for key in keys for one in by_name.get(key, ())]:
            if affects(record, package):
                _add(found, Finding(package, record, severity_score(record)))
    return sorted(found, key=lambda one: (one.package, str(one.record["id"])))


def _add(found: list[Finding], new: Finding) -> None:
    for index, old in enumerate(found):
        if old.package == new.package and old.names & new.names:
            scores = [one.score for one in (old, new) if one.score is not None]
            keep = new if old.score is None and new.score is not None else old
            merged = {**keep.record, "aliases": sorted((old.names | new.names) - {keep.record["id"]})}
            found[index] = Finding(old.package, merged, max(scores, default=None))
            return
    found.append(new)


def read_ignored(path: Path) -> list[Ignored]:
    """The entries of the file, none without a file. Raises AuditError."""
    if not path.is_file():
        return []
    entries = _parse(path.name, path.read_text("utf-8")) or []
    try:
        found = [Ignored(one["id"], one["package"], one["reason"], one["until"]) for one in entries]  # type: ignore[attr-defined]  # a TypeError follows
    except (KeyError, TypeError):
        raise AuditError(f"{path.name}: each entry needs id, package, reason and until") from None
    for one in found:
        if not str(one.reason).strip() or type(one.until) is not dt.date:
            raise AuditError(f"{path.name}: {one.id} needs a reason and a date (until: 2027-01-31)")
    return found


def is_ignored(finding: Finding, ignored: Iterable[Ignored], today: dt.date) -> bool:
    """Whether an entry that is still valid names the finding."""
    return any(
        one.id in finding.names and one.package == finding.package.name and today <= one.until
        for one in ignored
    )


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="compare locks and SBOMs with known vulnerabilities")
    parser.add_argument(
        "--data", type=Path, action="append", default=[], help="folder, zip or file of OSV records"
    )
    parser.add_argument(
        "--lock", type=Path, action="append", help="default: requirements/run-*.txt, build.txt"
    )
    parser.add_argument("--sbom", type=Path, action="append", help="default: build/sbom-*.cdx.json")
    parser.add_argument("--ignore", type=Path, default=IGNORE_FILE)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Print what is found; the exit code is explained above."""
    arguments = _parse_arguments(argv)
    today = dt.datetime.now(dt.UTC).date()
    requirements = REPOSITORY / "requirements"
    locks = arguments.lock or [*sorted(requirements.glob("run-*.txt")), requirements / "build.txt"]
    sboms = (
        sorted((REPOSITORY / "build").glob("sbom-*.cdx.json")) if arguments.sbom is None else arguments.sbom
    )
    try:
        packages = {package for path in locks for package in read_lock(path)}
        packages |= {package for path in sboms for package in read_sbom(path)}
        ignored, records = read_ignored(arguments.ignore), list(read_records(arguments.data))
    except (AuditError, OSError, UnicodeDecodeError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    if not records:
        print(
            "audit: nothing was checked: no records of vulnerabilities; "
            "give --data FOLDER or --data all.zip (OSV's form)"
        )
        return 3
    return _report(packages, records, ignored, [path.name for path in [*locks, *sboms]], today)


def _report(
    packages: set[Package],
    records: list[Record],
    ignored: list[Ignored],
    files: list[str],
    today: dt.date,
) -> int:
    findings = audit(packages, records)
    newest = max(str(record.get("modified", "")) for record in records)[:10] or "an unknown day"
    print(f"audit: {len(packages)} packages of {', '.join(files)}")
    print(f"audit: {len(records)} records, the newest of {newest}")
    high = [one for one in findings if one.is_high and not is_ignored(one, ignored, today)]
    for one in findings:
        kind = "HIGH   " if one in high else "ignored" if one.is_high else "lower  "
        print(f"{kind} {one}")
    for entry in ignored:
        if entry.until < today:
            print(f"audit: the entry {entry.id} of {entry.package} ended on {entry.until}: judge it again")
    print(f"audit: {len(high)} of high or unknown severity, {len(findings) - len(high)} others")
    return 1 if high else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
