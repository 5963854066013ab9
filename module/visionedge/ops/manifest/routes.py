"""Checks of edgeHub: the syntax, source and sink of each route, its store, and its container.

edgeHub rejects all routes if one is wrong, and drops an output without a route silently.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from visionedge.iothub.image_requests import IMAGE_INPUT
from visionedge.ops.manifest.agent import MAX_STARTUP_ORDER, EdgeModule
from visionedge.ops.manifest.document import (
    EDGE_HUB,
    MAX_TEXT_BYTES,
    JsonNode,
    LintFindings,
    Manifest,
    has_placeholder,
)
from visionedge.ops.manifest.gpu_options import create_options_node, read_module_environment, read_mounts
from visionedge.outbound.messages import DETECTIONS, EVENTS, SCENE

_BOOLEAN_VARIABLES = ("OptimizeForPerformance", "UsePersistentStorage", "mqttSettings__enabled")
SCHEMA_VERSIONS = ("1.0", "1.1", "1.2", "1.3")
OUTPUTS = (DETECTIONS, SCENE, EVENTS)

_ROUTE_SYNTAX = (
    'FROM /messages/modules/M/outputs/O [WHERE …] INTO $upstream or BrokeredEndpoint("/modules/M/inputs/I")'
)
_NAME = re.compile(r"[^.$# ]+")
_ROUTE = re.compile(
    r"\s*(?:SELECT\s*\*\s*)?FROM\s*(?P<source>/[^\s()<>@,;:\\\"\[\]?={}]*)"
    r"(?:\s+WHERE\s+(?P<condition>.+?))?\s+INTO\s+(?P<sink>.+?)\s*",
    re.IGNORECASE | re.DOTALL,
)
_ENDPOINT = re.compile(
    r"BrokeredEndpoint\s*\(\s*(?:\"(?P<double>[^\"]*)\"|'(?P<single>[^']*)')\s*\)", re.IGNORECASE
)
_INPUT = re.compile(r"\s*/?modules/(?P<module>[^/]+)/inputs/(?P<input>[^/]+)/?\s*")
_QUOTED = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'", re.DOTALL)
_COMPARED = r"(?:<=|>=|<>|!=|=|<|>)"
_DIGIT = r"[+-]?\.?\d"
# edgeHub compiles a property without `$` as a string (Routing.Core/query/ConditionVisitor.cs, 2026-08-21).
_NUMBER_COMPARISON = re.compile(
    rf"(?<![\w$.\])-])(?P<left>[A-Za-z_]\w*)\s*{_COMPARED}\s*{_DIGIT}"
    rf"|(?<![\w$.\]-])[+-]?(?:\d+\.?\d*|\.\d+)\s*{_COMPARED}\s*(?P<right>[A-Za-z_]\w*)(?![\w(.\[])"
)
# A name of another property, where a text was meant; edgeHub compares both properties.
_NAME_COMPARISON = re.compile(
    r"(?<![\w$.\])-])[A-Za-z_]\w*\s*(?:=|!=|<>)\s*(?!(?:true|false|null|undefined)\b)(?P<name>[A-Za-z_]\w*)(?![\w(.\[])",
    re.IGNORECASE,
)
_SOURCES = ("*", "messages", "twinchangenotifications")
_HUB_KEYS = ("schemaVersion", "routes", "storeAndForwardConfiguration", "mqttBroker", "integrity")


@dataclass(frozen=True, slots=True)
class _Route:
    """A valid route: the prefix of its sources, and whether it leads to IoT Hub."""

    source: str
    upstream: bool

    def matches(self, module: str, output: str) -> bool:
        """Whether the route takes messages of an output; edgeHub compares the prefix without case."""
        return f"/messages/modules/{module}/outputs/{output}/".lower().startswith(self.source)


def check_routes(
    manifest: Manifest, modules: Mapping[str, EdgeModule], ours: Iterable[str], findings: LintFindings
) -> None:
    """Check the desired properties of edgeHub; `ours` are the modules that are visionedge."""
    desired = manifest.twins.get(EDGE_HUB)
    if desired is None:
        if not manifest.layered:
            findings.error(
                manifest.content.missing(EDGE_HUB),
                "is missing",
                "add it: it has the routes of messages",
            )
        return
    entries = findings.known_entries(desired, _HUB_KEYS, "edgeHub")
    version = findings.choice(findings.required(desired, "schemaVersion", 'write "1.1"'), SCHEMA_VERSIONS)
    _store(entries.get("storeAndForwardConfiguration"), findings)
    routes = findings.required(desired, "routes", f'write {{"NAME": "{_ROUTE_SYNTAX}"}}')
    checker = _RouteChecker(None if manifest.layered else frozenset(modules), frozenset(ours), findings)
    found = [checker.route(name, node, version) for name, node in findings.mapping(routes).items()]
    if routes is None or manifest.layered:
        return
    for module in ours:
        for output in _used_outputs(manifest.twins.get(module)):
            if not any(route and route.upstream and route.matches(module, output) for route in found):
                what = (
                    f"no route leads the output {output} of {module} to IoT Hub: edgeHub drops its messages"
                )
                remedy = f"add FROM /messages/modules/{module}/outputs/{output} INTO $upstream"
                findings.warning(routes, what, remedy)


def _used_outputs(twin: JsonNode | None) -> tuple[str, ...]:
    """The outputs that a visionedge module uses, as far as its twin tells."""
    mode = twin.at("telemetry", "mode") if twin is not None else None
    cameras = twin.at("cameras") if twin is not None else None
    has_scene = cameras is not None and any(
        camera.at(key) is not None for camera in cameras.entries.values() for key in ("zones", "lines")
    )
    is_muted = mode is not None and mode.text == "none"
    unused = {*([DETECTIONS] if is_muted else []), *([] if has_scene else [SCENE])}
    return tuple(output for output in OUTPUTS if output not in unused)


def _store(node: JsonNode | None, findings: LintFindings) -> None:
    if node is None:
        return
    findings.known_entries(node, ("timeToLiveSecs", "storeLimits"), "edgeHub")
    time = findings.required(node, "timeToLiveSecs", "write 7200, which is the default, or more")
    if findings.integer(time, -1, 2**31 - 1) == 0 and time is not None:
        findings.warning(time, "keeps no messages while IoT Hub is not reachable", "write 7200 or more")


@dataclass(frozen=True, slots=True)
class _RouteChecker:
    """Checks routes. `modules`: the modules of the manifest, None if unknown; `ours`: those of visionedge."""

    modules: frozenset[str] | None
    ours: frozenset[str]
    findings: LintFindings

    def route(self, name: str, node: JsonNode, version: str | None) -> _Route | None:
        """Check a route, which is a string or an object with one; None if it is not valid."""
        if not _NAME.fullmatch(name):
            self.findings.error(
                node, "is not a valid name of a route", "use a name without '.', '$', '#' and spaces"
            )
        text_place: JsonNode | None = node
        if node.entries or isinstance(node.value, Mapping):
            entries = self.findings.known_entries(node, ("route", "priority", "timeToLiveSecs"), "edgeHub")
            text_place = self.findings.required(node, "route", f"write {_ROUTE_SYNTAX}")
            self.findings.integer(entries.get("priority"), 0, 9)
            self.findings.integer(entries.get("timeToLiveSecs"), 0, MAX_STARTUP_ORDER)
            if version == "1.0":
                remedy = 'write "schemaVersion": "1.1", or the route as a string'
                self.findings.error(node, "is an object, which needs schemaVersion 1.1", remedy)
        text = self.findings.text(text_place)
        if text is None or text_place is None or has_placeholder(text):
            return None
        return self._understood(text, text_place)

    def _understood(self, text: str, node: JsonNode) -> _Route | None:
        if len(text) > MAX_TEXT_BYTES:
            return None  # reported by the check of twins
        found = _ROUTE.fullmatch(text)
        if found is None:
            what = "is not a valid route; edgeHub then rejects all routes"
            self.findings.error(node, what, f"write {_ROUTE_SYNTAX}")
            return None
        self._condition(found["condition"], node)
        self._source(found["source"], node)
        upstream = self._sink(found["sink"], node)
        return _Route(found["source"].replace("*", "").rstrip("/").lower() + "/", upstream)

    def _condition(self, condition: str | None, node: JsonNode) -> None:
        bare = _QUOTED.sub("''", condition or "")
        if re.search(r"[\"']", bare.replace("''", "")) or bare.count("(") != bare.count(")"):
            self.findings.error(node, "has a WHERE with an unclosed quote or bracket", "close it")
            return
        for found in _NUMBER_COMPARISON.finditer(bare):
            name = found["left"] or found["right"]
            what = f"compares the property {name}, a string, with a number; edgeHub then rejects all routes"
            self.findings.error(node, what, f"write as_number({name})")
        for found in _NAME_COMPARISON.finditer(bare):
            what = f"compares with the property {found['name']}; without quotes it is no text"
            self.findings.warning(node, what, f"write '{found['name']}'")

    def _source(self, source: str, node: JsonNode) -> None:
        parts = source.strip("/").split("/")
        if parts[0].lower() not in _SOURCES:
            self.findings.warning(node, f"there is no source {source}", f"write {_ROUTE_SYNTAX}")
        if [part.lower() for part in parts[:2]] != ["messages", "modules"] or parts[2:3] in ([], ["*"]):
            return
        module = self._known(parts[2], node)
        if len(parts) > 3 and parts[3].lower() not in ("outputs", "*"):
            self.findings.error(node, f"a module has no {parts[3]} as a source", "write outputs")
            return
        output = parts[4] if len(parts) > 4 else "*"
        if module in self.ours and output != "*" and output.lower() not in OUTPUTS:
            remedy = f"write {' or '.join(OUTPUTS)}"
            self.findings.error(
                node, f"{module} has no output {output}, so this route gets no messages", remedy
            )

    def _known(self, name: str, node: JsonNode) -> str:
        """The name of a module as written in the manifest; reports an unknown module."""
        if self.modules is None:
            return name
        found = next((module for module in self.modules if module.lower() == name.lower()), None)
        if found is None:
            remedy = f"use one of {', '.join(sorted(self.modules)[:10])}"
            self.findings.error(node, f"there is no module {name}", remedy)
        return found or name

    def _sink(self, sink: str, node: JsonNode) -> bool:
        """Whether the sink is IoT Hub."""
        if sink.lower() == "$upstream":
            return True
        endpoint = _ENDPOINT.fullmatch(sink)
        found = _INPUT.fullmatch(endpoint["double"] or endpoint["single"] or "") if endpoint else None
        if found is None:
            what = "has no valid sink; edgeHub then rejects all routes"
            self.findings.error(node, what, 'write INTO $upstream or BrokeredEndpoint("/modules/M/inputs/I")')
            return False
        module = self._known(found["module"], node)
        if module in self.ours and found["input"] != IMAGE_INPUT:
            what = f"{module} has no input {found['input']}, and drops these messages"
            self.findings.error(node, what, f"write inputs/{IMAGE_INPUT}")
        return False


# --- the container of edgeHub -------------------------------------------------------------------------------


def check_hub(hub: EdgeModule, findings: LintFindings) -> None:
    """Check the variables and the store of edgeHub."""
    variables = {
        n: node for n, node in read_module_environment(hub).items() if not has_placeholder(node.text)
    }
    for name in _BOOLEAN_VARIABLES:
        node = variables.get(name)
        if node is not None and node.text.lower() not in ("true", "false"):
            findings.warning(node, f"{name} is a boolean", 'write "true" or "false"')
    if _is_false(variables.get("mqttSettings__enabled")):
        where = variables["mqttSettings__enabled"]
        findings.error(where, "disables MQTT, which visionedge uses", "remove it")
    if _is_false(variables.get("UsePersistentStorage")):
        where = variables["UsePersistentStorage"]
        findings.warning(where, "loses acknowledged messages when edgeHub restarts", "remove it")
    elif "StorageFolder" in variables or "StorageFolder" not in read_module_environment(hub):
        _check_hub_store(hub, variables.get("StorageFolder"), findings)


def _is_false(node: JsonNode | None) -> bool:
    return node is not None and node.text.lower() == "false"


def _check_hub_store(hub: EdgeModule, folder: JsonNode | None, findings: LintFindings) -> None:
    """Check that the store is on a volume."""
    targets = [mount.target for mount in read_mounts(hub) if mount.target and mount.source]
    if folder is None:
        what = "edgeHub stores its messages inside its container, so they are lost with it"
        remedy = (
            'write "env": {"StorageFolder": {"value": "/iotedge/storage"}}, and mount a volume at that folder'
        )
        findings.warning(hub.node, what, remedy)
    elif not any(f"{folder.text.rstrip('/')}/".startswith(f"{target}/") for target in targets):
        remedy = f'add {{"HostConfig":{{"Binds":["edgehub:{folder.text}"]}}}}'
        what = "no volume is mounted at this folder: edgeHub's messages are lost with its container"
        findings.warning(create_options_node(hub), what, remedy)
