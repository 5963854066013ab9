"""The support bundle: a zip with the report, the configuration and the state of the module, without secrets.

Its content is listed file by file. Every text is redacted as usual; in addition, the values of all secrets in
the configuration and the environment are masked wherever they occur.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from visionedge.config.load import redact_config
from visionedge.config.schema import Config
from visionedge.errors import VisionedgeError
from visionedge.ops.doctor.host import Host
from visionedge.ops.doctor.report import DoctorReport
from visionedge.ops.module_client import fetch
from visionedge.runtime.build_identity import read_build_identity
from visionedge.runtime.redaction import KnownSecrets, find_secrets, redact

_TIMEOUT_S = 3.0
MODULE_FILES = {
    "module/status.json": "/api/v1/status",
    "module/cameras.json": "/api/v1/cameras",
    "module/ready.json": "/readyz",
    "module/metrics.txt": "/metrics",
    "module/log.txt": "/api/v1/log",
}
"""The files about the running module, and the HTTP addresses of their content."""

MAX_TEXT_CHARACTERS = 2_000_000
"""Of one of these files; the log has at most 500 lines of 2,000 characters, so few modules have more."""

# Variables that show how the container was started; none of them holds a secret.
_SHOWN_VARIABLES = re.compile(
    r"VISIONEDGE_(DATA|DEVICE|HTTP|LOG_LEVEL|MODEL|CONFIG)|IOTEDGE_(APIVERSION|DEVICEID|MODULEID|GATEWAYHOSTNAME|"
    r"IOTHUBHOSTNAME|AUTHSCHEME|WORKLOADURI)|NVIDIA_\w+|CUDA_VISIBLE_DEVICES|LD_LIBRARY_PATH|ORT_\w+|"
    r"RuntimeLogLevel|UpstreamProtocol|TZ|LANG"
)
_SECRET_VARIABLE = re.compile(
    r"(?i)token|password|passwd|secret|key|credential|connectionstring|sas|signature"
)
_MIN_VARIABLE_CHARS = 6


def write_bundle(path: Path, report: DoctorReport, config: Config, host: Host) -> str:
    """Write the zip, and return a line that lists its content.

    Raises:
        VisionedgeError: the zip cannot be written.
    """
    texts = _collect(report, config, host, _ask_module(config))
    try:
        path.write_bytes(_pack(texts))
    except OSError as error:
        raise VisionedgeError(f"{path}: cannot be written: {error.strerror}") from None
    return f"{path} contains {', '.join(texts)}; check it before you send it"


def pack_bundle(report: DoctorReport, config: Config, host: Host, module: Mapping[str, str]) -> bytes:
    """Return the zip of a module that makes it itself.

    `module`: the keys of `MODULE_FILES` and the texts of these addresses; `MAX_TEXT_CHARACTERS` of each are
    used.
    """
    cut = {name: text[-MAX_TEXT_CHARACTERS:] for name, text in module.items()}
    return _pack(_collect(report, config, host, cut))


def _collect(report: DoctorReport, config: Config, host: Host, module: Mapping[str, str]) -> dict[str, str]:
    """The texts of the bundle, by the name of the file, without secrets."""
    scrub = SecretScrubber.of(config, host.environ)
    texts = {
        "doctor.txt": report.to_text(),
        "doctor.json": _format_json(report.document()),
        "config.json": _format_json(redact_config(config)),
        "versions.json": _format_json(
            {
                "visionedge": read_build_identity().document(),
                "system": host.system,
                "packages": dict(host.packages),
            }
        ),
        "environment.json": _format_json(_environment(host.environ)),
        **module,
    }
    return {name: scrub(text) for name, text in texts.items()}


def _pack(texts: Mapping[str, str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(name, text)
    return data.getvalue()


class SecretScrubber:
    """Masks known secrets in texts, by value in every encoding, and all that looks like a secret."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._known = KnownSecrets()
        self._known.add(secrets)

    @staticmethod
    def of(config: Config, environ: Mapping[str, str]) -> "SecretScrubber":
        """A scrubber for the secrets of a configuration and an environment; names stay readable."""
        document = config.model_dump(by_alias=True, mode="json", exclude_none=True)
        names = config.cameras.keys() | config.models.keys()
        return SecretScrubber((find_secrets(document) | set(_secrets(environ))) - names)

    def __call__(self, text: str) -> str:
        """Mask a text line by line; of a JSON object each value, because it may be one long line."""
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if isinstance(document, dict):
            return _format_json(self._value(document))
        return "\n".join(self._line(line) for line in text.split("\n"))

    def _line(self, line: str) -> str:
        return self._known.mask(redact(line))

    def _value(self, value: Any) -> Any:
        match value:
            case str():
                return self._line(value)
            case dict():
                return {self._line(key): self._value(item) for key, item in value.items()}
            case list():
                return [self._value(item) for item in value]
        return value


def _secrets(environ: Mapping[str, str]) -> Iterator[str]:
    for name, value in environ.items():
        yield from find_secrets(value)  # such as the password of a proxy
        if not _SECRET_VARIABLE.search(name):
            continue
        if len(value) >= _MIN_VARIABLE_CHARS:  # shorter values, such as "true" or a number, are not secrets
            yield value
        # A connection string is a list of KEY=VALUE pairs, some of them secret.
        for pair in value.split(";"):
            key, _, part = pair.partition("=")
            if _SECRET_VARIABLE.search(key):
                yield part


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sorted(environ.items()) if _SHOWN_VARIABLES.fullmatch(name)}


def _ask_module(config: Config) -> dict[str, str]:
    """The state of the module that runs at the configured address, if any."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)  # noqa: S104 - read, not bound
    base = f"http://{f'[{host}]' if ':' in host else host}:{config.http.port}"
    texts: dict[str, str] = {}
    for name, path in MODULE_FILES.items():
        try:
            code, body = fetch(base, path, config.http.token, timeout_s=_TIMEOUT_S)
        except VisionedgeError as error:
            return {**texts, "module/missing.txt": f"{base}{path}: {error}\n"}
        # 503 is an answer of /readyz with reasons.
        texts[name] = body.decode(errors="replace") if code in (200, 503) else f"HTTP status {code}\n"
    return texts


def _format_json(document: object) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
