"""The labels in a configuration, by the model that must have them."""

from visionedge.config.schema import CameraConfig, Config, LineConfig, ZoneConfig, list_class_keys
from visionedge.frames.types import DEFAULT_MODEL

NO_ANSWER = "none"
"""The attribute of an object in which the second model, a detector, finds nothing."""

LabelsByPath = dict[str, tuple[str, ...]]


def list_label_keys(config: Config) -> dict[str, LabelsByPath]:
    """For each model the labels that it must have; `DEFAULT_MODEL` is the section `model`."""
    found: dict[str, LabelsByPath] = {name: {} for name in (DEFAULT_MODEL, *config.models)}
    if config.inference.classes is not None:
        found[DEFAULT_MODEL]["inference.classes"] = config.inference.classes
    chosen = {camera.model for camera in config.cameras.values()}
    for name, model in config.models.items():
        if model.classes is not None:
            found[name][f"models.{name}.classes"] = model.classes
        elif name in chosen:  # the labels of others are answers about objects
            found[name] |= found[DEFAULT_MODEL]
    for name, camera in config.cameras.items():
        found[camera.model or DEFAULT_MODEL] |= list_class_keys(name, camera)
        if camera.then is not None:
            found[camera.then.model] |= _list_attribute_keys(name, camera)
    return found


def _list_attribute_keys(name: str, camera: CameraConfig) -> LabelsByPath:
    """The attributes that zones and lines want; `NO_ANSWER` is no label."""
    rules: list[tuple[str, str, ZoneConfig | LineConfig]] = [
        *(("zones", zone, each) for zone, each in camera.zones.items()),
        *(("lines", line, each) for line, each in camera.lines.items()),
    ]
    return {
        f"cameras.{name}.{kind}.{rule}.attributes.{model}": (label,)
        for kind, rule, each in rules
        for model, label in (each.attributes or {}).items()
        if label != NO_ANSWER
    }
