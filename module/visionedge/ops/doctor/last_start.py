"""What changed since the last good start: build, driver, libraries, machine, configuration.

A start is good when the engine has answered. `last-good-start.json` in the data folder keeps its facts, and
of the configuration a keyed hash per section, never a value. The log of a start and doctor compare with it.
"""

import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionedge.config.schema import Config
from visionedge.engine.device.devices import DeviceState
from visionedge.frames.types import format_utc, utc_now
from visionedge.ops.doctor.host import DXG, Host, HostEnvironment, detect_environment, read_memory
from visionedge.ops.doctor.wheel import read_wheel
from visionedge.runtime.build_identity import read_build_identity
from visionedge.runtime.files import DamagedStateFileError, read_json, write_json

log = logging.getLogger(__name__)

LAST_START_FILE_NAME = "last-good-start.json"

_SCHEMA = "visionedge/last-good-start/1"
_ABSENT = "absent"
_MAX_CHARACTERS = 200
_PRETTY_NAME = re.compile(r'^PRETTY_NAME="?([^"\n]*)', re.MULTILINE)
_CUDNN = re.compile(r"nvidia-cudnn-cu\d+")


def gather_start_facts(host: Host) -> dict[str, str]:
    """What a start depends on beside the configuration, by name; from files only, in some 0.1 s."""
    environment, wheel, memory = detect_environment(host), read_wheel(host), read_memory(host)
    system = _PRETTY_NAME.search(host.text("/etc/os-release"))
    cudnn = [version for name, version in sorted(host.packages.items()) if _CUDNN.fullmatch(name)]
    return {
        "visionedge": str(read_build_identity()),
        "base": system[1] if system else _ABSENT,
        "Python": host.system.rpartition(" ")[2],
        "onnxruntime": wheel.name,
        "CUDA": str(wheel.cuda) if wheel.cuda else _ABSENT,
        "cuDNN": ", ".join(cudnn) or _ABSENT,
        "driver": _driver(environment),
        "GPU devices": ", ".join((*environment.nodes, *([DXG] if host.exists(DXG) else []))) or _ABSENT,
        "kernel": environment.release or _ABSENT,
        "cores": str(host.cores),
        "CPU quota": _ABSENT if host.cpu_quota is None else f"{host.cpu_quota:.3g}",
        "memory limit": f"{memory.total_bytes >> 20} MiB" if memory.limited else _ABSENT,
    }


def _driver(environment: HostEnvironment) -> str:
    """The version of NVIDIA's kernel module; under GPU-PV the names of the folders of the Windows driver.

    That these names change with each driver was not seen on a machine with GPU-PV.
    """
    stores = sorted(name for name in environment.wsl_stores if name.lower().startswith("nv"))
    return environment.kernel_driver or ", ".join(stores) or _ABSENT


@dataclass(frozen=True, slots=True)
class LastGoodStart:
    """The last good start.

    Attributes:
        at: its time, UTC.
        device: the device that computed.
        facts: as of `gather_start_facts`.
        salt: the key of the hashes, random for each start.
        sections: hashes of the configuration in force, by section.
        local: hashes of the local configuration alone; None if arguments of the command line changed it.
    """

    at: str
    device: str
    facts: Mapping[str, str]
    salt: str
    sections: Mapping[str, str]
    local: Mapping[str, str] | None

    @staticmethod
    def read(path: Path) -> "LastGoodStart | None":
        """The one that is kept; None without a usable file."""
        try:
            return _parse(read_json(path))
        except (OSError, DamagedStateFileError):
            return None

    def document(self) -> dict[str, Any]:
        """As the file has it."""
        return {
            "schema": _SCHEMA,
            "at": self.at,
            "device": self.device,
            "facts": dict(self.facts),
            "salt": self.salt,
            "sections": dict(self.sections),
            "local": None if self.local is None else dict(self.local),
        }

    def describe_changes(
        self, facts: Mapping[str, str], config: Config | None, *, is_local: bool = False
    ) -> str:
        """What is different now, as one line; empty if nothing is.

        `config`: the configuration in force; with `is_local` the local one; None: it is not compared.
        """
        names = [*self.facts, *(name for name in facts if name not in self.facts)]
        pairs = [(name, self.facts.get(name, _ABSENT), facts.get(name, _ABSENT)) for name in names]
        changes = [f"{name} {before} → {now}" for name, before, now in pairs if before != now]
        kept = self.local if is_local else self.sections
        if config is not None and kept is not None:
            sections = hash_sections(config, self.salt)
            changed = [name for name in sections if kept.get(name) != sections[name]]
            changes += [f"configuration: {', '.join(changed)}"] if changed else []
        return "; ".join(changes)


def hash_sections(config: Config, salt: str) -> dict[str, str]:
    """A keyed hash of each section; defaults do not count, so a new setting changes no hash."""
    document = config.model_dump(by_alias=True, mode="json", exclude_defaults=True)
    every = config.model_dump(by_alias=True, mode="json")
    return {
        name: hmac.new(
            salt.encode(), json.dumps(document.get(name), sort_keys=True).encode(), hashlib.sha256
        ).hexdigest()[:16]
        for name in every
    }


def _parse(document: Any) -> LastGoodStart:
    if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
        raise DamagedStateFileError("its schema is unknown")
    at, device, salt = (document.get(key) for key in ("at", "device", "salt"))
    facts, sections, local = (document.get(key) for key in ("facts", "sections", "local"))
    texts = [at, device, salt]
    for mapping in (facts, sections, {} if local is None else local):
        if not isinstance(mapping, dict):
            raise DamagedStateFileError("it has another form")
        texts += [*mapping, *mapping.values()]
    if not all(
        isinstance(text, str) and len(text) <= _MAX_CHARACTERS and text.isprintable() for text in texts
    ):
        raise DamagedStateFileError("it has another form")
    return LastGoodStart(str(at), str(device), facts or {}, str(salt), sections or {}, local)


class StartHistory:
    """Compares this start with the last good one, and keeps it when it is good itself. The methods block."""

    def __init__(self, path: Path, local: Config | None) -> None:
        self._path = path
        self._local = local
        self._facts: Mapping[str, str] = {}
        self._last: LastGoodStart | None = None

    def __repr__(self) -> str:
        return f"<StartHistory {self._path}>"

    def log_changes(self, host: Host, config: Config) -> None:
        """Log what changed since the last good start, if there was one."""
        self._facts, self._last = gather_start_facts(host), LastGoodStart.read(self._path)
        if self._last is not None and (changes := self._last.describe_changes(self._facts, config)):
            log.info("changed since the last good start (%s): %s", self._last.at, changes)

    def keep(self, config: Config, device: DeviceState) -> None:
        """Keep this start as the last good one, unless the GPU of the last one is missing."""
        last = self._last
        if device.degraded and device.effective == "cpu" and last is not None and last.device != "cpu":
            return
        salt = secrets.token_hex(16)
        kept = LastGoodStart(
            at=format_utc(utc_now()),
            device=device.effective,
            facts=self._facts,
            salt=salt,
            sections=hash_sections(config, salt),
            local=None if self._local is None else hash_sections(self._local, salt),
        )
        try:
            write_json(self._path, kept.document())
        except OSError as error:
            log.debug("%s cannot be written: %s", self._path, error.strerror)
