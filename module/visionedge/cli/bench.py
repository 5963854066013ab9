"""`visionedge bench`: benchmarks of the engine, the pipeline, scenes and HTTP, and their comparison."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from visionedge.cli.arguments import (
    PRECISIONS,
    Subparsers,
    add_command,
    add_group,
    add_line_numbers,
    add_model_and_device,
    add_number,
    add_runtime,
    build_document,
    choose_engine,
    configuration_file,
    data_folder,
    fraction,
    positive_integer,
    positive_number,
)
from visionedge.config.load import parse_config
from visionedge.config.schema import CameraConfig
from visionedge.errors import ConfigError
from visionedge.frames.types import FrameResult
from visionedge.ops.bench.machine import OTHER_PROCESSES_KEY, OtherProcessesLoad, describe_other_load
from visionedge.runtime.process_limits import configure_malloc

_STOP_S = 5.0


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `bench`."""
    benchmarks = add_group(
        subparsers,
        "bench",
        "benchmarks of the engine, the pipeline, scenes and HTTP",
        "  visionedge bench engine\n"
        "  visionedge bench pipeline --cameras 4 --source yard.mp4 --baseline\n"
        "  visionedge bench pipeline --fps 5 --cameras 16 --json report.json",
        title="benchmarks",
        metavar="BENCHMARK",
    )
    _add_engine(benchmarks)
    _add_pipeline(benchmarks)
    _add_scene(benchmarks)
    _add_http(benchmarks)
    _add_remote(benchmarks)
    _add_compare(benchmarks)


def _add_engine(benchmarks: Subparsers) -> None:
    engine = add_command(
        benchmarks,
        "engine",
        _bench_engine,
        "the engine alone: lanes x batch, compared to bare session.run and to the original network",
        "  visionedge bench engine --html report.html\n"
        "  visionedge bench engine --model yolox.onnx --lanes 1,2,4 --batch 1,8 --json -",
        codes=(0, 1, 2, 3),
    )
    engine.add_argument(
        "--lanes",
        type=_parse_counts,
        metavar="N,N…",
        help="the numbers of lanes to measure (default: those that a plan considers)",
    )
    engine.add_argument(
        "--batch",
        type=_parse_counts,
        metavar="N,N…",
        help="the batch sizes to measure (default: 1, 2, 4 … inference.maxBatch)",
    )
    engine.add_argument(
        "--budget",
        type=positive_number,
        metavar="MS",
        help="inference.latencyBudgetMs of the plan, in milliseconds (default: none)",
    )
    _add_rounds(engine, seconds=0.4, rounds=5)
    _add_reports(engine)
    add_model_and_device(engine, from_environment=False)
    add_runtime(engine)


def _add_pipeline(benchmarks: Subparsers) -> None:
    pipeline = add_command(
        benchmarks,
        "pipeline",
        _bench_pipeline,
        "measure the whole pipeline with cameras from a file: frames/s, latency, CPU per frame, drops",
        "  visionedge bench pipeline --cameras 4 --source yard.mp4 --baseline --json report.json\n"
        "  visionedge bench pipeline --cameras 16 --fps 5 --slo-ms 500 --source synthetic:1280x720@30",
        codes=(0, 1, 2, 3),
    )
    add_number(pipeline, "--cameras", positive_integer, 4, "the number of cameras")
    pipeline.add_argument(
        "--events",
        action="store_true",
        help="measure the time from capture to the scene event in an HTTP client at 0.8 of the capacity: of"
        " a module with as many cameras of at most --fps (default: 10) as that needs, with lines or --scene",
    )
    pipeline.add_argument(
        "--source",
        default="demo:",
        metavar="URI",
        help="the video that each camera plays in a loop, or synthetic:WIDTHxHEIGHT@FPS"
        " (default: demo:, the bundled clip)",
    )
    pipeline.add_argument(
        "--fps",
        type=positive_number,
        metavar="FPS",
        help="frames per second of each camera (default: as fast as possible)",
    )
    _add_rounds(pipeline, seconds=8.0, rounds=3)
    add_number(
        pipeline,
        "--slo-ms",
        positive_number,
        500.0,
        "a frame whose result comes within this time counts as goodput",
        metavar="MS",
    )
    pipeline.add_argument(
        "--baseline",
        action="store_true",
        help="also run a plain OpenCV + onnxruntime loop in each round",
    )
    _add_scene_file(pipeline, "also run with zones and lines in each round:", default=None)
    pipeline.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="the inference.precision of the pipeline (default: auto; with --baseline fp32)",
    )
    _add_reports(pipeline)
    add_model_and_device(pipeline, from_environment=False)
    add_runtime(pipeline)


