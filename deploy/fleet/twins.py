"""Reads what `az` prints, and judges it, for rollout.sh; it calls nothing itself.

Needs Python 3.9 or newer and no package (PyYAML only for a camera file in YAML). JSON of `az` comes on stdin.
An error is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]

FIRST_PRIORITY = 10
"""Of the first layered deployment; the base deployment has 1."""

SECTIONS = (
    "cameras",
    "cameraDefaults",
    "model",
    "models",
    "inference",
    "overload",
    "telemetry",
    "http",
    "events",
    "log",
)
"""Top-level keys of a configuration; a query cannot look at all keys of an object."""

PENDING = "not in use yet"
"""A reason of `rejected` that ends by itself, with the first engine."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")


class InputError(Exception):
    """A file or an answer cannot be used; the text is one line for people."""


# --- judging devices ----------------------------------------------------------------------------------------


def find_fault(reported: Json, device: str) -> str | None:
    """Why a device with the new version must stop the roll-out, or None.

    `device`: where it must compute; empty: where it says that it was requested to.
    """
    engine = reported.get("engine") or {}
    effective, requested = engine.get("effective"), engine.get("requested")
    if effective and device and effective != device:
        return f"computes on {effective}, not on {device} ({engine.get('reasonCode', 'no reason')})"
    if effective == "cpu" and not device and requested not in ("cpu", "auto", None):
        return f"computes on cpu, {requested} was requested ({engine.get('reasonCode', 'no reason')})"
    for section, entry in sorted((reported.get("config") or {}).items()):
        if isinstance(entry, dict) and entry.get("status") == "rejected":
            reasons = [reason for reason in entry.get("reasons") or ["no reason"] if PENDING not in reason]
            if reasons:
                return f"rejects {section}: {reasons[0]}"
    return None


def find_wait(twin: Json, version: str, live_before: list[str]) -> str | None:
    """What is still missing before a device counts as healthy, or None."""
    reported = read_reported(twin)
    running = (reported.get("module") or {}).get("version", "nothing")
    if running != version:
        return f"reports {running}"
    if twin.get("connectionState") == "Disconnected":
        return "is disconnected"
    if not (reported.get("engine") or {}).get("effective"):
        return "has no engine yet"
    cameras = reported.get("cameras") or {}
    lost = [name for name in live_before if cameras.get(name) not in ("live", "disabled", "ended", None)]
    if lost:
        return f"camera {lost[0]} is {cameras[lost[0]]} and was live before"
    return None


def read_reported(twin: Json) -> Json:
    """The reported properties of a twin as a query returns it."""
    properties = twin.get("properties") or {}
    reported: Json = properties.get("reported") or {}
    return reported


def live_cameras(twin: Json) -> list[str]:
    """The names of the cameras that give pictures."""
    return sorted(
        name for name, state in (read_reported(twin).get("cameras") or {}).items() if state == "live"
    )


def judge(arguments: argparse.Namespace) -> None:
    """Print `STATE HEALTHY TOTAL`, then one line for each device that is not healthy.

    STATE: `fault`: more than `--tolerate` devices have a fault; `enough`: the wanted share is healthy; else
    `waiting`.
    """
    ring = read_lines(arguments.ring_devices)
    before = json.loads(Path(arguments.before).read_text(encoding="utf-8"))
    twins = {twin["deviceId"]: twin for twin in read_rows()}
    faults, waits = [], []
    for device_id in ring:
        twin = twins.get(device_id, {})
        reported = read_reported(twin)
        wait = find_wait(twin, arguments.version, before.get(device_id, []))
        is_new = (reported.get("module") or {}).get("version") == arguments.version
        fault = find_fault(reported, arguments.device) if is_new else None
        if fault:
            faults.append(f"{device_id} {fault}")
        elif wait:
            waits.append(f"{device_id} {wait}")
    healthy = len(ring) - len(faults) - len(waits)
    if len(faults) > arguments.tolerate:
        state = "fault"
    else:
        state = "enough" if 100 * healthy >= arguments.percent * len(ring) else "waiting"
    print(state, healthy, len(ring))
    for line in faults if state == "fault" else [*faults, *waits]:
        print(line)


def live(_arguments: argparse.Namespace) -> None:
    """Print the cameras of each device that are live, as JSON."""
    print(json.dumps({twin["deviceId"]: live_cameras(twin) for twin in read_rows()}))


def devices(_arguments: argparse.Namespace) -> None:
    """Print the device of each row."""
    for row in read_rows():
        print(row["deviceId"])


