"""Translates a configuration of Azure AI Vision Spatial Analysis. Pure: a document in, a document out.

Its twin has named graphs: what is to be counted, for one camera or for several instances. Graphs of the same
camera become one camera. The keys and their meaning are those of Microsoft's documentation of 2024-01-19
(MicrosoftDocs/azure-docs, spatial-analysis-operations.md).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

from visionedge.config.addresses import parse_camera_uri
from visionedge.config.documents import Document, describe_type, parse_json
from visionedge.config.schema import MAX_SOURCE_ID_CHARACTERS, SpatialAnalysisEvent, check_polygon
from visionedge.errors import ConfigError
from visionedge.frames.geometry import Point
from visionedge.runtime.redaction import AddressParts, find_secrets, mask_address, redact, register_secrets

_OPERATION = "cognitiveservices.vision.spatialanalysis"
_ZONE_EVENTS = (*get_args(SpatialAnalysisEvent), "persondistance")
_LINE_EVENTS = ("linecrossing",)
_EVENTS_OF_OPERATIONS: Mapping[str, tuple[str, ...]] = {
    "": (*get_args(SpatialAnalysisEvent), *_LINE_EVENTS),
    "-personcount": ("count",),
    "-personcrossingline": _LINE_EVENTS,
    "-personcrossingpolygon": ("zonecrossing", "zonedwelltime"),
    "-persondistance": ("persondistance",),
}
"""By the end of the operation's name: the events of zones and lines that name none."""

_ANCHORS = {"footprint": "bottom-center", "bottom_center": "bottom-center", "center": "center"}

