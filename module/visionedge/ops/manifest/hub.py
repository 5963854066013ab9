"""The container of edgeHub: where its store is, and which protocols it speaks."""

from visionedge.ops.manifest.agent import Module
from visionedge.ops.manifest.findings import Findings
from visionedge.ops.manifest.gpu_options import environment, mounts, options_path
from visionedge.ops.manifest.place import Place
from visionedge.ops.manifest.placeholders import has_placeholder

_TRUTHS = ("OptimizeForPerformance", "UsePersistentStorage", "mqttSettings__enabled")


def check_hub(hub: Module, findings: Findings) -> None:
    """Judge what edgeHub needs so that messages reach it and outlive it."""
    variables = {n: place for n, place in environment(hub).items() if not has_placeholder(place.text)}
    for name in _TRUTHS:
        place = variables.get(name)
        if place is not None and place.text.lower() not in ("true", "false"):
            findings.warning(place, f"{name} is a truth value", 'write "true" or "false"')
    if _is_false(variables.get("mqttSettings__enabled")):
        where = variables["mqttSettings__enabled"]
        findings.error(where, "closes MQTT, over which visionedge speaks", "leave it out")
    if _is_false(variables.get("UsePersistentStorage")):
        where = variables["UsePersistentStorage"]
        findings.warning(
            where, "loses what edgeHub has acknowledged when it is started again", "leave it out"
        )
    elif "StorageFolder" in variables or "StorageFolder" not in environment(hub):
        _store(hub, variables.get("StorageFolder"), findings)


def _is_false(place: Place | None) -> bool:
    return place is not None and place.text.lower() == "false"


def _store(hub: Module, folder: Place | None, findings: Findings) -> None:
    """Its store is a volume, or goes with the container."""
    targets = [mount.target for mount in mounts(hub) if mount.target and mount.source]
    if folder is None:
        what = "edgeHub keeps its messages inside its container, and they go with it"
        remedy = (
            'write "env": {"StorageFolder": {"value": "/iotedge/storage"}}, and bind a volume to that folder'
        )
        findings.warning(hub.place, what, remedy)
    elif not any(f"{folder.text.rstrip('/')}/".startswith(f"{target}/") for target in targets):
        remedy = f'add {{"HostConfig":{{"Binds":["edgehub:{folder.text}"]}}}}'
        what = "nothing is bound to this folder: edgeHub's messages go with its container"
        findings.warning(options_path(hub), what, remedy)
