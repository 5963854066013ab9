"""What a manifest holds: the twins of its modules, whole ones and those of a layered deployment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from visionedge.ops.manifest.findings import Findings
from visionedge.ops.manifest.place import Place, below

AGENT = "$edgeAgent"
HUB = "$edgeHub"

_DESIRED = "properties.desired"
_TEMPLATE_KEY = "$schema-template"
_TEMPLATE_NAME = ".template.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The desired properties of each module; those that a layered deployment gives in part are put together.

    `template`: what the tools of IoT Edge make a manifest of. `layered`: it goes over a deployment that is
    not here. `content` is where all the modules stand.
    """

    content: Place
    twins: Mapping[str, Place]
    template: bool
    layered: bool

    @property
    def kind(self) -> str:
        """In a word."""
        return "template" if self.template else "layered" if self.layered else "deployment"


def read_content(document: Place, name: str, findings: Findings) -> Manifest:
    """The manifest in a document; `name` is that of its file."""
    top = findings.mapping(document)
    template = _TEMPLATE_KEY in top or PurePath(name).name.endswith(_TEMPLATE_NAME)
    outer = top.get("content")
    holder = document if outer is None or "modulesContent" in top else outer
    findings.mapping(holder)
    content = findings.needed(holder, "modulesContent", "put all modules below it")
    if content is None:
        return Manifest(Place(below(document.path, "modulesContent"), {}), {}, template, layered=False)
    twins = {key: _twin(key, item, findings) for key, item in findings.mapping(content).items()}
    return Manifest(content, twins, template, layered=_is_layered(twins))


def _is_layered(twins: Mapping[str, Place]) -> bool:
    agent = twins.get(AGENT)
    return any(twin.partial for twin in twins.values()) and (agent is None or agent.partial)


def _twin(module: str, place: Place, findings: Findings) -> Place:
    """The desired properties of a module, those of `properties.desired.KEY` laid over the whole ones."""
    entries = findings.mapping(place)
    whole = entries.get(_DESIRED)
    if whole is not None:
        findings.mapping(whole)
    dotted = {key: item for key, item in entries.items() if key.startswith(f"{_DESIRED}.")}
    for key, item in entries.items():
        if key != _DESIRED and key not in dotted:
            remedy = f"write {_DESIRED}, or {_DESIRED}.KEY in a layered deployment"
            findings.error(item, f"IoT Hub knows no such key of {module}", remedy)
    if whole is None and not dotted:
        findings.error(place, "has no desired properties", f"put them below {_DESIRED}")
    twin = whole or Place(place.path, {}, partial=bool(dotted))
    for key, item in dotted.items():
        keys = tuple(key.removeprefix(f"{_DESIRED}.").split("."))
        if not all(keys):
            findings.error(item, "has an empty name between two dots", f"write {_DESIRED}.KEY")
            continue
        twin = twin.laid(keys, item)
    return twin