_TRANSLATED = ("VIDEO_URL", "VIDEO_SOURCE_ID", "VIDEO_IS_LIVE", "SPACEANALYTICS_CONFIG")
_REASONS: Mapping[str, str] = {
    "DETECTOR_NODE_CONFIG": "inference.device chooses the device, 'confidence' the boxes",
    "TRACKER_NODE_CONFIG": "the tracker has no settings, and no speed",
    "VIDEO_DECODE_GPU_INDEX": "the CPU decodes",
    "INPUT_VIDEO_WIDTH": "pictures are resized for the model only",
    "CAMERACALIBRATOR_NODE_CONFIG": "cameras are not calibrated",
    "CALIBRATION_CONFIG": "cameras are not calibrated",
    "CAMERA_CONFIG": "cameras are not calibrated",
    "ENABLE_FACE_MASK_CLASSIFIER": "face masks are not recognised",
    "target_side": "it needs the orientation of people",
    "threshold": "'minSeconds' decides when somebody is inside, or over a line",
}
"""Why keys have no counterpart; all others are unknown here."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_MAX_COUNT = 2_000
"""The most cameras, zones and lines: each instance may have all of its graph, so a small file can hold
millions."""

_MAX_SHOWN_CHARACTERS = 60
_MAX_NAME_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class ImportedConfig:
    """The configuration, and what the reader must know.

    Attributes:
        document: a configuration.
        ignored: what has no counterpart, or another name; one line each, with the path in the source.
        variables: the environment variables in `document`, and what each holds.
        has_credentials: addresses in `document` have user names, passwords or queries.
    """

    document: Document
    ignored: tuple[str, ...]
    variables: Mapping[str, str]
    has_credentials: bool


def import_spatial_analysis(source: object, *, hide_credentials: bool = False) -> ImportedConfig:
    """Translate a twin or manifest with `graphs`, or a bare SPACEANALYTICS_CONFIG.

    Args:
        source: as it was parsed; a text is parsed as JSON once more.
        hide_credentials: user names, passwords and queries of addresses become ``${NAME}``.

    Raises:
        ConfigError: with every problem, each starting with its path.
    """
    importer = _Importer(hide_credentials)
    importer.read(source)
    if not importer.cameras and not importer.problems:
        importer.problems.append("graphs: no graph is left, so there is no camera to import")
    if importer.problems:
        raise ConfigError([redact(problem) for problem in dict.fromkeys(importer.problems)])
    cameras = {camera.name: camera.document() for camera in importer.cameras.values()}
    telemetry = {"mode": "none", "format": "spatial-analysis"}
    ignored = tuple(redact(line) for line in importer.ignored)
    document = {"cameras": cameras, "telemetry": telemetry}
    has_credentials = importer.has_credentials and not hide_credentials
    return ImportedConfig(document, ignored, importer.variables, has_credentials)


class _Parameters(NamedTuple):
    """The parameters of an instance laid over those of its graph."""

    values: Mapping[str, Any]
    graph_path: str
    own_path: str
    own: Mapping[str, Any]

    def path(self, key: str) -> str:
        """Where a parameter is written."""
        of_graph = key not in self.own and key in self.values
        return f"{self.graph_path if of_graph else self.own_path}.{key}"


@dataclass(slots=True)
class _ImportedCamera:
    name: str
    uri: str
    source_id: str
    loop: bool
    zones: dict[str, Document] = field(default_factory=dict)
    lines: dict[str, Document] = field(default_factory=dict)
    original_names: dict[str, str] = field(default_factory=dict)

    def document(self) -> Document:
        keys: Document = {"uri": self.uri}
        if self.source_id != self.name:
            keys["sourceId"] = self.source_id
        if self.loop:
            keys["loop"] = True
        keys["classes"] = ["person"]
        rules = {"zones": self.zones, "lines": self.lines}
        return keys | {key: value for key, value in rules.items() if value}


class _Importer:
    """Collects cameras, problems, and what has no counterpart."""

    def __init__(self, hide_credentials: bool) -> None:
        self.cameras: dict[tuple[str, str], _ImportedCamera] = {}
        self.problems: list[str] = []
        self.ignored: dict[str, None] = {}
        self.variables: dict[str, str] = {}
        self.has_credentials = False
        self._hides_credentials = hide_credentials
        self._count = 0
        self._parsed: dict[tuple[str, str], Mapping[str, Any] | None] = {}

    def read(self, document: object) -> None:
        if isinstance(document, str):
            document = parse_json(document, "the text")
        found = [*_find_graphs(document, "")]
        for path, graphs, beside in found:
            for key in beside:
                self._ignore(key, "has no counterpart here and is ignored")
            self._read_graphs(path, graphs)
        if found:
            return
        if isinstance(document, Mapping) and {"zones", "lines"} & document.keys():
            self.variables["CAMERA_URI"] = "the address of the camera"
            uri = "${CAMERA_URI}"
            camera = self.cameras[uri, "camera"] = _ImportedCamera("camera", uri, "camera", loop=False)
            self._read_space(camera, document, "", _EVENTS_OF_OPERATIONS[""])
            return
        self.problems.append(
            f"the document is {describe_type(document)} without 'graphs', 'zones' or 'lines'; give a twin of"
            " Spatial Analysis, its desired properties, or a SPACEANALYTICS_CONFIG"
        )

    def _ignore(self, path: str, reason: str) -> None:
        self.ignored[f"{path}: {reason}"] = None

    def _ignore_unknown(self, keys: Iterable[object], known: Sequence[str], path: str) -> None:
        for key in keys:
            if key not in known:
                reason = _REASONS.get(str(key))
                text = "has no counterpart here and is ignored"
                self._ignore(_join(path, key), f"{text}: {reason}" if reason else text)

    def _mapping(self, value: object, path: str) -> Mapping[str, Any] | None:
        if isinstance(value, Mapping):
            return value
        self.problems.append(f"{path}: is {describe_type(value)}; it must be a mapping of keys")
        return None

    def _section(self, keys: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any] | None:
        """A mapping below a key; empty if the key is absent or null."""
        value = keys.get(name)
        return {} if value is None else self._mapping(value, f"{path}.{name}")

    # --- graphs -------------------------------------------------------------------------------------------

    def _read_graphs(self, path: str, graphs: object) -> None:
        found = self._mapping(graphs, path)
        if found is None:
            return
        if not found:
            self.problems.append(f"{path}: is empty; there is no camera to import")
        for name, graph in found.items():
            # A null is how a twin deletes a key.
            if graph is not None and (keys := self._mapping(graph, _join(path, name))) is not None:
                self._read_graph(_join(path, name), str(name), keys)

    def _read_graph(self, path: str, name: str, graph: Mapping[str, Any]) -> None:
        enabled = _read_flag(graph.get("enabled", True))
        if enabled is None:
            self.problems.append(f"{path}.enabled: must be true or false")
        if enabled is False:
            self._ignore(path, "is disabled, so it is left out")
            return
        known = ("enabled", "operationId", "parameters", "instances", "version")
        self._ignore_unknown(graph, known, path)
        events = self._read_operation(graph.get("operationId"), f"{path}.operationId")
        parameters = self._section(graph, "parameters", path)
        instances = self._section(graph, "instances", path)
        if parameters is None or instances is None or events is None:
            return
        self._ignore_unknown(parameters, _TRANSLATED, f"{path}.parameters")
        of_graph = _Parameters(parameters, f"{path}.parameters", f"{path}.parameters", {})
        if not instances:
            self._read_camera(of_graph, name, events)
        for instance, keys in instances.items():
            of_instance = _join(f"{path}.instances", instance)
            if keys is not None and (own := self._read_instance(keys, of_instance)) is not None:
                both = _Parameters({**parameters, **own}, of_graph.own_path, f"{of_instance}.parameters", own)
                self._read_camera(both, str(instance), events)

    def _read_instance(self, instance: object, path: str) -> Mapping[str, Any] | None:
        """The parameters of an instance."""
        keys = self._mapping(instance, path)
        if keys is None:
            return None
        self._ignore_unknown(keys, ("parameters",), path)
        parameters = self._section(keys, "parameters", path)
        self._ignore_unknown(parameters or {}, _TRANSLATED, f"{path}.parameters")
        return parameters

    def _read_operation(self, operation: object, path: str) -> tuple[str, ...] | None:
        """The events of zones and lines that name none."""
        name = operation.removesuffix(".debug") if isinstance(operation, str) else ""
        events = _EVENTS_OF_OPERATIONS.get(name.removeprefix(_OPERATION)) if name else None
        if events is None or not name.startswith(_OPERATION):
            known = ", ".join(f"{_OPERATION}{end}" for end in _EVENTS_OF_OPERATIONS)
            self.problems.append(
                f"{path}: must be one of {known}; set 'enabled: false' to leave the graph out"
            )
            return None
        if name != operation:
            self._ignore(path, "'.debug' has no counterpart here: the page shows the pictures")
        return events

    # --- cameras ------------------------------------------------------------------------------------------

    def _read_camera(self, parameters: _Parameters, name: str, events: tuple[str, ...]) -> None:
        if self._count > _MAX_COUNT:
            return
        url = self._read_url(parameters)
        source_id = self._read_source_id(parameters, name)
        space_path = parameters.path("SPACEANALYTICS_CONFIG")
        space = self._read_json(parameters.values.get("SPACEANALYTICS_CONFIG"), space_path)
        live = _read_flag(parameters.values.get("VIDEO_IS_LIVE", True))
        if live is None:
            self.problems.append(f"{parameters.path('VIDEO_IS_LIVE')}: must be true or false")
        if space is None:
            return
        if url is None:  # its zones and lines are checked all the same
            camera = _ImportedCamera("", "", "", loop=False)
        else:
            camera = self._find_camera(url, source_id, parameters.path("VIDEO_URL"))
        camera.loop = camera.loop or live is False
        self._read_space(camera, space, space_path, events)

    def _read_url(self, parameters: _Parameters) -> str | None:
        url, path = parameters.values.get("VIDEO_URL"), parameters.path("VIDEO_URL")
        if not isinstance(url, str) or not url.strip():
            is_missing = "VIDEO_URL" not in parameters.values
            self.problems.append(
                f"{path}: {'is missing' if is_missing else 'must be the address of a camera'}"
            )
            return None
        url = url.strip()
        register_secrets(find_secrets([url]))
        if "://" not in url and not url.startswith(("/", "./", "${")):
            self.problems.append(
                f"{path}: must be rtsp://, http(s):// or the absolute path of a file; an address that is"
                " obfuscated must be given as it was before"
            )
            return None
        try:
            parse_camera_uri(url)
        except ConfigError as error:
            self.problems += [f"{path}: {problem}" for problem in error.problems]
            return None
        return url

    def _read_source_id(self, parameters: _Parameters, name: str) -> str:
        given, path = parameters.values.get("VIDEO_SOURCE_ID"), parameters.path("VIDEO_SOURCE_ID")
        if given is None or given == "":
            self._ignore(path, f"is missing; sourceInfo.id is '{_show(name)}'")
            given = name
        if isinstance(given, bool) or not isinstance(given, str | int):
            self.problems.append(f"{path}: must be a text")
            return ""
        plain = "".join(c if c.isprintable() else "-" for c in str(given))
        source_id = _escape_dollars(plain[:MAX_SOURCE_ID_CHARACTERS], "-")
        if source_id != str(given):
            self._ignore(path, "is too long or has control characters; sourceInfo.id is another one")
        return self._note_variables(source_id, path)

    def _read_json(self, value: object, path: str) -> Mapping[str, Any] | None:
        """A parameter that holds JSON, mostly in a text."""
        if value is None or value == "":
            self.problems.append(f"{path}: is missing")
            return None
        if isinstance(value, str):
            if (value, path) not in self._parsed:  # else another instance has read it
                self._parsed[value, path] = self._parse(value, path)
            return self._parsed[value, path]
        return self._mapping(value, path)

    def _parse(self, text: str, path: str) -> Mapping[str, Any] | None:
        try:
            return self._mapping(parse_json(text, path), path)
        except ConfigError as error:
            self.problems += error.problems
            return None

    def _find_camera(self, url: str, source_id: str, path: str) -> _ImportedCamera:
        """The camera with this address and name, which other graphs may use, too."""
        camera = self.cameras.get((url, source_id))
        if camera is None:
            taken = {each.name for each in self.cameras.values()}
            name = _make_unique(_make_camera_name(source_id), taken)
            uri = self._make_uri(url, name, path)
            camera = self.cameras[url, source_id] = _ImportedCamera(name, uri, source_id, loop=False)
        return camera

    def _make_uri(self, url: str, name: str, path: str) -> str:
        """The address, on request with ``${NAME}`` for what may be secret in it; those of a template stay."""
        scheme, separator, rest = url.partition("://")
        self.has_credentials |= mask_address(url) != url
        if not separator or not self._hides_credentials:
            uri = _escape_dollars(url)
        else:
            uri = f"{scheme}://{self._hide_parts(scheme, AddressParts.parse(rest), name, path)}"
        return self._note_variables(uri, path)

    def _note_variables(self, text: str, path: str) -> str:
        for variable in _VARIABLE.findall(text):
            self.variables.setdefault(variable, f"a part of {path}")
        return text

    def _hide_parts(self, scheme: str, parts: AddressParts, name: str, path: str) -> str:
        prefix = self._make_variable_prefix(name)

        def hide(text: str, kind: str, what: str) -> str:
            if not text or _VARIABLE.search(text):
                return _escape_dollars(text)
            self.variables[f"{prefix}_{kind}"] = f"{what} in {path}, as it is written there"
            return f"${{{prefix}_{kind}}}"

        login, tail = "", parts.tail
        if parts.user is not None:
            user, colon, password = parts.user.partition(":")
            user, password = hide(user, "USER", "the user name"), hide(password, "PASSWORD", "the password")
            login = f"{user}{colon}{password}@"
        plain, mark, query = tail.partition("?")
        if mask_address(f"{scheme}://{parts.host}{plain}") != f"{scheme}://{parts.host}{plain}":
            tail = tail[0] + hide(tail[1:], "PATH", "the path")
        else:
            tail = _escape_dollars(plain) + mark + hide(query, "QUERY", "what follows '?'")
        return f"{login}{parts.host}{tail}"

    def _make_variable_prefix(self, name: str) -> str:
        """The name of a camera as the begin of variables, which no other camera has."""
        prefix = re.sub("[^A-Z0-9]", "_", name.upper())
        # Neither a digit nor one of the module's own variables.
        if not prefix[0].isalpha() or prefix.startswith("VISIONEDGE"):
            prefix = f"CAMERA_{prefix}"
        taken = {variable.rpartition("_")[0] for variable in self.variables}
        return _make_unique(prefix, taken, "_")

    # --- zones and lines ----------------------------------------------------------------------------------

    def _read_space(
        self, camera: _ImportedCamera, space: Mapping[str, Any], path: str, events: tuple[str, ...]
    ) -> None:
        zones, lines = self._items(space, "zones", path), self._items(space, "lines", path)
        self._count += 1 + len(zones) + len(lines)
        if self._count > _MAX_COUNT:
            self.problems.append(
                f"graphs: there are more than {_MAX_COUNT} cameras, zones and lines; import them in parts"
            )
            return
        self._ignore_unknown(space, ("zones", "lines"), path)
        for number, zone in enumerate(zones):
            zone_path = _join(path, f"zones.{number}")
            if (keys := self._mapping(zone, zone_path)) is not None:
                self._read_zone(camera, keys, zone_path, events)
        for number, line in enumerate(lines):
            line_path = _join(path, f"lines.{number}")
            if (keys := self._mapping(line, line_path)) is not None:
                self._read_line(camera, keys, line_path)
        if not camera.zones and not camera.lines:
            self._ignore(path or "SPACEANALYTICS_CONFIG", "has nothing that is counted here")

    def _items(self, keys: Mapping[str, Any], name: str, path: str) -> list[Any]:
        value = keys.get(name)
        if value is None or isinstance(value, list):
            return value or []
        self.problems.append(f"{_join(path, name)}: is {describe_type(value)}; it must be a list")
        return []

    def _read_zone(
        self, camera: _ImportedCamera, zone: Mapping[str, Any], path: str, of_operation: tuple[str, ...]
    ) -> None:
        self._ignore_unknown(zone, ("name", "polygon", "events"), path)
        name = self._read_name(zone, path)
        polygon = self._read_polygon(zone.get("polygon"), f"{path}.polygon")
        types, anchor = self._read_events(zone, path, _ZONE_EVENTS)
        if not types:
            types = [each for each in of_operation if each in _ZONE_EVENTS]
        if "persondistance" in types:
            self._ignore(path, "persondistance is left out: distances need a calibrated camera")
        sent = [each for each in get_args(SpatialAnalysisEvent) if each in types]
        if not sent:
            self._ignore(path, "has no event that is sent here, so the zone is left out")
        if not sent or name is None or polygon is None:
            return
        made: Document = {"polygon": polygon}
        if anchor == "center":
            made["anchor"] = anchor
        if (known := self._find_zone(camera, name, made)) is not None:
            sent = [each for each in get_args(SpatialAnalysisEvent) if each in (*sent, *known)]
        own_name = self._name_rule(camera, name, f"{path}.name", made)
        if len(sent) < len(get_args(SpatialAnalysisEvent)):
            made["spatialAnalysis"] = sent
        camera.zones[own_name] = made

    def _find_zone(self, camera: _ImportedCamera, name: str, made: Document) -> Sequence[str] | None:
        """The events of the same zone in another graph."""
        for own_name, zone in camera.zones.items():
            if camera.original_names[own_name] == name and _is_same(made, zone):
                return list(zone.get("spatialAnalysis", get_args(SpatialAnalysisEvent)))
        return None

    def _read_line(self, camera: _ImportedCamera, line: Mapping[str, Any], path: str) -> None:
        self._ignore_unknown(line, ("name", "line", "events"), path)
        name = self._read_name(line, path)
        _, anchor = self._read_events(line, path, _LINE_EVENTS)
        ends = self._mapping(line.get("line"), f"{path}.line")
        if ends is None:
            return
        start = self._read_point(ends.get("start"), f"{path}.line.start")
        end = self._read_point(ends.get("end"), f"{path}.line.end")
        if start is not None and start == end:
            self.problems.append(f"{path}.line: 'start' and 'end' are the same point")
        if name is None or start is None or end is None:
            return
        made: Document = {"start": [*start], "end": [*end]}
        if anchor == "center":
            made["anchor"] = anchor
        camera.lines[self._name_rule(camera, name, f"{path}.name", made)] = made

    def _read_name(self, keys: Mapping[str, Any], path: str) -> str | None:
        name = keys.get("name")
        if isinstance(name, str) and name.strip():
            return name
        self.problems.append(f"{path}.name: {'is missing' if name is None else 'must be a text'}")
        return None

    def _name_rule(self, camera: _ImportedCamera, name: str, path: str, made: Document) -> str:
        """Its name here: of the same zone or line in another graph, or a new one."""
        for own_name, rule in (*camera.zones.items(), *camera.lines.items()):
            if camera.original_names[own_name] == name and _is_same(made, rule):
                return own_name
        own_name = _make_unique(_make_rule_name(name), {*camera.zones, *camera.lines}, "-")
        camera.original_names[own_name] = name
        if own_name != name:
            self._ignore(path, f"is '{own_name}' here and in messages")
        return own_name

    def _read_polygon(self, value: object, path: str) -> list[list[float]] | None:
        if not isinstance(value, list):
            what = "is missing" if value is None else "must be a list of points [x, y]"
            self.problems.append(f"{path}: {what}")
            return None
        read = [self._read_point(point, f"{path}.{number}") for number, point in enumerate(value)]
        points = [point for point in read if point is not None]
        if len(points) < len(read):
            return None
        if len(points) > 1 and points[0] == points[-1]:
            points.pop()
        try:
            return [[*point] for point in check_polygon(tuple(points))]
        except ValueError as error:
            self.problems.append(f"{path}: {error}")
            return None

    def _read_point(self, value: object, path: str) -> Point | None:
        if isinstance(value, Mapping):
            value = [value.get("x"), value.get("y")]
        if not isinstance(value, list) or len(value) != 2 or not all(map(_is_coordinate, value)):
            self.problems.append(f"{path}: must be a point, x and y from 0 to 1")
            return None
        return float(value[0]), float(value[1])

    def _read_events(
        self, rule: Mapping[str, Any], path: str, known: Sequence[str]
    ) -> tuple[list[str], str | None]:
        """The types of the events of a zone or line, and the anchor."""
        types, anchors = list[str](), list[str]()
        for number, event in enumerate(self._items(rule, "events", path)):
            event_path = f"{path}.events.{number}"
            keys = self._mapping(event, event_path)
            if keys is None:
                continue
            self._ignore_unknown(keys, ("type", "config"), event_path)
            if keys.get("type") not in known:
                self.problems.append(f"{event_path}.type: must be one of {', '.join(known)}")
                continue
            types.append(str(keys["type"]))
            config = self._section(keys, "config", event_path)
            if types[-1] != "persondistance" and config is not None:
                anchors.append(self._read_event_config(config, f"{event_path}.config", anchors))
        return types, anchors[0] if anchors else None

    def _read_event_config(self, config: Mapping[str, Any], path: str, anchors: Sequence[str]) -> str:
        """The anchor of an event; the others of its zone have `anchors`."""
        self._ignore_unknown(config, ("trigger", "output_frequency", "focus"), path)
        trigger, frequency = config.get("trigger", "event"), config.get("output_frequency", 1)
        if trigger == "interval":
            self._ignore(f"{path}.trigger", "'interval' has no counterpart here: each change is sent")
        elif trigger != "event":
            self.problems.append(f"{path}.trigger: must be event or interval")
        if frequency != 1:
            self._ignore(f"{path}.output_frequency", "has no counterpart here: every event is sent")
        focus = config.get("focus", "footprint")
        anchor = _ANCHORS.get(focus) if isinstance(focus, str) else None
        if anchor is None:
            self.problems.append(f"{path}.focus: must be one of {', '.join(_ANCHORS)}")
            return "bottom-center"
        if anchors and anchor != anchors[0]:
            self._ignore(f"{path}.focus", f"is ignored: the first event of the zone has '{anchors[0]}'")
        return anchor


def _is_same(one: Document, other: Document) -> bool:
    """Whether two zones or lines have the same geometry and anchor."""
    return all(one.get(key) == other.get(key) for key in ("polygon", "start", "end", "anchor"))


def _find_graphs(document: object, path: str) -> Iterator[tuple[str, object, list[str]]]:
    """Every `graphs` in a twin or a deployment manifest, its path, and the paths of the keys beside it."""
    if not isinstance(document, Mapping):
        return
    for key, value in document.items():
        inner = _join(path, key)
        if key == "graphs" or str(key).endswith(".graphs"):
            others = [other for other in map(str, document) if other != key and not other.startswith("$")]
            yield inner, value, [_join(path, other) for other in others]
        elif key in ("content", "properties", "desired", "properties.desired"):
            yield from _find_graphs(value, inner)
        elif key == "modulesContent" and isinstance(value, Mapping):
            for module, content in value.items():
                yield from _find_graphs(content, _join(inner, module))


def _join(path: str, key: object) -> str:
    return f"{path}.{_show(str(key))}" if path else _show(str(key))


def _show(text: str) -> str:
    """A text of the source for one line of a message."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= _MAX_SHOWN_CHARACTERS else f"{shown[:_MAX_SHOWN_CHARACTERS]}…"