def _add_scene(benchmarks: Subparsers) -> None:
    scene = add_command(
        benchmarks,
        "scene",
        _bench_scene,
        "tracker, zones and lines on recorded boxes: processor time for each frame",
        "  visionedge bench scene --json -\n"
        "  visionedge bench scene --boxes boxes.jsonl --scene vision.yaml --boxes-per-frame 30",
        codes=(0, 1, 2, 3),
    )
    scene.add_argument(
        "--boxes",
        metavar="FILE",
        help="frame objects of `visionedge detect CLIP --json --confidence 0.2`, or synthetic"
        " (default: those of the bundled clip)",
    )
    add_number(
        scene, "--boxes-per-frame", positive_integer, 10, "the most boxes of a frame, by their confidence"
    )
    add_number(scene, "--fps", positive_number, 10.0, "frames per second of the recorded clip", metavar="FPS")
    _add_scene_file(scene, "the zones and lines:", default="default")
    _add_rounds(scene, seconds=1.0, rounds=5)
    _add_reports(scene)
    add_model_and_device(scene, from_environment=False)


def _add_scene_file(parser: argparse.ArgumentParser, purpose: str, *, default: str | None) -> None:
    """Add the option `--scene`; see `read_scene`."""
    parser.add_argument(
        "--scene",
        default=default,
        metavar="FILE",
        help=f"{purpose} those of the first camera with tracking in a configuration file; or default: two"
        f" zones and a line (default: {default or 'none'})",
    )


def _add_http(benchmarks: Subparsers) -> None:
    http = add_command(
        benchmarks,
        "http",
        _bench_http,
        "clients of the result endpoints: rate, latency, and their cost for the pipeline",
        "  visionedge bench http --clients 16 --rate 200\n"
        "  visionedge bench http --url http://127.0.0.1:8080 --json report.json",
        codes=(0, 1, 2, 3),
    )
    http.add_argument(
        "--url",
        metavar="URL",
        help="the address of a running module (default: start one for the measurement)",
    )
    http.add_argument(
        "--token", metavar="TOKEN", help="the http.token of that module (default: VISIONEDGE_HTTP_TOKEN)"
    )
    add_number(http, "--clients", positive_integer, 16, "the number of clients")
    add_number(http, "--rate", positive_number, 200.0, "the requests per second of all clients together")
    add_number(http, "--cameras", positive_integer, 16, "the number of cameras of the started module")
    _add_rounds(http, seconds=5.0, rounds=3)
    _add_reports(http)
    add_model_and_device(http, from_environment=False)


def _add_remote(benchmarks: Subparsers) -> None:
    remote = add_command(
        benchmarks,
        "remote",
        _bench_remote,
        "the servers of inference.remote: the time of a batch, beside this CPU",
        "  visionedge bench remote --config vision.yaml\n"
        "  visionedge bench remote --config vision.yaml --batch 1,8 --json -",
        codes=(0, 1, 2, 3),
    )
    remote.add_argument(
        "--config", metavar="FILE", help="the configuration, YAML or JSON (default: VISIONEDGE_CONFIG)"
    )
    remote.add_argument(
        "--batch",
        type=_parse_counts,
        metavar="N,N…",
        help="the batch sizes to measure (default: powers of two up to inference.maxBatch)",
    )
    _add_rounds(remote, seconds=0.5, rounds=5)
    remote.add_argument("--json", metavar="FILE", help="write the report to this file as JSON; - is stdout")
    remote.add_argument(
        "--model", metavar="PATH", help="the model, an ONNX file (default: that of the configuration)"
    )
    remote.set_defaults(html=None, device="remote", http=None)


