"""createOptions: read as edgeAgent reads them, and checked against the types of Docker's API.

Types: moby/moby `api/types/container/{config,hostconfig}.go` and `api/types/mount/mount.go` (Apache-2.0, API
1.5x, read 2026-11-30); what edgeAgent and aziot-edged read themselves: Azure/iotedge
`edge-agent/…Agent.Docker/models/*.cs` and `edgelet/docker-rs/src/models/*.rs` (MIT, 2026-08-21).
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import replace

from visionedge.errors import ConfigError
from visionedge.ops.manifest.document import (
    JsonNode,
    LintFindings,
    child_path,
    has_placeholder,
    parse_json,
)

CREATE_OPTIONS = "createOptions"

MAX_PIECE_CHARACTERS = 512
"""The length at which edgeAgent and its tools split createOptions."""

_PIECE = re.compile(r"createoptions(\d*)", re.IGNORECASE)


def is_create_options(key: str) -> bool:
    """Whether a key of a module's settings is one of its createOptions."""
    return _PIECE.fullmatch(key) is not None


def read_create_options(settings: JsonNode, *, template: bool, findings: LintFindings) -> JsonNode | None:
    """The createOptions of a module's settings, an object or a string in pieces; None if there are none."""
    pieces = {key.lower(): item for key, item in settings.entries.items() if is_create_options(key)}
    whole = pieces.get(CREATE_OPTIONS.lower())
    if whole is not None and isinstance(whole.value, Mapping):
        if not template:
            remedy = "write it as a JSON string; only templates may have an object"
            findings.error(whole, "is an object", remedy)
        return read_docker_options(whole, findings)
    if not pieces or not _are_pieces(pieces, findings):
        return None
    text = "".join(pieces[key].text for key in sorted(pieces))
    where = whole or settings
    return _parsed(text, JsonNode(child_path(settings.path, CREATE_OPTIONS), None, line=where.line), findings)


def _are_pieces(pieces: dict[str, JsonNode], findings: LintFindings) -> bool:
    """Whether the pieces are strings with consecutive numbers, as edgeAgent reads them."""
    valid = None not in [findings.text(item) for item in pieces.values()]
    names = [f"{CREATE_OPTIONS}{number:02d}" if number else CREATE_OPTIONS for number in range(len(pieces))]
    for key, item in pieces.items():
        if key not in (name.lower() for name in names) or len(pieces) > 100:
            remedy = (
                f"number the pieces without a gap: {CREATE_OPTIONS}, {CREATE_OPTIONS}01, "
                f"{CREATE_OPTIONS}02 … {CREATE_OPTIONS}99"
            )
            findings.error(item, "is not the next piece, so edgeAgent refuses the deployment", remedy)
            valid = False
        if len(pieces) > 1 and len(item.text) > MAX_PIECE_CHARACTERS:
            remedy = f"split after {MAX_PIECE_CHARACTERS} characters, as edgeAgent and its tools do"
            findings.warning(item, f"is a piece of {len(item.text)} characters", remedy)
    return valid


def _parsed(text: str, where: JsonNode, findings: LintFindings) -> JsonNode | None:
    # edgeAgent reads an empty string and the string null as no options.
    if not text.strip() or text.strip().lower() == "null":
        return None
    try:
        options = parse_json(text, where.path, line=where.line)
    except json.JSONDecodeError as error:
        remedy = "the string must be JSON, with all quotes inside it escaped"
        findings.error(where, f"is not JSON at character {error.pos + 1}: {error.msg}", remedy)
        return None
    except ConfigError as error:
        findings.error(where, str(error), "write options of Docker's API")
        return None
    return read_docker_options(options, findings)


# --- the types of Docker's API ------------------------------------------------------------------------------


def _table(text: str) -> Mapping[str, str]:
    """The type of each key; a line has a type and its keys."""
    lines = [line.split() for line in text.strip().splitlines()]
    return {key: kind for kind, *keys in lines for key in keys}


