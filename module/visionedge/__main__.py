"""The command line: verbs, arguments and exit codes.

0 fine · 1 the work failed · 2 bad arguments or configuration · 3 the machine cannot do what was demanded.
Results go to stdout, everything else to stderr. Errors for people are one line and no traceback.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from visionedge import __version__, config, logs
from visionedge.errors import ConfigError, VisionedgeError
from visionedge.uris import FORMS, redact

EXIT_CODES = (
    "exit codes: 0 fine, 1 the work failed, 2 bad arguments, 3 this machine cannot do what was demanded"
)

DEVICES = ("auto", "cuda", "tensorrt", "cpu")


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {redact(message)}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code."""
    parsed = _parser().parse_args(arguments)
    logs.set_up(parsed.log_level)
    try:
        code: int = parsed.run(parsed)
    except ConfigError as error:
        return _fail(error.exit_code, error.problems)
    except VisionedgeError as error:
        return _fail(error.exit_code, [str(error)])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout has left (`| head`): nothing more to say, and nothing to complain of.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _fail(code: int, lines: Sequence[str]) -> int:
    for line in lines:
        print(f"visionedge: {redact(line)}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="visionedge",
        description="ONNX object detection on camera frames, as an Azure IoT Edge module or on its own.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"visionedge {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=_Parser)
    _add_run(verbs)
    _add_detect(verbs)
    _add_bench(verbs)
    return parser


Verbs = Any
"""argparse's subparsers action; its class has no public name."""


def _verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], help_line: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help_line,
        description=help_line,
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=os.environ.get("VISIONEDGE_LOG_LEVEL", "info"),
        help="how much is told on stderr (default: %(default)s, or VISIONEDGE_LOG_LEVEL)",
    )
    return parser


def _add_model_and_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH", help="an ONNX file (default: the bundled NanoDet, COCO-80)"
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="auto = CUDA where it works, else the CPU (default: auto)",
    )


# --- run ----------------------------------------------------------------------------------------------------


