"""The twin of edgeHub: routes, how they are written and where they lead, and how long messages are kept."""

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
    child_path,
    has_placeholder,
)
from visionedge.outbound.messages import DETECTIONS, EVENTS

SCHEMA_VERSIONS = ("1.0", "1.1", "1.2", "1.3")
OUTPUTS = (DETECTIONS, EVENTS)

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
_SOURCES = ("*", "messages", "twinchangenotifications")
_HUB_KEYS = ("schemaVersion", "routes", "storeAndForwardConfiguration", "mqttBroker", "integrity")


@dataclass(frozen=True, slots=True)
class _Route:
    """A route that was understood: the beginning of what it takes, and whether that goes to IoT Hub."""

    source: str
    upstream: bool

    def matches(self, module: str, output: str) -> bool:
        """Whether messages of an output are among those that it takes; edgeHub compares so, without case."""
        return f"/messages/modules/{module}/outputs/{output}/".lower().startswith(self.source)


def check_routes(
    manifest: Manifest, modules: Mapping[str, EdgeModule], ours: Iterable[str], findings: LintFindings
) -> None:
    """Judge the desired properties of edgeHub; `ours` are the modules that are visionedge."""
    desired = manifest.twins.get(EDGE_HUB)
    if desired is None:
        if not manifest.layered:
            findings.error(
                child_path(manifest.content.path, EDGE_HUB), "is missing", "it says where messages go"
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
                what = f"no route takes the output {output} of {module} to IoT Hub: edgeHub drops it unseen"
                remedy = f"add FROM /messages/modules/{module}/outputs/{output} INTO $upstream"
                findings.warning(routes, what, remedy)


def _used_outputs(twin: JsonNode | None) -> tuple[str, ...]:
    """The outputs that a module of ours uses."""
    mode = twin.at("telemetry", "mode") if twin is not None else None
    return (EVENTS,) if mode is not None and mode.text == "none" else OUTPUTS


def _store(node: JsonNode | None, findings: LintFindings) -> None:
    if node is None:
        return
    findings.known_entries(node, ("timeToLiveSecs", "storeLimits"), "edgeHub")
    time = findings.required(node, "timeToLiveSecs", "write 7200, which is the default, or more")
    if findings.whole(time, -1, 2**31 - 1) == 0 and time is not None:
        findings.warning(time, "keeps no message while IoT Hub is away", "write 7200 or more")


@dataclass(frozen=True, slots=True)
class _RouteChecker:
    """Reads routes. `modules` are those that there are, None where nobody knows; `ours` are visionedge."""

    modules: frozenset[str] | None
    ours: frozenset[str]
    findings: LintFindings

    def route(self, name: str, node: JsonNode, version: str | None) -> _Route | None:
        """A route, a text or an object with a text."""
        if not _NAME.fullmatch(name):
            self.findings.error(node, "is no name of a route", "write it without '.', '$', '#' and blanks")
        text_place: JsonNode | None = node
        if node.entries or isinstance(node.value, Mapping):
            entries = self.findings.known_entries(node, ("route", "priority", "timeToLiveSecs"), "edgeHub")
            text_place = self.findings.required(node, "route", f"write {_ROUTE_SYNTAX}")
            self.findings.whole(entries.get("priority"), 0, 9)
            self.findings.whole(entries.get("timeToLiveSecs"), 0, MAX_STARTUP_ORDER)
            if version == "1.0":
                remedy = 'write "schemaVersion": "1.1", or the route as a text'
                self.findings.error(node, "is an object, which edgeHub takes from 1.1 on", remedy)
        text = self.findings.text(text_place)
        if text is None or text_place is None or has_placeholder(text):
            return None
        return self._understood(text, text_place)

    def _understood(self, text: str, node: JsonNode) -> _Route | None:
        if len(text) > MAX_TEXT_BYTES:
            return None  # no twin takes it, which is told elsewhere
        found = _ROUTE.fullmatch(text)
        if found is None:
            what = "is no route, and edgeHub takes none of them if one is wrong"
            self.findings.error(node, what, f"write {_ROUTE_SYNTAX}")
            return None
        self._condition(found["condition"], node)
        self._source(found["source"], node)
        upstream = self._sink(found["sink"], node)
        return _Route(found["source"].replace("*", "").rstrip("/").lower() + "/", upstream)

    def _condition(self, condition: str | None, node: JsonNode) -> None:
        bare = _QUOTED.sub("''", condition or "")
        if re.search(r"[\"']", bare.replace("''", "")) or bare.count("(") != bare.count(")"):
            self.findings.error(node, "has a WHERE with an open quote or bracket", "close it")

    def _source(self, source: str, node: JsonNode) -> None:
        parts = source.strip("/").split("/")
        if parts[0].lower() not in _SOURCES:
            self.findings.warning(node, f"nothing is known to come from {source}", f"write {_ROUTE_SYNTAX}")
        if [part.lower() for part in parts[:2]] != ["messages", "modules"] or parts[2:3] in ([], ["*"]):
            return
        module = self._known(parts[2], node)
        if len(parts) > 3 and parts[3].lower() not in ("outputs", "*"):
            self.findings.error(node, f"a module has no {parts[3]} to take from", "write outputs")
            return
        output = parts[4] if len(parts) > 4 else "*"
        if module in self.ours and output != "*" and output.lower() not in OUTPUTS:
            remedy = f"write {' or '.join(OUTPUTS)}"
            self.findings.error(node, f"{module} has no output {output}, so this takes nothing", remedy)

    def _known(self, name: str, node: JsonNode) -> str:
        """A module as it is spelt; it is told if there is none."""
        if self.modules is None:
            return name
        found = next((module for module in self.modules if module.lower() == name.lower()), None)
        if found is None:
            remedy = f"name one that runs: {', '.join(sorted(self.modules)[:10])}"
            self.findings.error(node, f"there is no module {name}", remedy)
        return found or name

    def _sink(self, sink: str, node: JsonNode) -> bool:
        """Whether it is IoT Hub."""
        if sink.lower() == "$upstream":
            return True
        endpoint = _ENDPOINT.fullmatch(sink)
        found = _INPUT.fullmatch(endpoint["double"] or endpoint["single"] or "") if endpoint else None
        if found is None:
            what = "leads nowhere that edgeHub knows, and it takes no route at all then"
            self.findings.error(node, what, 'write INTO $upstream or BrokeredEndpoint("/modules/M/inputs/I")')
            return False
        module = self._known(found["module"], node)
        if module in self.ours and found["input"] != IMAGE_INPUT:
            what = f"{module} has no input {found['input']}: it drops what comes there"
            self.findings.error(node, what, f"write inputs/{IMAGE_INPUT}")
        return False