# A type is a scalar, or an object of this table; `X[]` is a list of X, and `X{}` an object with values of X.
# edgeAgent reads keys with `~` into its own types, and converts "8080" and "true" to what is wanted.
_OBJECTS: Mapping[str, Mapping[str, str]] = {
    # The last two objects are for IoT Edge on Kubernetes.
    "Container": _table("""
        string       Hostname Domainname User Image WorkingDir MacAddress StopSignal Platform
        boolean      AttachStdin AttachStdout AttachStderr Tty OpenStdin StdinOnce
        boolean      ArgsEscaped NetworkDisabled
        integer      StopTimeout
        command      Cmd Entrypoint Shell
        ~string[]    Env
        string[]     OnBuild
        ~string{}    Labels
        object{}     ExposedPorts Volumes
        Healthcheck  Healthcheck
        HostConfig   HostConfig
        object       NetworkingConfig k8s-experimental k8s-extensions
    """),
    "HostConfig": _table("""
        ~string           NetworkMode ContainerIDFile VolumeDriver IpcMode Cgroup PidMode UTSMode UsernsMode
        ~string           Runtime Isolation CgroupParent CpusetCpus CpusetMems InitPath
        string            CgroupnsMode
        ~boolean          AutoRemove Privileged PublishAllPorts ReadonlyRootfs Init OomKillDisable
        ~integer          Memory MemoryReservation MemorySwap MemorySwappiness KernelMemory NanoCpus CpuShares
        ~integer          CpuPeriod CpuQuota CpuRealtimePeriod CpuRealtimeRuntime CpuCount CpuPercent
        ~integer          BlkioWeight OomScoreAdj PidsLimit ShmSize IOMaximumIOps IOMaximumBandwidth DiskQuota
        integer           KernelMemoryTCP
        string[]          Binds
        ~string[]         VolumesFrom CapAdd CapDrop Dns DnsOptions DnsSearch ExtraHosts GroupAdd Links
        ~string[]         SecurityOpt
        string[]          DeviceCgroupRules MaskedPaths ReadonlyPaths
        ~string{}         Sysctls StorageOpt Tmpfs
        string{}          Annotations
        ~integer[]        ConsoleSize
        WeightDevice[]    BlkioWeightDevice
        ThrottleDevice[]  BlkioDeviceReadBps BlkioDeviceWriteBps BlkioDeviceReadIOps BlkioDeviceWriteIOps
        Device[]          Devices
        DeviceRequest[]   DeviceRequests
        Ulimit[]          Ulimits
        LogConfig         LogConfig
        RestartPolicy     RestartPolicy
        Mount[]           Mounts
        PortBinding[]{}   PortBindings
    """),
    "Healthcheck": _table("""
        string[]  Test
        integer   Interval Timeout StartPeriod StartInterval Retries
        boolean   NoWait
    """),
    "DeviceRequest": _table("""
        string      Driver
        integer     Count
        string[]    DeviceIDs
        string[][]  Capabilities
        string{}    Options
    """),
    "Device": _table("~string PathOnHost PathInContainer CgroupPermissions"),
    "Ulimit": _table("~string Name\n ~integer Soft Hard"),
    "LogConfig": _table("~string Type\n ~string{} Config"),
    "RestartPolicy": _table("~string Name\n ~integer MaximumRetryCount"),
    "PortBinding": _table("~string HostIp HostPort"),
    "WeightDevice": _table("~string Path\n ~integer Weight"),
    "ThrottleDevice": _table("~string Path\n ~integer Rate"),
    "Mount": _table("""
        ~string        Type Source Target
        ~boolean       ReadOnly
        string         Consistency
        BindOptions    BindOptions
        VolumeOptions  VolumeOptions
        TmpfsOptions   TmpfsOptions
        object         ImageOptions ClusterOptions
    """),
    "BindOptions": _table("""
        string   Propagation
        boolean  NonRecursive CreateMountpoint ReadOnlyNonRecursive ReadOnlyForceRecursive
    """),
    "VolumeOptions": _table("boolean NoCopy\n string{} Labels\n string Subpath\n object DriverConfig"),
    "TmpfsOptions": _table("integer SizeBytes Mode\n string[][] Options"),
}

_DESCRIPTIONS = {
    "string": "a string",
    "integer": "a whole number",
    "boolean": "true or false",
    "object": "an object",
    "string[]": "a list of strings",
    "string[][]": "a list of lists of strings",
    "string{}": "an object of strings",
}

_EXAMPLES = {
    "Capabilities": 'use double brackets: "Capabilities": [["gpu"]]',
    "Count": "write -1 for all GPUs",
    "Memory": "write bytes: 805306368 is 768 MiB",
    "MemoryReservation": "write bytes: 805306368 is 768 MiB",
    "MemorySwap": "write bytes: 805306368 is 768 MiB",
    "ShmSize": "write bytes: 67108864 is 64 MiB",
    "NanoCpus": "write billionths of a core: 500000000 is half a core",
    "Tmpfs": 'write {"/tmp": "size=64m"}',
    "ExtraHosts": 'write ["NAME:ADDRESS"]',
    "Dns": 'write ["192.0.2.53"]',
    "Env": 'write ["NAME=VALUE"]',
    "Binds": 'write ["HOST:CONTAINER"]',
    "Labels": 'write {"NAME": "VALUE"}',
    "ExposedPorts": 'write {"8080/tcp": {}}',
    "PortBindings": 'write {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}]}',
}


