"""A stand-in for `az` and the IoT Hub behind it: the commands of deploy/fleet/rollout.sh, and no others.

The hub is a JSON file (`AZ_STAND_IN`, made by `write_hub`): deployments, and devices with their twins. A
device takes what its deployments say after `delay` queries for module twins. Parameters are those of the
Azure CLI with the extension azure-iot; anything else is refused in the words of `az`. Every call is added to
`FILE.calls`.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]

MODULE = "vision"
VARIABLE = "AZ_STAND_IN"

COMMON = {"--output": 1, "--only-show-errors": 0}

# Options of each command, with the number of their values. Those with a `!` are required.
COMMANDS: dict[str, dict[str, int]] = {
    "account show": {},
    "extension show": {"--name!": 1},
    "iot hub query": {"--hub-name": 1, "--query-command!": 1},
    "iot hub device-twin update": {"--hub-name": 1, "--device-id!": 1, "--tags": 1},
    "iot hub module-twin show": {"--hub-name": 1, "--device-id!": 1, "--module-id!": 1},
    "iot hub module-twin update": {"--hub-name": 1, "--device-id!": 1, "--module-id!": 1, "--desired": 1},
    "iot edge deployment list": {"--hub-name": 1},
    "iot edge deployment create": {
        "--hub-name": 1,
        "--deployment-id!": 1,
        "--content!": 1,
        "--target-condition": 1,
        "--priority": 1,
        "--labels": 1,
        "--metrics": 1,
        "--layered": 0,
    },
    "iot edge deployment show-metric": {
        "--hub-name": 1,
        "--deployment-id!": 1,
        "--metric-id!": 1,
        "--metric-type": 1,
    },
    "iot edge deployment delete": {"--hub-name": 1, "--deployment-id!": 1},
}


class AzError(Exception):
    """A command fails; `code` is the exit code, 2 for wrong arguments."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def make_device(ring: str | None, **more: Any) -> Json:
    """A device with the cameras of its site.

    `more`: `effective` (where it computes, whatever is requested), `recovers` (queries until that ends),
    `rejects` (sections), `delay` (queries until it takes a deployment), `dead` (it takes none),
    `cameraStates`.
    """
    return {
        "tags": {"ring": ring} if ring is not None else {},
        "connectionState": "Connected",
        "behaviour": {"delay": 2, **more},
        "left": 0,
        "desired": {"cameras": {"dock": {"uri": "rtsp://192.0.2.5/stream1"}}},
        "reported": {},
        "image": None,
    }


def write_hub(path: Path, devices: Mapping[str, Json]) -> None:
    """A hub without deployments; somebody is logged in, and the extension is installed."""
    document = {"loggedIn": True, "extension": True, "deployments": {}, "devices": devices}
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


# --- the query language -------------------------------------------------------------------------------------


def run_query(text: str, hub: Json) -> list[Json]:
    """The rows of a query over `devices` or `devices.modules`."""
    found = re.fullmatch(
        r"SELECT (\*|deviceId) FROM (devices|devices\.modules)(?: WHERE (.+))?", text, re.IGNORECASE
    )
    if found is None:
        raise AzError(f"ErrorCode:IotHubQuotaExceeded;BadRequest: cannot parse {text!r}")
    columns, source, condition = found.groups()
    rows = [row for row in _rows(hub, source) if condition is None or matches(condition, row)]
    return [{"deviceId": row["deviceId"]} for row in rows] if columns != "*" else rows


def _rows(hub: Json, source: str) -> Iterator[Json]:
    for device_id, device in hub["devices"].items():
        row = {"deviceId": device_id, "connectionState": device["connectionState"]}
        if source == "devices":
            yield {**row, "tags": device["tags"], "capabilities": {"iotEdge": True}}
        elif device["image"] is not None:
            properties = {"desired": device["desired"], "reported": device["reported"]}
            yield {**row, "moduleId": MODULE, "properties": properties}


def matches(condition: str, row: Json) -> bool:
    """Whether a condition holds: comparisons with `=` and `!=`, joined by AND, OR and parentheses."""
    tokens = re.findall(r"'[^']*'|!=|=|\(|\)|[\w.$-]+|\S", condition)
    value = _either(tokens, row)
    if tokens:
        raise AzError(f"BadRequest: cannot parse {condition!r} at {tokens[0]!r}")
    return value


def _either(tokens: list[str], row: Json) -> bool:
    value = _both(tokens, row)
    while tokens and tokens[0].upper() == "OR":
        tokens.pop(0)
        value = _both(tokens, row) or value
    return value


def _both(tokens: list[str], row: Json) -> bool:
    value = _comparison(tokens, row)
    while tokens and tokens[0].upper() == "AND":
        tokens.pop(0)
        value = _comparison(tokens, row) and value
    return value


