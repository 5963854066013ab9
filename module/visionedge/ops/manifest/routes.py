"""The twin of edgeHub: routes, how they are written and where they lead, and how long messages are kept."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from visionedge.iothub.image_requests import INPUT
from visionedge.ops.manifest.agent import MOST_ORDER, Module
from visionedge.ops.manifest.document import (
    HUB,
    MAX_TEXT_BYTES,
    Findings,
    Manifest,
    Place,
    below,
    has_placeholder,
)
from visionedge.outbound.messages import DETECTIONS, EVENTS

SCHEMA_VERSIONS = ("1.0", "1.1", "1.2", "1.3")
OUTPUTS = (DETECTIONS, EVENTS)

_FORM = (
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

    def takes(self, module: str, output: str) -> bool:
        """Whether messages of an output are among those that it takes; edgeHub compares so, without case."""
        return f"/messages/modules/{module}/outputs/{output}/".lower().startswith(self.source)


def check_routes(
    manifest: Manifest, modules: Mapping[str, Module], ours: Iterable[str], findings: Findings
) -> None:
    """Judge the desired properties of edgeHub; `ours` are the modules that are visionedge."""
    desired = manifest.twins.get(HUB)
    if desired is None:
        if not manifest.layered:
            findings.error(below(manifest.content.path, HUB), "is missing", "it says where messages go")
        return
    entries = findings.known(desired, _HUB_KEYS, "edgeHub")
    version = findings.choice(findings.needed(desired, "schemaVersion", 'write "1.1"'), SCHEMA_VERSIONS)
    _store(entries.get("storeAndForwardConfiguration"), findings)
    routes = findings.needed(desired, "routes", f'write {{"NAME": "{_FORM}"}}')
    judge = _Judge(None if manifest.layered else frozenset(modules), frozenset(ours), findings)
    found = [judge.route(name, place, version) for name, place in findings.mapping(routes).items()]
    if routes is None or manifest.layered:
        return
    for module in ours:
        for output in _sending(manifest.twins.get(module)):
            if not any(route and route.upstream and route.takes(module, output) for route in found):
                what = f"no route takes the output {output} of {module} to IoT Hub: edgeHub drops it unseen"
                remedy = f"add FROM /messages/modules/{module}/outputs/{output} INTO $upstream"
                findings.warning(routes, what, remedy)


def _sending(twin: Place | None) -> tuple[str, ...]:
    """The outputs that a module of ours uses."""
    mode = twin.at("telemetry", "mode") if twin is not None else None
    return (EVENTS,) if mode is not None and mode.text == "none" else OUTPUTS


def _store(place: Place | None, findings: Findings) -> None:
    if place is None:
        return
    findings.known(place, ("timeToLiveSecs", "storeLimits"), "edgeHub")
    time = findings.needed(place, "timeToLiveSecs", "write 7200, which is the default, or more")
    if findings.whole(time, -1, 2**31 - 1) == 0 and time is not None:
        findings.warning(time, "keeps no message while IoT Hub is away", "write 7200 or more")


@dataclass(frozen=True, slots=True)
class _Judge:
    """Reads routes. `modules` are those that there are, None where nobody knows; `ours` are visionedge."""

    modules: frozenset[str] | None
    ours: frozenset[str]
    findings: Findings

    def route(self, name: str, place: Place, version: str | None) -> _Route | None:
        """A route, a text or an object with a text."""
        if not _NAME.fullmatch(name):
            self.findings.error(place, "is no name of a route", "write it without '.', '$', '#' and blanks")
        text_place: Place | None = place
        if place.entries or isinstance(place.value, Mapping):
            entries = self.findings.known(place, ("route", "priority", "timeToLiveSecs"), "edgeHub")
            text_place = self.findings.needed(place, "route", f"write {_FORM}")
            self.findings.whole(entries.get("priority"), 0, 9)
            self.findings.whole(entries.get("timeToLiveSecs"), 0, MOST_ORDER)
            if version == "1.0":
                remedy = 'write "schemaVersion": "1.1", or the route as a text'
                self.findings.error(place, "is an object, which edgeHub takes from 1.1 on", remedy)
        text = self.findings.text(text_place)
        if text is None or text_place is None or has_placeholder(text):
            return None
        return self._understood(text, text_place)

    def _understood(self, text: str, place: Place) -> _Route | None:
        if len(text) > MAX_TEXT_BYTES:
            return None  # no twin takes it, which is told elsewhere
        found = _ROUTE.fullmatch(text)
        if found is None:
            what = "is no route, and edgeHub takes none of them if one is wrong"
            self.findings.error(place, what, f"write {_FORM}")
            return None
        self._condition(found["condition"], place)
        self._source(found["source"], place)
        upstream = self._sink(found["sink"], place)
        return _Route(found["source"].replace("*", "").rstrip("/").lower() + "/", upstream)

    def _condition(self, condition: str | None, place: Place) -> None:
        bare = _QUOTED.sub("''", condition or "")
        if re.search(r"[\"']", bare.replace("''", "")) or bare.count("(") != bare.count(")"):
            self.findings.error(place, "has a WHERE with an open quote or bracket", "close it")

    def _source(self, source: str, place: Place) -> None:
        parts = source.strip("/").split("/")
        if parts[0].lower() not in _SOURCES:
            self.findings.warning(place, f"nothing is known to come from {source}", f"write {_FORM}")
        if [part.lower() for part in parts[:2]] != ["messages", "modules"] or parts[2:3] in ([], ["*"]):
            return
        module = self._known(parts[2], place)
        if len(parts) > 3 and parts[3].lower() not in ("outputs", "*"):
            self.findings.error(place, f"a module has no {parts[3]} to take from", "write outputs")
            return
        output = parts[4] if len(parts) > 4 else "*"
        if module in self.ours and output != "*" and output.lower() not in OUTPUTS:
            remedy = f"write {' or '.join(OUTPUTS)}"
            self.findings.error(place, f"{module} has no output {output}, so this takes nothing", remedy)

    def _known(self, name: str, place: Place) -> str:
        """A module as it is spelt; it is told if there is none."""
        if self.modules is None:
            return name
        found = next((module for module in self.modules if module.lower() == name.lower()), None)
        if found is None:
            remedy = f"name one that runs: {', '.join(sorted(self.modules)[:10])}"
            self.findings.error(place, f"there is no module {name}", remedy)
        return found or name

    def _sink(self, sink: str, place: Place) -> bool:
        """Whether it is IoT Hub."""
        if sink.lower() == "$upstream":
            return True
        endpoint = _ENDPOINT.fullmatch(sink)
        found = _INPUT.fullmatch(endpoint["double"] or endpoint["single"] or "") if endpoint else None
        if found is None:
            what = "leads nowhere that edgeHub knows, and it takes no route at all then"
            self.findings.error(
                place, what, 'write INTO $upstream or BrokeredEndpoint("/modules/M/inputs/I")'
            )
            return False
        module = self._known(found["module"], place)
        if module in self.ours and found["input"] != INPUT:
            what = f"{module} has no input {found['input']}: it drops what comes there"
            self.findings.error(place, what, f"write inputs/{INPUT}")
        return False