def _add_run(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "run",
        _run,
        "the module: analyse cameras, answer over HTTP, send what was seen to IoT Hub",
        "  visionedge run                                        the bundled clip, on http://127.0.0.1:8080/\n"
        "  visionedge run --camera dock=rtsp://192.0.2.5/stream1 --camera yard=yard.mp4\n"
        "  visionedge run --config vision.yaml --http 0.0.0.0:8080\n"
        "  visionedge run --messages out.jsonl --duration 60     see what IoT Hub would get",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON; also VISIONEDGE_CONFIG")
    parser.add_argument(
        "--camera",
        action="append",
        default=[],
        metavar="NAME=URI",
        help=f"repeatable; {FORMS.replace('%', '%%')}",
    )
    _add_model_and_device(parser)
    parser.add_argument("--http", metavar="HOST:PORT", help="where to listen (default: 127.0.0.1:8080)")
    parser.add_argument(
        "--messages", metavar="FILE", help="also append every outgoing message to this JSON Lines file"
    )
    parser.add_argument("--duration", type=_seconds, metavar="SECONDS", help="stop by itself after this long")


def _run(arguments: argparse.Namespace) -> int:
    from visionedge.edge.identity import Identity
    from visionedge.service import Options, run

    inside = Identity.from_environ(os.environ) is not None
    document = run_document(arguments, os.environ, inside_iot_edge=inside)
    return run(
        Options(
            config=config.validate(document),
            data=data_folder(os.environ),
            messages=Path(arguments.messages) if arguments.messages else None,
            duration_s=arguments.duration,
        )
    )


def run_document(
    arguments: argparse.Namespace, environ: Mapping[str, str], *, inside_iot_edge: bool
) -> config.Document:
    """The configuration document of `run`: the file, the environment over it, the arguments over both."""
    path = arguments.config or environ.get("VISIONEDGE_CONFIG")
    document = config.read_file(Path(path)) if path else {}
    document = config.merge(document, config.from_environment(environ))
    document = config.merge(document, _overrides(arguments))
    if not document.get("cameras") and not path and not inside_iot_edge:
        # Somebody who just wants to see it run gets something to look at.
        document["cameras"] = {"demo": {"uri": "demo:"}}
    return document


def _overrides(arguments: argparse.Namespace) -> config.Document:
    over: config.Document = {}
    if arguments.camera:
        over["cameras"] = _cameras(arguments.camera)
    if arguments.model:
        over["model"] = {"path": arguments.model, "url": None, "sha256": None}
    if arguments.device:
        over["inference"] = {"device": arguments.device}
    if arguments.http:
        over["http"] = config.http_address(arguments.http, "--http")
    return over


def _cameras(pairs: Sequence[str]) -> config.Document:
    cameras: config.Document = {}
    problems = []
    for pair in pairs:
        name, equals, uri = pair.partition("=")
        if not equals or not config.CAMERA_NAME.fullmatch(name):
            problems.append(f"--camera {redact(pair)}: write NAME=URI, with a NAME of a-z, 0-9 and '-'")
        elif name in cameras:
            problems.append(f"--camera {name}: the name is given twice")
        cameras[name] = {"uri": uri}
    if problems:
        raise ConfigError(problems)
    return cameras


def data_folder(environ: Mapping[str, str]) -> Path:
    """Where state lives: VISIONEDGE_DATA, else the user's data folder."""
    if folder := environ.get("VISIONEDGE_DATA"):
        return Path(folder)
    base = environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "visionedge"


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no time above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not from 0 to 1")
    return value


# --- detect -------------------------------------------------------------------------------------------------


def _add_detect(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "detect",
        _detect,
        "find objects in pictures, folders of pictures, and videos",
        "  visionedge detect photo.jpg\n"
        "  visionedge detect photos/ clip.mp4 --annotate out/     look at the boxes\n"
        "  visionedge detect photos/ --json --confidence 0.25 | jq '.detections[].label'",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a picture, a folder of pictures, or a video"
    )
    parser.add_argument("--json", action="store_true", help="one frame object a line instead of words")
    parser.add_argument("--annotate", metavar="DIR", help="write the pictures with their boxes there")
    _add_model_and_device(parser)
    parser.add_argument("--confidence", type=_share, metavar="X", help="the least score told (default: 0.3)")


def _detect(arguments: argparse.Namespace) -> int:
    from visionedge.detect import Request, detect

    inference: config.Document = {}
    if arguments.device:
        inference["device"] = arguments.device
    if arguments.confidence is not None:
        inference["confidence"] = arguments.confidence
    document = config.merge(config.from_environment(os.environ), {"inference": inference})
    checked = config.validate(document)
    model = arguments.model or checked.model.path
    return detect(
        Request(
            paths=tuple(Path(path) for path in arguments.paths),
            model=Path(model) if model else None,
            inference=checked.inference,
            as_json=arguments.json,
            annotate=Path(arguments.annotate) if arguments.annotate else None,
        )
    )


# --- bench --------------------------------------------------------------------------------------------------


def _add_bench(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "bench",
        lambda _: 2,
        "the load script: how fast, at what cost, and against what",
        "  visionedge bench pipeline --cameras 4 --source yard.mp4 --baseline\n"
        "  visionedge bench pipeline --fps 5 --cameras 16 --json report.json",
    )
    loads = parser.add_subparsers(title="loads", metavar="LOAD", required=True, parser_class=_Parser)
    pipeline = _verb(
        loads,
        "pipeline",
        _bench_pipeline,
        "cameras from a file through the whole pipeline: frames/s, latency, CPU per frame, drops",
        "  visionedge bench pipeline --cameras 4 --source yard.mp4 --baseline --json report.json",
    )
    pipeline.add_argument("--cameras", type=_count, default=4, metavar="N", help="(default: %(default)s)")
    pipeline.add_argument(
        "--source",
        default="demo:",
        metavar="URI",
        help="what each camera plays, again and again (default: the clip)",
    )
    pipeline.add_argument(
        "--fps", type=_seconds, metavar="F", help="frames per second of each camera (default: flat out)"
    )
    pipeline.add_argument(
        "--seconds", type=_seconds, default=8.0, metavar="S", help="of each round (default: %(default)s)"
    )
    pipeline.add_argument("--rounds", type=_count, default=3, metavar="R", help="(default: %(default)s)")
    pipeline.add_argument(
        "--baseline", action="store_true", help="also the plain OpenCV + onnxruntime loop, in the same run"
    )
    pipeline.add_argument("--json", metavar="FILE", help="write the report there; - is stdout")
    _add_model_and_device(pipeline)


def _bench_pipeline(arguments: argparse.Namespace) -> int:
    from visionedge.inference.model import bundled_model_path
    from visionedge.ops import bench_pipeline as bench

    inference = {"device": arguments.device} if arguments.device else {}
    report = bench.bench_pipeline(
        bench.Load(
            model=Path(arguments.model) if arguments.model else bundled_model_path(),
            source=arguments.source,
            cameras=arguments.cameras,
            fps=arguments.fps,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            baseline=arguments.baseline,
            inference=config.validate({"inference": inference}).inference,
        ),
        lambda line: print(line, file=sys.stderr),
    )
    if arguments.json != "-":
        sys.stdout.write(bench.words(report))
    if arguments.json:
        bench.write_json(report, Path(arguments.json))
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