def read_docker_options(options: JsonNode, findings: LintFindings) -> JsonNode:
    """The options with keys as Docker spells them, after a check of their keys and types.

    Docker and edgeAgent read keys in any case. Paths stay as written.
    """
    return _Reader(findings).read(options, "Container", "createOptions")


class _Reader:
    """Reads values by their type of the table."""

    def __init__(self, findings: LintFindings) -> None:
        self._findings = findings

    def read(self, node: JsonNode, kind: str, key: str) -> JsonNode:
        """The value with canonical keys; `key` is the name under which it is found."""
        plain = kind.removeprefix("~")
        if node.value is None:  # null leaves the default
            return node
        if plain.endswith("[]"):
            return self._list(node, kind[:-2], key)
        if plain.endswith("{}"):
            return self._map(node, kind[:-2], key)
        if plain == "command":
            return self._command(node, key)
        if plain in _OBJECTS:
            return self._object(node, plain, key)
        if not _fits(node, kind):
            self._wrong(node, plain, key)
        return node

    def _list(self, node: JsonNode, kind: str, key: str) -> JsonNode:
        if not isinstance(node.value, tuple):
            return self._wrong(node, f"{kind}[]", key)
        if kind == "string[]" and any(item.text for item in node.items):
            self._findings.error(node, "is a flat list, which Docker refuses", _EXAMPLES.get(key, "nest it"))
            return node
        return replace(node, value=tuple(self.read(item, kind, key) for item in node.items))

    def _map(self, node: JsonNode, kind: str, key: str) -> JsonNode:
        if not isinstance(node.value, Mapping):
            return self._wrong(node, f"{kind}{{}}", key)
        entries = {name: self.read(item, kind, key) for name, item in node.entries.items()}
        return replace(node, value=entries)

    def _command(self, node: JsonNode, key: str) -> JsonNode:
        if not isinstance(node.value, str):
            return self.read(node, "string[]", key)
        # Docker would take it.
        self._findings.warning(
            node, "is a string, and aziot-edged reads only a list", f'write "{key}": ["…"]'
        )
        return replace(node, value=(node,))

    def _object(self, node: JsonNode, kind: str, key: str) -> JsonNode:
        self._findings.mapping(node)
        if not isinstance(node.value, Mapping):
            return node
        table = _OBJECTS[kind]
        spelling = {known.lower(): known for known in table}
        entries: dict[str, JsonNode] = {}
        for name, item in node.entries.items():
            known = spelling.get(name.lower())
            if known is None:
                self._unknown(item, name, kind, key)
            entries[known or name] = self.read(item, table[known], known) if known else item
        return replace(node, value=entries)

    def _unknown(self, node: JsonNode, name: str, kind: str, key: str) -> None:
        other = {"Container": "HostConfig", "HostConfig": "Container"}.get(kind, kind)
        belongs = next((known for known in _OBJECTS[other] if known.lower() == name.lower()), None)
        close = difflib.get_close_matches(name[:64], _OBJECTS[kind], n=1)
        if belongs and other == "HostConfig":
            remedy = f'write it there: {{"HostConfig": {{"{belongs}": …}}}}'
            self._findings.warning(node, "belongs into HostConfig, and Docker ignores it here", remedy)
        elif belongs and other != kind:
            remedy = f'write it there: {{"{belongs}": …, "HostConfig": …}}'
            self._findings.warning(node, "belongs beside HostConfig, and Docker ignores it here", remedy)
        else:
            remedy = f"did you mean '{close[0]}'?" if close else "remove it"
            self._findings.warning(node, f"is not a key of {key} in Docker's API, which ignores it", remedy)

    def _wrong(self, node: JsonNode, kind: str, key: str) -> JsonNode:
        plain = kind.removeprefix("~")
        wanted = _DESCRIPTIONS.get(plain) or ("a list" if plain.endswith("[]") else "an object")
        self._findings.wrong_type(node, wanted, _EXAMPLES.get(key, ""))
        return node


def _fits(node: JsonNode, kind: str) -> bool:
    """Whether a scalar has the type `kind`, or edgeAgent converts it."""
    value, converted = node.value, kind.startswith("~")
    if isinstance(value, str) and has_placeholder(value):
        return True
    match kind.removeprefix("~"):
        case "integer":
            whole = isinstance(value, int) and not isinstance(value, bool)
            as_text = isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,19}\s*", value) is not None
            return whole or (converted and (as_text or (isinstance(value, float) and value.is_integer())))
        case "boolean":
            as_text = isinstance(value, str) and value.strip().lower() in ("true", "false")
            return isinstance(value, bool) or (converted and (as_text or isinstance(value, int)))
        case "string":
            return isinstance(value, str) or (converted and isinstance(value, bool | int | float))
        case _:
            return isinstance(value, Mapping)
