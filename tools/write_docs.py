"""Write the parts of docs/ that follow from the code: settings, keys of documents, metrics.

A part stands between two comments, the first of which names what it is made from:

    <!--make-docs:visionedge.web.documents.CameraDocument-->
    <!--end-->

A model of `config.schema` gives a row for each setting, a model of `web.documents` an item for each key, and
`app.metrics.METRICS` a row for each metric; the texts are the descriptions there. docs/config.schema.json is
written whole.
"""

import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from visionedge.app.metrics import METRICS
from visionedge.config.json_schema import json_schema
from visionedge.config.schema import CameraConfig, Config, ModelConfig, NamedModelConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"

_INHERITED: Mapping[type[BaseModel], type[BaseModel]] = {NamedModelConfig: ModelConfig}
"""Sections whose tables leave out the keys that the table of another section has."""

_PART = re.compile(r"(<!--make-docs:([\w.]+)-->\n).*?(<!--end-->\n)", re.DOTALL)
_SECTION_PATHS: Mapping[object, str] = {
    CameraConfig: "cameras.NAME",
    NamedModelConfig: "models.NAME",
    **{field.annotation: str(field.alias) for field in Config.model_fields.values()},
}


def render_docs(docs: Path = DOCS) -> dict[Path, str]:
    """The text of every file in the folder, its parts made anew."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(docs.rglob("*.md"))}
    made = {path: _PART.sub(_fill, text) for path, text in texts.items()}
    return {**made, docs / "config.schema.json": json.dumps(json_schema(), indent=2) + "\n"}


def _fill(part: re.Match[str]) -> str:
    begin, name, end = part.groups()
    return begin + "".join(f"{line}\n" for line in _lines(pkgutil.resolve_name(name))) + end


def _lines(source: Any) -> Iterator[str]:
    if source is METRICS:
        yield from ("| metric | kind and labels | |", "|---|---|---|")
        yield from _metric_rows()
    elif source in _SECTION_PATHS:
        yield from ("| key | default | |", "|---|---|---|")
        yield from _setting_rows(source, _SECTION_PATHS[source])
    else:
        yield from _key_items(source, "")


def _metric_rows() -> Iterator[str]:
    for name, metric in METRICS.items():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        kind = f"{metric.kind}: {labels}" if labels else metric.kind
        yield f"| `visionedge_{name}` | {kind} | {metric.help} |"


def _setting_rows(section: type[BaseModel], path: str) -> Iterator[str]:
    inherited = _INHERITED[section].model_fields if section in _INHERITED else {}
    fields = [field for name, field in section.model_fields.items() if name not in inherited]
    for field in sorted(fields, key=lambda field: not field.is_required()):
        key = f"{path}.{field.alias}"
        yield f"| `{key}` | {_default(field)} | {_description(field, key)} |".replace("|  |", "| |")
        if inner := _inner_model(field.annotation):
            yield from _setting_rows(inner, f"{key}.NAME" if get_origin(field.annotation) is dict else key)


def _default(field: FieldInfo) -> str:
    """The default, and the other words or the range: ``10 (0.1…86,400)``."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    known = value if isinstance(value, list) else [value]
    others = ", ".join(f"`{word}`" for word in _words(field.annotation) if word not in known)
    limits = f"or {others}" if others else _range(field)
    if value is None:
        return limits
    text = f"{value:g}" if isinstance(value, float) else json.dumps(value).replace('"', "")
    return f"`{text}` ({limits})" if limits else f"`{text}`"


def _range(field: FieldInfo) -> str:
    """``0.1…86,400`` or ``>0``; empty for all numbers from 0 and for texts."""
    limits: dict[str, float] = {}
    for each in field.metadata:
        limits |= {name: getattr(each, name) for name in ("ge", "gt", "le") if hasattr(each, name)}
    least = f">{limits['gt']:,}" if "gt" in limits else f"{limits.get('ge', 0):,}"
    if "le" in limits:
        return f"{least}…{limits['le']:,}"
    return least if "gt" in limits else ""


def _words(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((words for part in get_args(annotation) if (words := _words(part))), ())


def _key_items(document: type[BaseModel], path: str) -> Iterator[str]:
    """The keys; and one level deeper those of documents that may have no other keys."""
    for field in document.model_fields.values():
        key = f"{path}{field.alias}"
        yield f"- `{key}`: {_description(field, key)}"
        inner = _inner_model(field.annotation)
        closed = inner is not None and inner.model_config.get("extra") == "forbid"
        if inner and closed and not path and "schema_" not in inner.model_fields:
            yield from _key_items(inner, f"{key}[]." if get_origin(field.annotation) is list else f"{key}.")


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _inner_model(part))), None)


def _description(field: FieldInfo, key: str) -> str:
    if field.description is not None:
        return field.description
    if len(_words(field.annotation)) != 1:
        raise ValueError(f"{key} has no description")
    return f"`{_words(field.annotation)[0]}`"


if __name__ == "__main__":
    for path, text in render_docs().items():
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(DOCS.parent)}")