def _add_compare(benchmarks: Subparsers) -> None:
    compare = add_command(
        benchmarks,
        "compare",
        _bench_compare,
        "compare two reports: is the second one worse, or is the difference noise?",
        "  visionedge bench compare before.json after.json\n"
        "  visionedge bench compare before.json after.json --tolerance 0.05 --json -",
        codes=(0, 1, 2),
        notes="exit code 1 means that the second report is worse",
    )
    compare.add_argument("before", metavar="A.json", help="a report that bench wrote with --json")
    compare.add_argument("after", metavar="B.json", help="a later report of the same benchmark")
    add_number(
        compare, "--tolerance", fraction, 0.03, "the relative change that counts as none, 0 to 1", metavar="X"
    )
    compare.add_argument(
        "--unlike", action="store_true", help="compare reports of different machines or loads too"
    )
    compare.add_argument("--json", metavar="FILE", help="write the verdict to this file as JSON; - is stdout")
    compare.set_defaults(html=None)


def _add_rounds(parser: argparse.ArgumentParser, *, seconds: float, rounds: int) -> None:
    add_number(
        parser, "--seconds", positive_number, seconds, "the length of each measurement", metavar="SECONDS"
    )
    add_number(
        parser, "--rounds", positive_integer, rounds, "the number of rounds; medians over them are reported"
    )


def _add_reports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the report to this file as JSON; - is stdout")
    parser.add_argument("--html", metavar="FILE", help="write the report to this file as an HTML page")


def _parse_counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive_integer(word) for word in text.split(",")}))


def _bench_engine(arguments: argparse.Namespace) -> int:
    from visionedge.ops.bench import engine as bench

    inference = {"latencyBudgetMs": arguments.budget, **choose_engine(arguments)}
    others = OtherProcessesLoad()
    report = bench.bench_engine(
        bench.EngineLoad(
            model=_model_path(arguments),
            lanes=arguments.lanes,
            batches=arguments.batch,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            inference=parse_config({"inference": inference}).inference,
            data=data_folder(os.environ),
        ),
        _print_progress,
    ) | {OTHER_PROCESSES_KEY: others.share()}
    return _write_outputs(arguments, report, bench.format_report(report))


def _bench_pipeline(arguments: argparse.Namespace) -> int:
    from visionedge.ops.bench import pipeline as bench
    from visionedge.ops.bench.events import bench_events
    from visionedge.ops.bench.events import format_report as format_events
    from visionedge.ops.bench.pipeline_run import PipelineLoad
    from visionedge.ops.bench.scene import read_scene

    configure_malloc()  # as the module does, so that the memory figures are comparable
    # The plain loop computes in fp32, and only the same precision compares the two programs.
    precision = arguments.precision or ("fp32" if arguments.baseline else "auto")
    inference = {**choose_engine(arguments), "precision": precision}
    load = PipelineLoad(
        model=_model_path(arguments),
        source=arguments.source,
        cameras=arguments.cameras,
        fps=arguments.fps,
        slo_ms=arguments.slo_ms,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        baseline=arguments.baseline,
        scene=None if arguments.scene is None else read_scene(arguments.scene, os.environ),
        inference=parse_config({"inference": inference}).inference,
        data=data_folder(os.environ),
    )
    others = OtherProcessesLoad()
    if arguments.events:
        if arguments.baseline:
            raise ConfigError(["--events: the plain loop of --baseline has no events"])
        report = bench_events(load, _print_progress) | {OTHER_PROCESSES_KEY: others.share()}
        return _write_outputs(arguments, report, format_events(report))
    report = bench.bench_pipeline(load, _print_progress) | {OTHER_PROCESSES_KEY: others.share()}
    return _write_outputs(arguments, report, bench.format_report(report))


