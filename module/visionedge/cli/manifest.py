"""`visionedge manifest`: deployment manifests, and their cost in IoT Hub."""

import argparse
import ipaddress
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visionedge.cli.arguments import (
    Subparsers,
    add_command,
    add_group,
    add_json,
    add_line_numbers,
    parse_cameras,
    positive_integer,
    positive_number,
    print_report,
    write_output_file,
)
from visionedge.cli.eflow import add_eflow_command
from visionedge.config.documents import read_document, without_extensions
from visionedge.config.load import parse_config, parse_http_address
from visionedge.errors import ConfigError
from visionedge.ops.support_dates import IOT_EDGE_TAG
from visionedge.runtime.files import read_regular_file
from visionedge.runtime.memory_requirement import CPU_MEMORY_MIB, GPU_MEMORY_MIB
from visionedge.runtime.redaction import redact

if TYPE_CHECKING:
    from visionedge.ops.manifest.generate import ManifestRequest


_NO_MESSAGES_GIVEN = (
    "the cost is counted from real messages: record an hour of usual traffic with 'visionedge run --config"
    " vision.yaml --messages FILE --duration 3600' and give --messages FILE, or --url of a running module"
)


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `manifest`."""
    commands = add_group(
        subparsers,
        "manifest",
        "make and check deployment manifests of IoT Edge, and estimate their cost",
        "  visionedge manifest generate --image registry.example.com/visionedge:1.0-gpu --gpu dda\n"
        "  visionedge manifest lint deployment.json           every problem, with its place and its remedy\n"
        "  visionedge manifest estimate --messages out.jsonl  messages, 4 KB blocks, IoT Hub units a day\n"
        "  visionedge manifest eflow --edition pro …          a file that installs EFLOW on Windows",
    )
    _add_generate(commands)
    _add_lint(commands)
    _add_estimate(commands)
    add_eflow_command(commands)


def _add_generate(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "generate",
        _generate,
        "make a deployment manifest; placeholders (${NAME}, $NAME) are filled from the environment",
        "  visionedge manifest generate --image registry.example.com/visionedge:1.0-gpu --gpu dda \\\n"
        "      --camera dock=rtsp://192.0.2.5/stream1 -o deployment.json\n"
        "  visionedge manifest generate --image registry.example.com/visionedge:1.0-cpu \\\n"
        "      --config vision.yaml --camera 'yard=rtsp://${YARD_USER}:${YARD_PASSWORD}@192.0.2.6/' \\\n"
        "      --registry mine=registry.example.com\n"
        "  visionedge manifest generate --image registry.example.com/visionedge:1.0-cpu \\\n"
        "      --bind /var/lib/models:/models:ro --config vision.yaml   model: {path: /models/best.onnx}\n"
        "  visionedge manifest generate --image registry.example.com/visionedge:1.0-cpu \\\n"
        "      --digest sha256:0f3a…    exactly this image, whatever the tag becomes\n"
        "  visionedge manifest generate --image registry.example.com/visionedge:1.0-cpu \\\n"
        "      --env HTTPS_PROXY --env TZ=Europe/Berlin --dns 192.0.2.53 --memory 1g --cpus 1.5 --pids 256\n"
        "  visionedge manifest generate --image registry.example.com/visionedge:1.0-cpu \\\n"
        "      --device openvino-gpu    an Intel GPU in EFLOW; on Linux also --gpu dri --render-group 992\n"
        "  visionedge manifest generate --layered --image registry.example.com/visionedge:1.0-cpu\n"
        "  visionedge manifest generate --template --gpu gpu-pv \\\n"
        "      --registry 'visionedge=$CONTAINER_REGISTRY_ADDRESS'   as deployment.template.json is",
    )
    _add_module_options(parser)
    _add_limits(parser)
    _add_configuration_options(parser)
    forms = parser.add_argument_group("the manifest")
    either = forms.add_mutually_exclusive_group()
    either.add_argument(
        "--template",
        action="store_true",
        help="a template for the tools of IoT Edge; placeholders stay as they are",
    )
    either.add_argument(
        "--layered",
        action="store_true",
        help="a layered deployment: this module alone, over a base deployment",
    )
    forms.add_argument("-o", "--output", metavar="FILE", help="write to this file instead of stdout")
    forms.add_argument("--force", action="store_true", help="replace an existing file")


def _add_module_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the module")
    group.add_argument(
        "--image", metavar="NAME", default="", help="the module's image; required except with --template"
    )
    group.add_argument(
        "--digest",
        metavar="sha256:…",
        help="the digest of --image: the device runs exactly this image; 'docker push' prints it",
    )
    group.add_argument(
        "--gpu",
        choices=("none", "dda", "gpu-pv", "gpu-pv-by-hand", "dri"),
        help="how the host passes a GPU through: dda and gpu-pv by its NVIDIA runtime (a gpu-pv manifest "
        "also fits dda); gpu-pv-by-hand: /dev/dxg and /usr/lib/wsl, no runtime; dri: /dev/dri, for an "
        "Intel GPU on Linux (default: none; with --device openvino-gpu: gpu-pv-by-hand)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cuda", "openvino-gpu", "cpu"),
        default="",
        help="inference.device of the module (default: that of --config, else auto, without a GPU cpu)",
    )
    group.add_argument(
        "--render-group",
        metavar="GID",
        default="",
        help="for --gpu dri: the number of the group that owns /dev/dri/renderD*, as `stat -c %%g` prints it",
    )
    group.add_argument(
        "--registry",
        action="append",
        default=[],
        metavar="NAME=ADDRESS",
        help="repeatable; user and password are $CONTAINER_REGISTRY_USERNAME and _PASSWORD; with several "
        "registries _NAME is appended to both",
    )
    group.add_argument(
        "--bind",
        action="append",
        default=[],
        metavar="HOST:CONTAINER[:ro]",
        help="repeatable: a folder or file of the host to mount into the module, as absolute paths",
    )
    group.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="repeatable: a variable of the module, such as HTTPS_PROXY or TZ; without a value that of the "
        "environment (with --template: ${NAME}), so that a secret is in no shell history",
    )
    group.add_argument(
        "--dns",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="repeatable: a DNS server for the container, if that of EFLOW resolves no names",
    )
    group.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="repeatable: a label of the container",
    )
    group.add_argument(
        "--module-id",
        default="vision",
        metavar="ID",
        help="the module's name in IoT Edge (default: %(default)s)",
    )
    group.add_argument(
        "--runtime",
        default=IOT_EDGE_TAG,
        metavar="TAG",
        help="the version of edgeAgent and edgeHub (default: %(default)s)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory of the container: bytes, or with k, m or g, or 'none' (default: "
        f"{CPU_MEMORY_MIB}m, with a GPU {GPU_MEMORY_MIB}m): a leak then ends the module and not edgeHub",
    )
    group.add_argument(
        "--cpus", type=positive_number, metavar="N", help="cores, such as 1.5 (default: no limit)"
    )
    group.add_argument(
        "--pids",
        type=positive_integer,
        metavar="N",
        help="processes and threads together, 64 and some per camera at least (default: no limit)",
    )


def _add_configuration_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="the desired properties, YAML or JSON (default: the bundled clip as the only camera)",
    )
    group.add_argument(
        "--camera",
        action="append",
        default=[],
        metavar="[NAME=]URI",
        help="a camera, repeatable; added to those of --config",
    )
    group.add_argument(
        "--http",
        default="127.0.0.1:8080",
        metavar="HOST:PORT",
        help="the address on the device where HTTP is published (default: %(default)s); beyond 127.0.0.1 "
        "the token is http.token of the configuration, else VISIONEDGE_HTTP_TOKEN, else one that the module "
        "makes",
    )
    group.add_argument("--no-http", action="store_true", help="publish no HTTP port on the device")


def _add_lint(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "lint",
        _lint,
        "check a deployment manifest: every problem, with its place and its remedy",
        "  visionedge manifest lint deployment.template.json\n"
        "  visionedge manifest lint deployment.json --module dock-camera --json\n"
        "  visionedge manifest generate --image … | visionedge manifest lint -",
        notes="exit code 2 also means that the manifest has an error; warnings alone end with 0",
    )
    parser.add_argument(
        "file", metavar="FILE", help="a manifest, a layered one, or a template (.template.json); - for stdin"
    )
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="repeatable: which modules are visionedge (default: 'vision', and images called visionedge)",
    )
    add_json(parser)


def _generate(arguments: argparse.Namespace) -> int:
    from visionedge.ops.manifest.generate import generate_manifest

    with add_line_numbers(Path(arguments.config) if arguments.config else None, os.environ):
        made = generate_manifest(_build_request(arguments), os.environ)
    for note in made.notes:
        print(f"visionedge: {redact(note)}", file=sys.stderr)
    if arguments.output:
        write_output_file(Path(arguments.output), made.text, replace=arguments.force, secret=made.secret)
    else:
        sys.stdout.write(made.text)
    return 0


def _build_request(arguments: argparse.Namespace) -> "ManifestRequest":
    """The request in the arguments.

    Raises:
        ConfigError: some arguments are wrong, or cannot be combined.
    """
    from visionedge.ops.manifest.generate import Gpu, ManifestRequest, check_binds

    gpu: Gpu = arguments.gpu or ("gpu-pv-by-hand" if arguments.device == "openvino-gpu" else "none")
    problems = [*check_binds(arguments.bind, gpu), *_check_gpu(gpu, arguments.device, arguments.render_group)]
    if not arguments.image and not arguments.template:
        problems.append("--image: name the module's image, such as registry.example.com/visionedge:1.0-gpu")
    if arguments.registry and arguments.layered:
        problems.append(
            "--registry: cannot be combined with --layered; the base deployment holds the credentials"
        )
    if arguments.digest and (not arguments.image or "@" in arguments.image):
        problems.append("--digest: belongs to an --image without one")
    elif arguments.digest and not re.fullmatch(r"sha256:[0-9a-f]{64}", arguments.digest):
        problems.append("--digest: write sha256: and 64 digits of 0-9 and a-f")
    problems += [
        f"--dns {redact(each)}: is not an IP address" for each in arguments.dns if not _is_address(each)
    ]
    if problems:
        raise ConfigError(problems)
    document = without_extensions(read_document(Path(arguments.config))) if arguments.config else None
    configured = document.get("cameras") if document else None
    address = None if arguments.no_http else parse_http_address(arguments.http, "--http")
    return ManifestRequest(
        image=f"{arguments.image}@{arguments.digest}" if arguments.digest else arguments.image,
        gpu=gpu,
        device=arguments.device or ("openvino-gpu" if gpu == "dri" else ""),
        render_group=arguments.render_group,
        document=document,
        cameras=parse_cameras(arguments.camera, configured if isinstance(configured, dict) else ()),
        registries=_parse_registries(arguments.registry),
        module=arguments.module_id,
        published=(address.get("host") or "127.0.0.1", address["port"]) if address else None,
        runtime=arguments.runtime,
        binds=tuple(arguments.bind),
        memory_bytes=_parse_memory(arguments.memory),
        cpus=arguments.cpus,
        pids=arguments.pids,
        env=_parse_variables(arguments.env),
        dns=tuple(arguments.dns),
        labels=_parse_labels(arguments.label),
        form="template" if arguments.template else "layered" if arguments.layered else "deployment",
    )


def _check_gpu(gpu: str, device: str, group: str) -> list[str]:
    """The problems of the options that belong to a GPU."""
    problems = []
    if device == "openvino-gpu" and gpu not in ("gpu-pv-by-hand", "dri"):
        problems.append(f"--gpu {gpu}: openvino-gpu needs gpu-pv-by-hand (EFLOW, WSL) or dri (Linux)")
    if gpu == "dri" and device not in ("", "openvino-gpu"):
        problems.append(f"--gpu dri: is for --device openvino-gpu, not for {device}")
    if gpu == "dri" and not re.fullmatch(r"[0-9]{1,10}", group):
        problems.append(
            "--render-group: name the number of the group that owns /dev/dri/renderD* on the host:"
            " stat -c %g /dev/dri/renderD128"
        )
    elif group and gpu != "dri":
        problems.append("--render-group: belongs to --gpu dri")
    return problems


def _parse_registries(pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, address = pair.partition("=")
        if not re.fullmatch(r"\w+", name, re.ASCII) or not address:
            hint = "write NAME=ADDRESS, with a NAME of letters, digits and '_'"
            raise ConfigError([f"--registry {redact(pair)}: {hint}"])
        if name in found:
            raise ConfigError([f"--registry {name}: the name is given twice"])
        found[name] = address
    return found


_MEMORY_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def _parse_memory(text: str | None) -> int | None:
    """A size in bytes; 0 for none, None if it is not given."""
    if text is None:
        return None
    if text.lower() == "none":
        return 0
    found = re.fullmatch(r"([0-9]{1,15})([bkmg]?)(?:i?b)?", text.lower())
    size_bytes = int(found[1]) * _MEMORY_UNITS[found[2]] if found else 0
    if not 0 < size_bytes < 2**50:
        raise ConfigError([f"--memory {redact(text)[:40]}: write a size such as 768m or 2g, or none"])
    return size_bytes


def _parse_variables(pairs: Sequence[str]) -> dict[str, str]:
    """Variables by name. A value is never shown: it may be a secret."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(["--env: write NAME=VALUE or NAME, with a NAME of letters, digits and '_'"])
        if not value.isprintable():
            raise ConfigError([f"--env {name}: the value has control characters"])
        if name in found:
            raise ConfigError([f"--env {name}: the name is given twice"])
        found[name] = value if equals else f"${{{name}}}"
    return found