def _comparison(tokens: list[str], row: Json) -> bool:
    if tokens[:1] == ["("]:
        tokens.pop(0)
        value = _either(tokens, row)
        if tokens[:1] != [")"]:
            raise AzError("BadRequest: a parenthesis is not closed")
        tokens.pop(0)
        return value
    if len(tokens) < 3 or tokens[1] not in ("=", "!="):
        raise AzError(f"BadRequest: cannot parse {' '.join(tokens)!r}")
    path, operator, literal = tokens.pop(0), tokens.pop(0), tokens.pop(0)
    present = _look_up(row, path)
    wanted = literal[1:-1] if literal.startswith("'") else json.loads(literal)
    # A comparison with what is not defined never holds.
    return present is not None and (present == wanted) == (operator == "=")


def _look_up(row: Any, path: str) -> Any:
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


# --- devices take deployments -------------------------------------------------------------------------------


def find_layers(hub: Json, device: Json) -> list[Json]:
    """The deployments that hold for a device, the strongest last; none without a base."""
    rank: Callable[[Json], tuple[int, int]] = lambda each: (each["priority"], each["created"])  # noqa: E731
    row = {"tags": device["tags"], "capabilities": {"iotEdge": True}}
    targeted = sorted(
        (each for each in hub["deployments"].values() if matches(each["targetCondition"], row)), key=rank
    )
    bases = [each for each in targeted if not each["layered"]]
    return [
        *bases[-1:],
        *(each for each in targeted if each["layered"] and bases and rank(each) > rank(bases[-1])),
    ]


def take_deployments(hub: Json) -> None:
    """Every device comes one query nearer to what its deployments say."""
    for device in hub["devices"].values():
        image, desired = None, dict(device["desired"])
        for layer in find_layers(hub, device):
            content = layer["content"]["modulesContent"]
            module = content.get("$edgeAgent", {}).get(f"properties.desired.modules.{MODULE}")
            image = module["settings"]["image"] if module else image
            for key, value in content.get(MODULE, {}).items():
                if key == "properties.desired":
                    desired = dict(value)
                else:
                    desired[key.removeprefix("properties.desired.")] = value
        device["desired"] = desired
        if image == device["image"] or device["behaviour"].get("dead"):
            recover(device)
            continue
        device["left"] = (device["left"] or device["behaviour"]["delay"] + 1) - 1
        if device["left"] == 0:
            device["image"] = image
            device["reported"] = report(device) if image else {}


def recover(device: Json) -> None:
    """A device that computes elsewhere for a while comes one query nearer to what is requested."""
    behaviour = device["behaviour"]
    if (
        "recovers" in behaviour
        and device["reported"].get("engine", {}).get("effective") == behaviour["effective"]
    ):
        behaviour["recovers"] -= 1
        if behaviour["recovers"] == 0:
            del behaviour["effective"], behaviour["recovers"]
            device["reported"] = report(device)


def report(device: Json) -> Json:
    """The reported properties of the module that runs now."""
    behaviour, requested = device["behaviour"], device["desired"].get("inference", {}).get("device", "auto")
    effective = behaviour.get("effective", requested if requested != "auto" else "cuda")
    states = behaviour.get("cameraStates", {})
    return {
        "config": {
            name: {"status": "rejected", "version": 1, "reasons": [f"{name}.key: unknown key"]}
            if name in behaviour.get("rejects", ())
            else {"status": "applied", "version": 1}
            for name in device["desired"]
        },
        "engine": {
            "requested": requested,
            "effective": effective,
            "reasonCode": "ok" if effective == requested else "no-device",
        },
        "cameras": {name: states.get(name, "live") for name in device["desired"].get("cameras", {})},
        "module": {"version": device["image"].rpartition(":")[2].partition("-")[0]},
    }


# --- commands -----------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[str, Json]:
    """The command and its options.

    Raises:
        AzError: there is no such command or option, or a required one is missing.
    """
    words = [*arguments]
    head: list[str] = []
    while words and not words[0].startswith("-"):
        head.append(words.pop(0))
    name = " ".join(head)
    if name not in COMMANDS:
        raise AzError(f"'{head[-1] if head else ''}' is misspelled or not recognized by the system.", 2)
    known = {key.removesuffix("!"): count for key, count in {**COMMANDS[name], **COMMON}.items()}
    options: Json = {}
    while words:
        option = words.pop(0)
        if option not in known:
            raise AzError(f"unrecognized arguments: {option}", 2)
        if known[option] and not words:
            raise AzError(f"argument {option}: expected one argument", 2)
        options[option] = words.pop(0) if known[option] else True
    missing = [key[:-1] for key in COMMANDS[name] if key.endswith("!") and key[:-1] not in options]
    if missing:
        raise AzError(f"the following arguments are required: {', '.join(missing)}", 2)
    return name, options


def answer(name: str, options: Json, hub: Json) -> Any:
    """The answer to a command; it may change the hub."""
    if name == "extension show":
        if not hub["extension"]:
            raise AzError(f"The extension {options['--name']} is not installed.", 3)
        return {"name": options["--name"], "version": "0.25.0"}
    if not hub["loggedIn"]:
        raise AzError("Please run 'az login' to setup account.")
    if name == "account show":
        return {"name": "stand-in"}
    if options.get("--hub-name") != "hub":
        raise AzError(f"No IoT Hub found with name {options.get('--hub-name')} in current subscription.")
    return ANSWERS[name](options, hub)