def _bench_scene(arguments: argparse.Namespace) -> int:
    from visionedge.ops.bench import scene as bench

    others = OtherProcessesLoad()
    load = bench.SceneLoad(
        model=_model_path(arguments),
        camera=bench.read_scene(arguments.scene, os.environ),
        boxes=arguments.boxes,
        boxes_per_frame=arguments.boxes_per_frame,
        fps=arguments.fps,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        inference=parse_config({"inference": {"device": arguments.device}}).inference,
        data=data_folder(os.environ),
    )
    report = bench.bench_scene(load, _print_progress, _open_scene_host)
    report[OTHER_PROCESSES_KEY] = others.share()
    return _write_outputs(arguments, report, bench.format_report(report))


@contextlib.contextmanager
def _open_scene_host(camera: CameraConfig) -> Iterator[Callable[[FrameResult], object]]:
    """The scenes of a module with this camera, whose `scene.db` is in a temporary folder; see `OpenHost`."""
    from visionedge.app.scene_host import SceneHost
    from visionedge.app.state import AppState
    from visionedge.ops.bench.scene import CAMERA
    from visionedge.runtime.threads import ThreadGroup

    config = parse_config({}).model_copy(update={"cameras": {CAMERA: camera}})
    with tempfile.TemporaryDirectory() as folder:
        state = AppState.of(config, Path(folder), {}, lambda: None)
        threads = ThreadGroup(lambda _name, _error: None)
        host = SceneHost(state.snapshot, Path(folder), threads, deliver=lambda _documents: None)
        asyncio.run(host.configure(config.cameras))
        try:
            yield host.update
        finally:
            host.close(_STOP_S)


def _bench_http(arguments: argparse.Namespace) -> int:
    from visionedge.ops.bench import http as bench

    given = {"--model": arguments.model, "--device": arguments.device}
    load = bench.HttpLoad(
        url=arguments.url,
        token=arguments.token or os.environ.get("VISIONEDGE_HTTP_TOKEN"),
        clients=arguments.clients,
        rate=arguments.rate,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        cameras=arguments.cameras,
        arguments=tuple(word for name, value in given.items() if value for word in (name, value)),
    )
    others = OtherProcessesLoad()
    # With --url the module is not a child of this process, so its load counts as that of other processes.
    report = bench.bench_http(load, _print_progress)
    report[OTHER_PROCESSES_KEY] = others.share() if load.url is None else None
    return _write_outputs(arguments, report, bench.format_report(report))


def _bench_remote(arguments: argparse.Namespace) -> int:
    from visionedge.model.model import find_bundled_model
    from visionedge.ops.bench import remote as bench

    document = build_document(arguments, os.environ)
    with add_line_numbers(configuration_file(arguments, os.environ), os.environ):
        config = parse_config(document)
    report = bench.bench_remote(
        bench.RemoteLoad(
            model=Path(config.model.path) if config.model.path else find_bundled_model(),
            inference=config.inference,
            batches=arguments.batch,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            data=data_folder(os.environ),
        ),
        _print_progress,
    )
    # The servers may run on this machine, so the load of other processes says nothing.
    report[OTHER_PROCESSES_KEY] = None
    return _write_outputs(arguments, report, bench.format_report(report))


def _bench_compare(arguments: argparse.Namespace) -> int:
    from visionedge.ops.bench.compare import compare_reports, format_report
    from visionedge.ops.bench.report import read_report

    before, after = (read_report(Path(path)) for path in (arguments.before, arguments.after))
    verdict = compare_reports(before, after, tolerance=arguments.tolerance, unlike=arguments.unlike)
    _write_outputs(arguments, verdict, format_report(verdict))
    return 1 if verdict["verdict"] == "worse" else 0


def _write_outputs(arguments: argparse.Namespace, report: dict[str, Any], text: str) -> int:
    """The report as text on stdout, and as JSON and as a page where these are wanted."""
    from visionedge.ops.bench.report import render_page, write_text

    text += describe_other_load(report)
    if "-" not in (arguments.json, arguments.html):
        sys.stdout.write(text)
    if arguments.json:
        write_text(json.dumps(report, indent=2) + "\n", arguments.json)
    if arguments.html:
        write_text(render_page(report, text), arguments.html)
    return 0


def _model_path(arguments: argparse.Namespace) -> Path:
    from visionedge.model.model import find_bundled_model

    return Path(arguments.model) if arguments.model else find_bundled_model()


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr)