def _parse_labels(pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", name) or not value.isprintable():
            hint = "write NAME=VALUE, with a NAME of letters, digits, '.', '-', '_' and '/'"
            raise ConfigError([f"--label {redact(pair)!a}: {hint}"])
        if name in found:
            raise ConfigError([f"--label {name}: the name is given twice"])
        found[name] = value
    return found


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _lint(arguments: argparse.Namespace) -> int:
    from visionedge.ops.manifest.lint import UnreadableManifestError, lint_manifest, report_unreadable

    name = "stdin" if arguments.file == "-" else arguments.file
    folder = None if arguments.file == "-" else Path(arguments.file).parent
    try:
        report = lint_manifest(_read_manifest(arguments.file, name), name, arguments.module, folder=folder)
    except UnreadableManifestError as error:
        if not arguments.json:
            raise
        report = report_unreadable(name, error)
    print_report(arguments, report.document(), report.to_text())
    return ConfigError.exit_code if report.errors else 0


def _read_manifest(file: str, name: str) -> bytes:
    """The content of a file or of stdin, up to one byte more than a manifest may have."""
    from visionedge.ops.manifest.lint import MAX_MANIFEST_BYTES, UnreadableManifestError

    try:
        if file == "-":
            return sys.stdin.buffer.read(MAX_MANIFEST_BYTES + 1)
        return read_regular_file(Path(file), max_bytes=MAX_MANIFEST_BYTES)
    except OSError as error:
        raise UnreadableManifestError(name, f"cannot be read: {error.strerror}") from None


def _add_estimate(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "estimate",
        _estimate,
        "estimate the cost of a day in IoT Hub: messages, 4 KB blocks and units, from real messages",
        "  visionedge run --config vision.yaml --messages out.jsonl --duration 3600\n"
        "  visionedge manifest estimate --messages out.jsonl --config vision.yaml\n"
        "  visionedge manifest estimate --url http://127.0.0.1:8080 --json      of a running module",
    )
    parser.add_argument(
        "--messages", metavar="FILE", help="messages that 'visionedge run --messages FILE' has written"
    )
    parser.add_argument("--url", metavar="URL", help="a running module, such as http://127.0.0.1:8080")
    parser.add_argument(
        "--token",
        default=os.environ.get("VISIONEDGE_HTTP_TOKEN"),
        help="HTTP token of the module at --url (default: VISIONEDGE_HTTP_TOKEN)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the configuration with telemetry.maxPerDay, the limit of a day (default: VISIONEDGE_CONFIG)",
    )
    add_json(parser)


def _estimate(arguments: argparse.Namespace) -> int:
    from visionedge.ops.manifest.estimate import (
        Estimate,
        measure_messages_file,
        measure_running_module,
        to_text,
    )

    path = arguments.config or os.environ.get("VISIONEDGE_CONFIG")
    policy = parse_config(read_document(Path(path)) if path else {}).telemetry
    if arguments.messages and arguments.url:
        raise ConfigError(["give --messages FILE or --url URL, not both"])
    if arguments.messages:
        measured = measure_messages_file(Path(arguments.messages))
    elif arguments.url:
        measured = measure_running_module(arguments.url, arguments.token)
    else:
        raise ConfigError([_NO_MESSAGES_GIVEN])
    made = Estimate(measured, policy.max_per_day)
    print_report(arguments, made.document(), to_text(made))
    return 0