def _query(options: Json, hub: Json) -> list[Json]:
    text = options["--query-command"]
    if "devices.modules" in text:
        take_deployments(hub)
    return run_query(text, hub)


def _create(options: Json, hub: Json) -> Json:
    name = options["--deployment-id"]
    if not re.fullmatch(r"[a-z0-9\-+%_*!']{1,128}", name):
        raise AzError(f"ErrorCode:ArgumentInvalid;BadRequest: {name} is no id of a configuration")
    if name in hub["deployments"]:
        raise AzError(f"ErrorCode:ConfigurationAlreadyExists;Configuration already exists: {name}")
    document = _read_json(options["--content"])
    content = document.get("content", document)
    if not options.get("--layered") and "runtime" not in content["modulesContent"]["$edgeAgent"].get(
        "properties.desired", {}
    ):
        raise AzError('{"validationErrors": "$edgeAgent"}')
    queries = _read_json(options.get("--metrics", '{"queries": {}}'))["queries"]
    condition = options.get("--target-condition", "")
    if len(queries) > 5:
        raise AzError("ErrorCode:ArgumentInvalid;BadRequest: more than five metrics")
    matches(condition, {})
    for text in queries.values():
        run_query(text, hub)  # an error, if it is none
    made = {
        "id": name,
        "content": content,
        "targetCondition": condition,
        "priority": int(options.get("--priority", 0)),
        "labels": _read_json(options.get("--labels", "{}")),
        "metrics": {"queries": queries},
        "layered": bool(options.get("--layered")),
        "created": len(hub["deployments"]),
    }
    hub["deployments"][name] = made
    return made


def _delete(options: Json, hub: Json) -> None:
    if hub["deployments"].pop(options["--deployment-id"], None) is None:
        raise AzError("ErrorCode:ConfigurationNotFound;Configuration not found")


def _list(_options: Json, hub: Json) -> list[Json]:
    return list(hub["deployments"].values())


def _show_metric(options: Json, hub: Json) -> Json:
    queries = hub["deployments"][options["--deployment-id"]]["metrics"]["queries"]
    metric = options["--metric-id"]
    if metric not in queries:
        raise AzError(f"The user metric '{metric}' is not defined in the configuration", 2)
    return {"metric": metric, "query": queries[metric], "result": run_query(queries[metric], hub)}


def _device(options: Json, hub: Json) -> Json:
    found: Json | None = hub["devices"].get(options["--device-id"])
    if found is None:
        raise AzError(f"ErrorCode:DeviceNotFound;{options['--device-id']} not registered")
    return found


def _set_tags(options: Json, hub: Json) -> Json:
    device = _device(options, hub)
    device["tags"] = _patch(device["tags"], _read_json(options["--tags"]))
    return {"tags": device["tags"]}


def _module(options: Json, hub: Json) -> Json:
    device = _device(options, hub)
    if options["--module-id"] != MODULE or device["image"] is None:
        raise AzError(f"ErrorCode:ModuleNotFound;{options['--module-id']} not registered")
    return device


def _show_twin(options: Json, hub: Json) -> Json:
    device = _module(options, hub)
    return {"properties": {"desired": {**device["desired"], "$version": 3}, "reported": device["reported"]}}


def _set_desired(options: Json, hub: Json) -> Json:
    device = _module(options, hub)
    device["desired"] = _patch(device["desired"], _read_json(options["--desired"]))
    return {"properties": {"desired": device["desired"]}}


def _patch(present: Json, patch: Json) -> Json:
    """A merge patch: null removes a key."""
    merged = dict(present)
    for key, value in patch.items():
        below = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = _patch(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _read_json(text: str) -> Json:
    """The JSON of an argument: a file or the text itself, as the extension reads it."""
    source = Path(text).read_text(encoding="utf-8") if len(text) < 4096 and os.path.exists(text) else text  # noqa: PTH110 - texts that are no paths
    try:
        document = json.loads(source)
    except json.JSONDecodeError as error:
        raise AzError(f"Failed to parse json with exception: {error}") from None
    assert isinstance(document, dict)
    return document


ANSWERS: dict[str, Callable[[Json, Json], Any]] = {
    "iot hub query": _query,
    "iot hub device-twin update": _set_tags,
    "iot hub module-twin show": _show_twin,
    "iot hub module-twin update": _set_desired,
    "iot edge deployment list": _list,
    "iot edge deployment create": _create,
    "iot edge deployment show-metric": _show_metric,
    "iot edge deployment delete": _delete,
}


def main(arguments: list[str]) -> int:
    """Answer one command line; the exit code."""
    path = Path(os.environ[VARIABLE])
    with Path(f"{path}.calls").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps(arguments) + "\n")
    try:
        name, options = parse(arguments)
        hub = json.loads(path.read_text(encoding="utf-8"))
        made = answer(name, options, hub)
    except AzError as error:
        sys.stderr.write(f"ERROR: {error}\n")
        return error.code
    path.write_text(json.dumps(hub, indent=1), encoding="utf-8")
    if made is not None:
        sys.stdout.write(json.dumps(made) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