def _read_flag(value: object) -> bool | None:
    """A boolean, or its word; None: neither."""
    words = {"true": True, "false": False}
    return value if isinstance(value, bool) else words.get(value.lower()) if isinstance(value, str) else None


def _is_coordinate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _escape_dollars(text: str, escaped: str = "%24") -> str:
    """The text without a ``${`` that begins no ``${NAME}``, which a configuration refuses."""
    return re.sub(rf"\$(?=\{{)(?!{_VARIABLE.pattern[2:]})", escaped, text)


def _make_camera_name(text: str) -> str:
    return re.sub("[^a-z0-9_]+", "-", _to_ascii(text).lower()).strip("-")[:_MAX_NAME_CHARACTERS] or "camera"


def _make_rule_name(text: str) -> str:
    return re.sub("[^A-Za-z0-9_. -]", "-", _to_ascii(text)).strip()[:_MAX_NAME_CHARACTERS].strip() or "zone"


def _to_ascii(text: str) -> str:
    """Letters without their accents; other characters become ``-``."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(c if c.isascii() else "-" for c in letters if not unicodedata.combining(c))


def _make_unique(name: str, taken: Iterable[str], separator: str = "-") -> str:
    """The name, with a number at its end if it is taken."""
    used, number, unique = set(taken), 1, name
    while unique in used:
        number += 1
        end = f"{separator}{number}"
        unique = f"{name[: _MAX_NAME_CHARACTERS - len(end)]}{end}"
    return unique
