"""The command line: commands, arguments and exit codes.

Exit codes: 0 success, 1 the work failed, 2 wrong arguments or configuration, 3 the machine cannot do what was
demanded. Results go to stdout, everything else to stderr. An error is one line without a traceback.
"""

import argparse
import errno
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from visionedge.cli import bench, completion, config, detect, doctor, manifest, model, run, scene, token
from visionedge.cli.arguments import LOG_LEVELS, Parser, describe_exit_codes
from visionedge.errors import ConfigError, VisionedgeError
from visionedge.runtime import logs
from visionedge.runtime.build_identity import read_build_identity
from visionedge.runtime.child_process import forbid_core_dumps
from visionedge.runtime.redaction import find_secrets, redact, register_secrets

MAX_PROBLEM_LINES = 20
"""At most so many problems are printed, and the number of the others."""


_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Why an output cannot be written though it could be opened."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    _open_closed_streams()
    forbid_core_dumps(os.environ)
    words = sys.argv[1:] if arguments is None else arguments
    register_secrets([*find_secrets(list(words)), *find_secrets(_secret_variables(os.environ))])
    parsed = build_parser().parse_command(words)
    level = parsed.log_level or os.environ.get("VISIONEDGE_LOG_LEVEL", "info").lower()
    if level not in LOG_LEVELS:
        problem = f"VISIONEDGE_LOG_LEVEL: '{level}' is not one of {', '.join(LOG_LEVELS)}"
        return _fail(ConfigError.exit_code, [problem])
    logs.configure_logging(level)
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except ConfigError as error:
        return _fail(error.exit_code, error.problems)
    except VisionedgeError as error:
        return _fail(error.exit_code, [str(error)])
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _stop_writing(error)
    return code


def _open_closed_streams() -> None:
    """Open the null device for streams that the caller has closed (`>&-`).

    Otherwise the next file that is opened gets the number 1 or 2, and what libraries print is written to it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - open until the end
            setattr(sys, name, stream)


def _stop_writing(error: OSError) -> int:
    """The exit code if stdout cannot be written; any other error is raised again."""
    if not isinstance(error, BrokenPipeError) and error.errno not in _NO_SPACE:
        raise error
    # What stdout still holds would fail again at the end of Python.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # the reader has closed it (`| head`): stop without a message
        return 1
    return _fail(1, [f"{error.filename or 'an output'} cannot be written: {error.strerror}"])


def _secret_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that may hold secrets, those with the addresses of proxies included."""
    ours = ("VISIONEDGE_", "IOTEDGE_", "EdgeHub")
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(ours) or name.lower().endswith("_proxy")
    }


class _ShowVersion(argparse.Action):
    """Prints the build identity, which is read only on request."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"visionedge {read_build_identity()}")
        parser.exit()


def _fail(code: int, lines: Sequence[str]) -> int:
    more = len(lines) - MAX_PROBLEM_LINES
    for line in lines[:MAX_PROBLEM_LINES]:
        print(f"visionedge: {redact(line)}", file=sys.stderr)
    if more > 0:
        print(f"visionedge: and {more} more problems", file=sys.stderr)
    return code


def build_parser() -> Parser:
    """The parser of the whole command line."""
    root_parser = Parser(
        prog="visionedge",
        description="ONNX object detection on camera frames, as an Azure IoT Edge module or on its own.",
        epilog=(
            "visionedge COMMAND --help shows the options of a command, with "
            f"examples.\n\n{describe_exit_codes()}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root_parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    subparsers = root_parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )
    run.add_parser(subparsers)
    detect.add_parser(subparsers)
    scene.add_parser(subparsers)
    model.add_parser(subparsers)
    bench.add_parser(subparsers)
    doctor.add_parser(subparsers)
    manifest.add_parser(subparsers)
    config.add_parser(subparsers)
    token.add_parser(subparsers)
    completion.add_parser(subparsers, build_parser)
    return root_parser


if __name__ == "__main__":
    sys.exit(main())
