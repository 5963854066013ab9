"""The support bundle: a zip with everything a colleague needs, and no secret.

What goes in is named one by one. Every text is masked as everywhere, and on top of that whatever the
configuration or the environment hold as a secret is searched for and taken out by its value.
"""

import json
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from visionedge import __version__
from visionedge.config.load import redact_config
from visionedge.config.schema import Config
from visionedge.errors import VisionedgeError
from visionedge.ops.doctor.host import Host
from visionedge.ops.doctor.report import DoctorReport
from visionedge.runtime.redaction import KnownSecrets, find_secrets, redact

_TIMEOUT_S = 3.0
_MAX_BYTES = 8 * 2**20
_MODULE_FILES = {
    "module/status.json": "/api/v1/status",
    "module/cameras.json": "/api/v1/cameras",
    "module/ready.json": "/readyz",
    "module/metrics.txt": "/metrics",
    "module/log.txt": "/api/v1/log",
}
# What tells how a container was started; none of these may hold a secret.
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
    """Write the zip; a line that says what is in it.

    Raises:
        VisionedgeError: it cannot be written.
    """
    scrub = SecretScrubber.of(config, host.environ)
    texts = {
        "doctor.txt": report.to_text(),
        "doctor.json": _format_json(report.document()),
        "config.json": _format_json(redact_config(config)),
        "versions.json": _format_json(
            {"visionedge": __version__, "system": host.system, "packages": dict(host.packages)}
        ),
        "environment.json": _format_json(_environment(host.environ)),
        **_module(config),
    }
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in texts.items():
                archive.writestr(name, scrub(text))
    except OSError as error:
        raise VisionedgeError(f"{path}: cannot be written: {error.strerror}") from None
    return f"{path} holds {', '.join(texts)}; look through it before you send it"


class SecretScrubber:
    """Takes known secrets out of texts, by their value and in every spelling, and what looks like one."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._known = KnownSecrets()
        self._known.add(secrets)

    @staticmethod
    def of(config: Config, environ: Mapping[str, str]) -> "SecretScrubber":
        """For the secrets of a configuration and an environment; the names of cameras stay readable."""
        document = config.model_dump(by_alias=True, mode="json", exclude_none=True)
        return SecretScrubber((find_secrets(document) | set(_secrets(environ))) - config.cameras.keys())

    def __call__(self, text: str) -> str:
        """A text of lines, or a JSON object, whose values are masked one by one: it may be one long line."""
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
        yield from find_secrets(value)  # the password of a proxy, for one
        if not _SECRET_VARIABLE.search(name):
            continue
        if len(value) >= _MIN_VARIABLE_CHARS:  # "true" or a number is none
            yield value
        # A connection string is a row of pairs, of which some are secret.
        for pair in value.split(";"):
            key, _, part = pair.partition("=")
            if _SECRET_VARIABLE.search(key):
                yield part


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sorted(environ.items()) if _SHOWN_VARIABLES.fullmatch(name)}


def _module(config: Config) -> dict[str, str]:
    """What the running module tells of itself, if one runs at the configured address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)  # noqa: S104 - read, not bound
    base = f"http://{f'[{host}]' if ':' in host else host}:{config.http.port}"
    headers = {"Authorization": f"Bearer {config.http.token}"} if config.http.token else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    texts: dict[str, str] = {}
    for name, page in _MODULE_FILES.items():
        request = urllib.request.Request(base + page, headers=headers)  # noqa: S310 - always http
        try:
            texts[name] = _body(opener, request)
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            return {**texts, "module/missing.txt": f"{base}{page}: {reason}\n"}
    return texts


def _body(opener: urllib.request.OpenerDirector, request: urllib.request.Request) -> str:
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            data = answer.read(_MAX_BYTES)
    except urllib.error.HTTPError as error:
        if error.code != 503:  # /readyz has its reasons in there
            raise
        data = error.read(_MAX_BYTES)
    return str(data.decode(errors="replace"))


def _format_json(document: object) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