def report(arguments: argparse.Namespace) -> None:
    """Print one line for each device of a ring: version, device, cameras, rejected sections."""
    ring = read_lines(arguments.ring_devices)
    twins = {twin["deviceId"]: twin for twin in read_rows()}
    for device_id in ring:
        twin = twins.get(device_id, {})
        reported = read_reported(twin)
        engine = reported.get("engine") or {}
        cameras = reported.get("cameras") or {}
        bad = [
            f"{name} {state}" for name, state in sorted(cameras.items()) if state not in ("live", "disabled")
        ]
        rejected = [
            name
            for name, entry in sorted((reported.get("config") or {}).items())
            if isinstance(entry, dict) and entry.get("status") == "rejected"
        ]
        parts = [
            (reported.get("module") or {}).get("version", "no module"),
            f"{engine.get('requested', '?')} -> {engine.get('effective', '?')}",
            f"{len(live_cameras(twin))} of {len(cameras)} cameras live",
            *([f"not live: {', '.join(bad)}"] if bad else []),
            *([f"rejected: {', '.join(rejected)}"] if rejected else []),
            *(["disconnected"] if twin.get("connectionState") == "Disconnected" else []),
        ]
        print(f"  {device_id}: {'; '.join(parts)}")


# --- deployments --------------------------------------------------------------------------------------------


def layers(arguments: argparse.Namespace) -> list[Json]:
    """The layered deployments that this script made for a module, from the labels."""
    found = [row for row in read_rows() if (row.get("labels") or {}).get("visionedge") == arguments.name]
    return sorted(found, key=lambda row: (row.get("priority", 0), row["id"]))


def next_priority(arguments: argparse.Namespace) -> None:
    """Print a priority above all deployments of the module."""
    print(max([FIRST_PRIORITY - 1, *(row.get("priority", 0) for row in layers(arguments))]) + 1)


def compare(arguments: argparse.Namespace) -> None:
    """Print `absent`, `same` or `other`: the deployment with this id and the content of the file."""
    wanted = read_json_file(arguments.content)
    found = [row for row in read_rows() if row["id"] == arguments.id]
    modules = modules_of(found[0].get("content") or {}) if found else None
    print("absent" if not found else "same" if modules == modules_of(wanted) else "other")


def modules_of(document: Json) -> Any:
    """The part of a manifest that holds the modules."""
    return document.get("content", document).get("modulesContent")


def ids(arguments: argparse.Namespace) -> None:
    """Print the ids of the deployments of one version, or with `--others` of all other versions."""
    for row in layers(arguments):
        labels = row["labels"]
        is_version = labels.get("version") == arguments.version
        if labels.get("ring") == arguments.ring and is_version != arguments.others:
            print(row["id"])


def table(arguments: argparse.Namespace) -> None:
    """Print one line for each deployment of the module."""
    for row in layers(arguments):
        print(f"{row['id']}: priority {row.get('priority')}, for {row.get('targetCondition')}")


def check_layer(arguments: argparse.Namespace) -> None:
    """Check that a file is a layered deployment that runs the module; warn of what may be a mistake."""
    content = modules_of(read_json_file(arguments.content))
    if not isinstance(content, dict):
        raise InputError(f"{arguments.content}: has no modulesContent")
    module = content.get("$edgeAgent", {}).get(f"properties.desired.modules.{arguments.name}")
    if module is None:
        raise InputError(f"{arguments.content}: is no layered deployment of the module {arguments.name}")
    if "properties.desired" in content.get(arguments.name, {}):
        raise InputError(
            f"{arguments.content}: sets properties.desired of {arguments.name} as a whole, which deletes the"
            " cameras of each device; write properties.desired.SECTION"
        )
    image = module["settings"]["image"]
    if "@sha256:" not in image and arguments.version not in image:
        warn(f"the image {image} does not name the version {arguments.version}")
    if any(key.startswith("properties.desired.cameras") for key in content.get(arguments.name, {})):
        warn(f"{arguments.content}: sets cameras for all devices, which may replace those of each device")


def metrics(arguments: argparse.Namespace) -> None:
    """Print the metric queries of a deployment, as `--metrics` takes them."""
    module = f"FROM devices.modules WHERE moduleId = '{arguments.name}'"
    rejected = " OR ".join(f"properties.reported.config.{name}.status = 'rejected'" for name in SECTIONS)
    queries = {
        "newVersion": f"SELECT deviceId {module}"
        f" AND properties.reported.module.version = '{arguments.version}'",
        "onCpu": f"SELECT deviceId {module} AND properties.reported.engine.effective = 'cpu'"
        " AND properties.reported.engine.requested != 'cpu'",
        "rejected": f"SELECT deviceId {module} AND ({rejected})",
        "noEngine": f"SELECT deviceId {module} AND properties.reported.engine.reasonCode = 'warming-up'",
    }
    print(json.dumps({"queries": queries}))


