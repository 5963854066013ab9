"""`visionedge doctor`: is there a usable GPU, and if not, what is broken and what is the remedy?"""

import argparse
import os
import sys
from pathlib import Path

from visionedge.cli.arguments import (
    Subparsers,
    add_command,
    add_json,
    add_line_numbers,
    add_model_and_device,
    build_document,
    configuration_file,
    data_folder,
    print_report,
    supports_colours,
)
from visionedge.cli.run import build_run_document
from visionedge.cli.token import read_http_in_force
from visionedge.config.load import parse_config
from visionedge.config.made_token import MadeToken
from visionedge.config.schema import Config, HttpConfig
from visionedge.errors import ConfigError, UnavailableError
from visionedge.iothub.identity import Identity


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `doctor`."""
    parser = add_command(
        subparsers,
        "doctor",
        _doctor,
        "what this machine offers, what is used, the first broken link to the GPU and its remedy",
        "  visionedge doctor                                     is there a GPU, and if it is not used, why\n"
        "  visionedge doctor --device cuda || echo 'no GPU'      exit code 3 where the GPU cannot be used\n"
        "  visionedge doctor --config vision.yaml --json         with cameras, for programs\n"
        "  visionedge doctor --bundle doctor.zip                 a report for support, without secrets\n"
        '  visionedge doctor --plan --windows-build 19044.1620 --edition pro --gpu "NVIDIA A2"',
        codes=(0, 2, 3),
        notes="Marks have colours on a terminal, unless NO_COLOR is set.",
    )
    add_model_and_device(parser)
    parser.add_argument(
        "--config", metavar="FILE", help="the configuration, YAML or JSON (default: VISIONEDGE_CONFIG)"
    )
    add_json(parser)
    parser.add_argument(
        "--bundle",
        metavar="FILE",
        help="also write a zip file: this report, the configuration, the state of the running module",
    )
    parser.add_argument("--http", metavar="HOST:PORT", help="the address of the running module, for --bundle")
    plan = parser.add_argument_group("a plan for EFLOW (on any machine)")
    plan.add_argument(
        "--plan",
        action="store_true",
        help="print which passthrough a Windows supports, and all lines to type",
    )
    plan.add_argument(
        "--windows-build",
        metavar="N",
        help="the build that winver shows: 19045 or 19044.1620; not needed for server-2019 and server-2022",
    )
    plan.add_argument(
        "--edition",
        metavar="NAME",
        help="the edition: pro, enterprise, iot-enterprise, server-2019, server-2022 or home",
    )
    plan.add_argument("--gpu", metavar="NAME", help='the name of the GPU in Windows, such as "NVIDIA A2"')


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.plan:
        return _plan(arguments)
    from visionedge.ops.doctor.bundle import write_bundle
    from visionedge.ops.doctor.facts import DoctorRequest
    from visionedge.ops.doctor.host import this_host
    from visionedge.ops.doctor.report import examine

    document = build_document(arguments, os.environ)
    with add_line_numbers(configuration_file(arguments, os.environ), os.environ):
        checked = parse_config(document)
    host = this_host(os.environ)
    data, local = data_folder(os.environ), _read_local_config(arguments)
    report = examine(DoctorRequest(checked.inference.device, checked, data, local=local), host)
    print_report(
        arguments, report.document(), report.to_text(colours=supports_colours(sys.stdout, os.environ))
    )
    if arguments.bundle:
        http = _find_running_http(arguments, checked.http, data)
        written = write_bundle(
            Path(arguments.bundle), report, checked.model_copy(update={"http": http}), host
        )
        print(written, file=sys.stderr)
    return 0 if report.fulfilled else UnavailableError.exit_code


def _find_running_http(arguments: argparse.Namespace, configured: HttpConfig, data: Path) -> HttpConfig:
    """Where the running module listens, and its token: also one that it made, or that came from the twin."""
    try:
        in_force = read_http_in_force(configuration_file(arguments, os.environ), data, os.environ)
    except ConfigError:  # a container of IoT Edge without its whole identity
        return MadeToken(data).lay_under(configured, make=False)
    token = configured.token or in_force.token
    return (configured if arguments.http else in_force).model_copy(update={"token": token})


def _read_local_config(arguments: argparse.Namespace) -> Config | None:
    """What `run` would start with; None if this is a container of IoT Edge without its whole identity."""
    try:
        inside = Identity.from_environ(os.environ) is not None
    except ConfigError:
        return None
    return parse_config(build_run_document(arguments, os.environ, inside_iot_edge=inside))


def _plan(arguments: argparse.Namespace) -> int:
    from visionedge.ops.doctor.eflow_plan import make_eflow_plan

    plan = make_eflow_plan(arguments.windows_build, arguments.edition, arguments.gpu)
    print_report(arguments, plan.dump(), plan.to_text())
    return 0 if plan.supported else UnavailableError.exit_code
