"""What modules cannot have twice: ports of the device, and a data folder."""

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence

from visionedge.ops.manifest.agent import Module
from visionedge.ops.manifest.findings import Findings
from visionedge.ops.manifest.gpu_options import mounts, texts
from visionedge.ops.manifest.module_settings import DATA
from visionedge.ops.manifest.place import Place
from visionedge.ops.manifest.placeholders import has_placeholder

_ANY = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


def check_together(modules: Mapping[str, Module], ours: Sequence[str], findings: Findings) -> None:
    """Judge what the modules of a manifest share, and what of it they cannot."""
    taken: dict[str, list[tuple[str, str]]] = {}
    for name, module in modules.items():
        for binding, address, port in _published(module, findings):
            before = taken.setdefault(port, [])
            other = next((who for who, where in before if _meet(address, where)), None)
            if other is not None:
                what = f"publishes {port} of the device, as {other} does: only one of them can start"
                findings.error(binding, what, "give it a port of its own")
            before.append((name, address))
    _data_folders([modules[name] for name in ours], findings)


def _meet(one: str, other: str) -> bool:
    return one == other or one in _ANY or other in _ANY


def _published(module: Module, findings: Findings) -> Iterator[tuple[Place, str, str]]:
    """The bindings of a module: their places, the addresses of the device, and ports as `8080/tcp`."""
    ports = module.options.at("HostConfig", "PortBindings") if module.options else None
    for inner, bindings in (ports.entries if ports else {}).items():
        protocol = inner.partition("/")[2] or "tcp"
        for binding in bindings.items:
            address, port = texts(binding, "HostIp", "HostPort")
            # Without a port Docker chooses one; of a range, too.
            if not port or "-" in port or has_placeholder(address) or has_placeholder(port):
                continue
            if not _is_address(address):
                findings.error(binding, "is published at no address", "write one, such as 127.0.0.1")
            elif not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
                findings.error(binding, "is published at no port", "write 1 to 65535")
            else:
                yield binding, address, f"{int(port)}/{protocol}"


def _is_address(text: str) -> bool:
    try:
        return not text or bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _data_folders(ours: Sequence[Module], findings: Findings) -> None:
    """Each module of ours keeps its spool and its models alone."""
    taken: dict[str, str] = {}
    for module in ours:
        for mount in mounts(module):
            if mount.target == DATA and mount.source:
                other = taken.setdefault(mount.source, module.name)
                if other != module.name:
                    what = f"is the data folder of {other} as well, and only one of them can have it"
                    findings.error(mount.place, what, f"write {module.name}-data:{DATA}")