def fill(arguments: argparse.Namespace) -> None:
    """Print a manifest with each `${NAME}` replaced from the environment."""
    missing: set[str] = set()

    def replace(value: Any) -> Any:
        if isinstance(value, str):
            missing.update(name for name in _VARIABLE.findall(value) if not os.environ.get(name))
            return _VARIABLE.sub(lambda match: os.environ.get(match[1], ""), value)
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        return [replace(item) for item in value] if isinstance(value, list) else value

    filled = replace(read_json_file(arguments.content))
    if missing:
        raise InputError(f"{arguments.content}: set these variables: {', '.join(sorted(missing))}")
    print(json.dumps(filled, indent=2))


# --- cameras ------------------------------------------------------------------------------------------------


def cameras(arguments: argparse.Namespace) -> None:
    """Print the patch that makes the cameras of a twin those of a file; the twin comes on stdin."""
    wanted = read_cameras(arguments.file)
    desired = (json.load(sys.stdin).get("properties") or {}).get("desired") or {}
    print(json.dumps({"cameras": make_patch(desired.get("cameras") or {}, wanted)}))


def make_patch(present: Json, wanted: Json) -> Json:
    """The patch that turns one mapping into another: null for each key that is no longer wanted."""
    patch: Json = {key: None for key in present if key not in wanted}
    for key, value in wanted.items():
        below = present.get(key)
        is_mapping = isinstance(value, dict) and isinstance(below, dict)
        patch[key] = make_patch(below or {}, value) if is_mapping else value
    return patch


def read_cameras(path: str) -> Json:
    """The cameras of a file, by name."""
    document = read_yaml_or_json(path)
    if (
        not isinstance(document, dict)
        or list(document) != ["cameras"]
        or not isinstance(document["cameras"], dict)
    ):
        raise InputError(f"{path}: must have the key 'cameras' and no other")
    for name, camera in document["cameras"].items():
        text = json.dumps(camera)
        if not isinstance(camera, dict):
            raise InputError(f"{path}: cameras.{name}: must be a mapping of keys")
        if "${" in text:
            raise InputError(
                f"{path}: cameras.{name}: has ${{…}}, which a twin does not replace; put its address into the"
                " file on the device"
            )
        if _PASSWORD.search(text):
            warn(
                f"the password of camera {name} will be in the module twin, readable for everyone with"
                " access to it; docs/fleet.md says how to keep it on the device"
            )
    wanted: Json = document["cameras"]
    return wanted


def read_yaml_or_json(path: str) -> Any:
    """The document in a file."""
    text = read_text(path)
    if path.endswith(".json"):
        return parse_json(text, path)
    try:
        import yaml  # only for files in YAML
    except ImportError:
        raise InputError(f"{path}: PyYAML is not installed; install it, or write the file as JSON") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{place}: is not valid YAML") from None


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(f"rollout: warning: {text}", file=sys.stderr)


# --- input --------------------------------------------------------------------------------------------------


def read_rows() -> list[Json]:
    """The list that `az` printed."""
    rows = json.load(sys.stdin)
    return rows if isinstance(rows, list) else []


def read_lines(path: str) -> list[str]:
    """The lines of a file that are not empty."""
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


def read_json_file(path: str) -> Any:
    """The JSON document in a file."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: str) -> Any:
    """The JSON document in a text; `path` names it in an error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: is not valid JSON: {error.msg}") from None


def read_text(path: str) -> str:
    """The text of a file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text") from None


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], list[str]]] = {
    "judge": (judge, ["--version", "--device", "--percent", "--tolerate", "--ring-devices", "--before"]),
    "live": (live, []),
    "devices": (devices, []),
    "report": (report, ["--ring-devices"]),
    "next-priority": (next_priority, ["--name"]),
    "compare": (compare, ["--id", "--content"]),
    "ids": (ids, ["--name", "--version", "--ring"]),
    "table": (table, ["--name"]),
    "check-layer": (check_layer, ["--name", "--version", "--content"]),
    "metrics": (metrics, ["--name", "--version"]),
    "fill": (fill, ["--content"]),
    "cameras": (cameras, ["--file"]),
}


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description="the part of rollout.sh that reads JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, options) in COMMANDS.items():
        command = commands.add_parser(name)
        for option in options:
            kind = int if option in ("--percent", "--tolerate") else str
            command.add_argument(option, required=option != "--device", type=kind, default="")
        if name == "ids":
            command.add_argument("--others", action="store_true")
    arguments = parser.parse_args()
    try:
        COMMANDS[arguments.command][0](arguments)
        sys.stdout.flush()
    except InputError as error:
        print(f"rollout: {error}", file=sys.stderr)
        return 2
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
        print("rollout: az gave an answer that cannot be read", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of stdout has closed it (`rollout.sh status | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
