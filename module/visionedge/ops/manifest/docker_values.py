"""createOptions whose types are right and whose values Docker refuses, or takes otherwise than meant.

Rules of limits, mounts, hosts and security options: moby/moby `daemon/`, `volume/mounts/` and `opts/`
(Apache-2.0), read in public copies on 2026-11-30; capabilities: capabilities(7). No engine was asked.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator

from visionedge.ops.manifest.document import (
    JsonNode,
    LintFindings,
    find_angle_placeholder,
    has_placeholder,
)

_CAPABILITIES = """
    ALL AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE
    DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD
    NET_ADMIN NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN
    SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME
    SYS_TTY_CONFIG WAKE_ALARM
""".split()  # noqa: SIM905 - a list would take a line for each word
_MOUNT_TYPES = ("bind", "volume", "tmpfs", "image", "cluster", "npipe")
_BIND_MODES = (
    *("rw", "ro", "z", "Z", "nocopy", "private", "rprivate", "slave", "rslave", "shared", "rshared"),
    *("consistent", "cached", "delegated"),
)
_VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_PORT = re.compile(r"\d{1,5}(?:-\d{1,5})?(?:/(?:tcp|udp|sctp))?", re.IGNORECASE)
_SECURITY = re.compile(
    r"no-new-privileges(?:[=:](?:true|false))?|(?:label|apparmor|seccomp|writable-cgroups)[=:].+", re.DOTALL
)
_HEALTH_KINDS = ("NONE", "CMD", "CMD-SHELL")
_HEALTH_TIMES = ("Interval", "Timeout", "StartPeriod", "StartInterval")
_MILLISECOND = 1_000_000
_SMALLEST_CPU = 10_000_000
_HOST_GATEWAY = "host-gateway"


def check_docker_values(options: JsonNode | None, findings: LintFindings) -> None:
    """Check the values of the createOptions of any module; keys are spelt as in Docker's API."""
    if options is None:
        return
    _check_variables(options, findings)
    _check_health(options.at("Healthcheck"), findings)
    _check_ports(options.at("ExposedPorts"), findings)
    host = options.at("HostConfig")
    if host is None:
        return
    _check_limits(host, findings)
    _check_ports(host.at("PortBindings"), findings)
    _check_mounts(host, findings)
    _check_names(host, findings)


def read_number(node: JsonNode | None) -> int | None:
    """A whole number, or a string with one, which edgeAgent converts."""
    if node is None or isinstance(node.value, bool):
        return None
    if isinstance(node.value, int):
        return node.value
    text = node.text.strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,19}", text) else None


def _is_unfilled(text: str) -> bool:
    return has_placeholder(text) or bool(find_angle_placeholder(text))


def _texts(parent: JsonNode, key: str) -> Iterator[JsonNode]:
    """The strings of a list that have no placeholder."""
    node = parent.at(key)
    for item in node.items if node is not None else ():
        if item.text and not _is_unfilled(item.text):
            yield item


def _check_variables(options: JsonNode, findings: LintFindings) -> None:
    for item in _texts(options, "Env"):
        name, sign, _ = item.text.partition("=")
        if not sign or name != name.strip() or " " in name:
            what = f"sets no variable: {name[:40]!r} is no NAME=VALUE"
            findings.warning(item, what, 'write "NAME=VALUE", without spaces beside the =')


def _check_health(check: JsonNode | None, findings: LintFindings) -> None:
    if check is None:
        return
    test = check.at("Test")
    kind = test.items[0] if test is not None and test.items else None
    if kind is not None and kind.text not in _HEALTH_KINDS:
        findings.warning(kind, "is no kind of check, so Docker makes none", 'write "CMD" before the command')
    for key in _HEALTH_TIMES:
        time = read_number(check.at(key))
        if time is not None and 0 < time < _MILLISECOND:
            remedy = "write nanoseconds: 30000000000 is 30 s"
            findings.error(check.at(key) or check, "is less than 1 ms, which Docker refuses", remedy)


def _check_ports(ports: JsonNode | None, findings: LintFindings) -> None:
    for port, node in ports.entries.items() if ports is not None else ():
        if not has_placeholder(port) and not _PORT.fullmatch(port):
            findings.error(node, "is not the name of a port", "write PORT/tcp or PORT/udp, such as 8080/tcp")


# --- limits -------------------------------------------------------------------------------------------------


def _check_limits(host: JsonNode, findings: LintFindings) -> None:
    memory = read_number(host.at("Memory")) or 0
    swap, reserved = host.at("MemorySwap"), host.at("MemoryReservation")
    if swap is not None and memory > 0 and 0 < (read_number(swap) or 0) < memory:
        what = "is less than Memory, which Docker refuses: it counts memory and swap together"
        findings.error(swap, what, f"write {memory} for no swap, or remove it")
    if swap is not None and not memory and (read_number(swap) or 0) > 0:
        findings.error(swap, "needs Memory, without which Docker refuses it", "add Memory, or remove it")
    if reserved is not None and 0 < memory < (read_number(reserved) or 0):
        findings.error(reserved, "is more than Memory, which Docker refuses", f"write at most {memory}")
    cpus = host.at("NanoCpus")
    count = read_number(cpus) or 0
    if cpus is None or count <= 0:
        return
    if (read_number(host.at("CpuQuota")) or 0) > 0 or (read_number(host.at("CpuPeriod")) or 0) > 0:
        what = "contradicts CpuQuota and CpuPeriod: Docker refuses both together"
        findings.error(cpus, what, "keep NanoCpus alone")
    if count < _SMALLEST_CPU:
        what = "is less than a hundredth of a core; the number is in billionths of a core"
        findings.warning(cpus, what, "write 1000000000 for a core")


