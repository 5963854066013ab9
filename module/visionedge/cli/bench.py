"""`visionedge bench`: the load script."""

import argparse
import sys
from pathlib import Path

from visionedge import config
from visionedge.cli.arguments import Parser, Verbs, add_model_and_device, count, seconds, verb


def add_parser(verbs: Verbs) -> None:
    """Add the verb `bench`."""
    parser = verb(
        verbs,
        "bench",
        lambda _: 2,
        "the load script: how fast, at what cost, and against what",
        "  visionedge bench pipeline --cameras 4 --source yard.mp4 --baseline\n"
        "  visionedge bench pipeline --fps 5 --cameras 16 --json report.json",
    )
    loads = parser.add_subparsers(title="loads", metavar="LOAD", required=True, parser_class=Parser)
    pipeline = verb(
        loads,
        "pipeline",
        _bench_pipeline,
        "cameras from a file through the whole pipeline: frames/s, latency, CPU per frame, drops",
        "  visionedge bench pipeline --cameras 4 --source yard.mp4 --baseline --json report.json",
    )
    pipeline.add_argument("--cameras", type=count, default=4, metavar="N", help="(default: %(default)s)")
    pipeline.add_argument(
        "--source",
        default="demo:",
        metavar="URI",
        help="what each camera plays, again and again (default: the clip)",
    )
    pipeline.add_argument(
        "--fps", type=seconds, metavar="F", help="frames per second of each camera (default: flat out)"
    )
    pipeline.add_argument(
        "--seconds", type=seconds, default=8.0, metavar="S", help="of each round (default: %(default)s)"
    )
    pipeline.add_argument("--rounds", type=count, default=3, metavar="R", help="(default: %(default)s)")
    pipeline.add_argument(
        "--baseline", action="store_true", help="also the plain OpenCV + onnxruntime loop, in the same run"
    )
    pipeline.add_argument("--json", metavar="FILE", help="write the report there; - is stdout")
    add_model_and_device(pipeline)


def _bench_pipeline(arguments: argparse.Namespace) -> int:
    from visionedge.inference.model import bundled_model_path
    from visionedge.ops import bench_pipeline as bench
    from visionedge.ops.bench_report import write_json

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
        write_json(report, Path(arguments.json))
    return 0