# --- mounts -------------------------------------------------------------------------------------------------


def _check_mounts(host: JsonNode, findings: LintFindings) -> None:
    """The binds and mounts of a container of Linux; a path with a backslash is one of Windows."""
    targets: dict[str, JsonNode] = {}
    for bind in _texts(host, "Binds"):
        if "\\" not in bind.text:
            _add_target(_check_bind(bind, findings), bind, targets, findings)
    mounts = host.at("Mounts")
    for mount in mounts.items if mounts is not None else ():
        if mount.entries and not any(map(_is_unfilled, (item.text for item in mount.entries.values()))):
            _add_target(_check_mount(mount, findings), mount, targets, findings)


def _add_target(target: str, node: JsonNode, targets: dict[str, JsonNode], findings: LintFindings) -> None:
    path = target.rstrip("/")
    if path and path in targets:
        findings.error(node, f"mounts {path} a second time, which Docker refuses", "keep one of them")
    targets.setdefault(path, node)


def _check_bind(bind: JsonNode, findings: LintFindings) -> str:
    """Check HOST:CONTAINER[:MODE]; returns the path in the container."""
    parts = bind.text.split(":")
    source, target = (parts[0], parts[1]) if len(parts) > 1 else ("", parts[0])
    unknown = [mode for mode in parts[2].split(",") if mode not in _BIND_MODES] if len(parts) == 3 else []
    if len(parts) > 3 or unknown:
        what = f"has the mode {unknown[0]!r}, which Docker refuses" if unknown else "has too many colons"
        findings.error(bind, what, "write HOST:CONTAINER or HOST:CONTAINER:ro")
    elif not target.startswith("/"):
        findings.error(bind, f"has the relative path {target!r} in the container", "write a path from /")
    elif source and not source.startswith("/") and not _VOLUME_NAME.fullmatch(source):
        what = f"{source!r} is neither a path from / nor the name of a volume"
        findings.error(bind, what, "write a path from /, or a name of letters, digits, '_', '.' and '-'")
    return target


def _check_mount(mount: JsonNode, findings: LintFindings) -> str:
    """Check one of Mounts; returns the path in the container."""
    kind, source, target = (
        node.text if (node := mount.at(key)) else "" for key in ("Type", "Source", "Target")
    )
    if kind not in _MOUNT_TYPES:
        what = f"has the type {kind!r}, which Docker does not know" if kind else "has no Type"
        findings.error(mount, what, f"write {', '.join(_MOUNT_TYPES[:3])}")
    elif "\\" in target or target[1:2] == ":":
        return ""
    elif not target.startswith("/"):
        findings.error(mount, "has no path from / as its Target", 'write "Target": "/PATH"')
    elif kind == "bind" and not source.startswith("/"):
        findings.error(mount, "has no path from / as its Source", 'write "Source": "/PATH"')
    return target


# --- names and addresses ------------------------------------------------------------------------------------


def _check_names(host: JsonNode, findings: LintFindings) -> None:
    rules: tuple[tuple[str, Callable[[str], bool], str, str], ...] = (
        ("CapAdd", _is_capability, "is no capability, and Docker refuses it", "see man 7 capabilities"),
        ("CapDrop", _is_capability, "is no capability, and Docker refuses it", "see man 7 capabilities"),
        ("Dns", _is_address, "is no IP address, so names are not resolved", "write the server's IP address"),
        ("ExtraHosts", _is_host, "is no NAME:ADDRESS, and Docker refuses it", "write NAME:ADDRESS"),
        ("SecurityOpt", _is_security, "is no option that Docker knows", 'write "no-new-privileges"'),
    )
    for key, is_valid, what, remedy in rules:
        for item in _texts(host, key):
            if not is_valid(item.text):
                findings.error(item, what, remedy)
    for key, what in (
        ("AutoRemove", "removes the container and its log each time it ends"),
        ("OomKillDisable", "lets the container hang when its memory is used up, instead of a restart"),
    ):
        switch = host.at(key)
        if switch is not None and (switch.value is True or switch.text.lower() == "true"):
            findings.warning(switch, what, "remove it")


def _is_capability(text: str) -> bool:
    return text.upper().removeprefix("CAP_") in _CAPABILITIES


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text.strip()))
    except ValueError:
        return False


def _is_host(text: str) -> bool:
    name, _, address = text.partition(":")
    return bool(name) and (address == _HOST_GATEWAY or _is_address(address.strip("[]")))


def _is_security(text: str) -> bool:
    return _SECURITY.fullmatch(text) is not None
