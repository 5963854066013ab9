"""`visionedge bench`: measure the engine, the pipeline, decoding and HTTP, and compare two reports."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visionedge.cli.arguments import (
    Parser,
    Subparsers,
    add_command,
    add_model_and_device,
    data_folder,
    fraction,
    positive_integer,
    positive_number,
)
from visionedge.config.load import parse_config
from visionedge.errors import ConfigError
from visionedge.ops.bench.system_load import OTHER_PROCESSES_KEY, OtherProcessesLoad, describe_other_load
from visionedge.runtime.process_limits import configure_malloc


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `bench`."""
    parser = add_command(
        subparsers,
        "bench",
        lambda _: 2,
        "benchmarks: how fast, at what cost, and compared to what",
        "  visionedge bench engine\n"
        "  visionedge bench pipeline --cameras 4 --source yard.mp4 --baseline\n"
        "  visionedge bench pipeline --fps 5 --cameras 16 --json report.json",
    )
    benchmarks = parser.add_subparsers(
        title="benchmarks", metavar="BENCHMARK", required=True, parser_class=Parser
    )
    _add_engine(benchmarks)
    _add_pipeline(benchmarks)
    _add_decode(benchmarks)
    _add_http(benchmarks)
    _add_compare(benchmarks)


def _add_engine(benchmarks: Subparsers) -> None:
    engine = add_command(
        benchmarks,
        "engine",
        _bench_engine,
        "measure the engine alone: lanes x batch, next to session.run and the original network",
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
    engine.add_argument(
        "--seconds",
        type=positive_number,
        default=0.4,
        metavar="SECONDS",
        help="the length of each trial (default: %(default)s)",
    )
    engine.add_argument(
        "--rounds",
        type=positive_integer,
        default=5,
        metavar="N",
        help="the number of rounds; medians over them are reported (default: %(default)s)",
    )
    _add_reports(engine)
    add_model_and_device(engine, from_environment=False)


def _add_pipeline(benchmarks: Subparsers) -> None:
    pipeline = add_command(
        benchmarks,
        "pipeline",
        _bench_pipeline,
        "measure the whole pipeline with cameras from a file: frames/s, latency, CPU per frame, drops",
        "  visionedge bench pipeline --cameras 4 --source yard.mp4 --baseline --json report.json\n"
        "  visionedge bench pipeline --fps 5 --saturate --slo-ms 500 --source synthetic:1280x720@30",
        codes=(0, 1, 2, 3),
    )
    pipeline.add_argument(
        "--cameras",
        type=positive_integer,
        default=4,
        metavar="N",
        help="the number of cameras (default: %(default)s)",
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
    pipeline.add_argument(
        "--seconds",
        type=positive_number,
        default=8.0,
        metavar="SECONDS",
        help="the length of each round (default: %(default)s)",
    )
    pipeline.add_argument(
        "--rounds",
        type=positive_integer,
        default=3,
        metavar="N",
        help="the number of rounds; medians over them are reported (default: %(default)s)",
    )
    _add_arrivals(pipeline)
    pipeline.add_argument(
        "--baseline",
        action="store_true",
        help="also run the plain OpenCV + onnxruntime loop, in turns with the pipeline",
    )
    pipeline.add_argument(
        "--precision",
        choices=("auto", "fp32", "fp16", "int8"),
        help="the inference.precision of the pipeline (default: auto; with --baseline fp32)",
    )
    pipeline.add_argument(
        "--in-process", action="store_true", help="run the engine in this process instead of its own process"
    )
    pipeline.add_argument(
        "--compare-process",
        action="store_true",
        help="measure the engine in this process and in its own, in turns",
    )
    _add_reports(pipeline)
    add_model_and_device(pipeline, from_environment=False)


def _add_arrivals(pipeline: argparse.ArgumentParser) -> None:
    """Options of how frames arrive, and of the search for the highest number of cameras."""
    pipeline.add_argument(
        "--jitter",
        type=positive_number,
        metavar="MS",
        help="with --fps: the most milliseconds that a frame comes early or late",
    )
    pipeline.add_argument(
        "--dropouts",
        type=positive_number,
        metavar="SECONDS",
        help="with --fps: the time between two drop-outs; a burst of frames follows each",
    )
    pipeline.add_argument(
        "--slo-ms",
        type=positive_number,
        default=500.0,
        metavar="MS",
        help="the highest age of a result that is in time, in milliseconds (default: %(default)s)",
    )
    pipeline.add_argument(
        "--saturate",
        action="store_true",
        help="search the highest number of cameras with an age p99 within --slo-ms",
    )
    pipeline.add_argument(
        "--max-cameras",
        type=positive_integer,
        default=64,
        metavar="N",
        help="with --saturate: the highest number of cameras to try (default: %(default)s)",
    )


def _add_decode(benchmarks: Subparsers) -> None:
    decode = add_command(
        benchmarks,
        "decode",
        _bench_decode,
        "measure decoding, from a camera's packets to the model's input, next to OpenCV and a letterbox",
        "  visionedge bench decode\n  visionedge bench decode --source yard.mp4 --size 416 --fps 5 --json -",
        codes=(0, 1, 2, 3),
    )
    decode.add_argument("--source", metavar="FILE", help="a video (default: a generated one, 1920x1080)")
    decode.add_argument(
        "--size",
        type=positive_integer,
        default=416,
        metavar="PIXELS",
        help="the width and height of the model's input (default: %(default)s)",
    )
    decode.add_argument(
        "--fps",
        type=positive_number,
        default=5.0,
        metavar="FPS",
        help="the rate of a camera with fps, in frames per second (default: %(default)s)",
    )
    decode.add_argument(
        "--key-fps",
        type=positive_number,
        default=0.5,
        metavar="FPS",
        help="a rate for which key pictures are enough, in frames per second (default: %(default)s)",
    )
    decode.add_argument(
        "--rounds",
        type=positive_integer,
        default=5,
        metavar="N",
        help="the number of rounds; medians over them are reported (default: %(default)s)",
    )
    decode.add_argument("--json", metavar="FILE", help="write the report to this file as JSON; - is stdout")
    decode.set_defaults(html=None)


def _add_http(benchmarks: Subparsers) -> None:
    http = add_command(
        benchmarks,
        "http",
        _bench_http,
        "measure HTTP clients: rate, percentiles, and the CPU that they take from the pipeline",
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
    http.add_argument(
        "--clients",
        type=positive_integer,
        default=16,
        metavar="N",
        help="the number of clients (default: %(default)s)",
    )
    http.add_argument(
        "--rate",
        type=positive_number,
        default=200.0,
        metavar="N",
        help="the requests per second of all clients together (default: %(default)s)",
    )
    http.add_argument(
        "--cameras",
        type=positive_integer,
        default=16,
        metavar="N",
        help="the number of cameras of the started module (default: %(default)s)",
    )
    http.add_argument(
        "--seconds",
        type=positive_number,
        default=5.0,
        metavar="SECONDS",
        help="the length of each measurement (default: %(default)s)",
    )
    http.add_argument(
        "--rounds",
        type=positive_integer,
        default=3,
        metavar="N",
        help="the number of rounds; medians over them are reported (default: %(default)s)",
    )
    _add_reports(http)
    add_model_and_device(http, from_environment=False)


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
    compare.add_argument(
        "--tolerance",
        type=fraction,
        default=0.03,
        metavar="X",
        help="the relative change that counts as none, 0 to 1 (default: %(default)s)",
    )
    compare.add_argument(
        "--unlike", action="store_true", help="also compare reports of different machines or loads"
    )
    compare.add_argument("--json", metavar="FILE", help="write the verdict to this file as JSON; - is stdout")
    compare.set_defaults(html=None)


def _add_reports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the report to this file as JSON; - is stdout")
    parser.add_argument("--html", metavar="FILE", help="write the report to this file as a page with plots")


def _parse_counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive_integer(word) for word in text.split(",")}))


def _bench_engine(arguments: argparse.Namespace) -> int:
    from visionedge.ops.bench import engine as bench
    from visionedge.ops.bench.engine_page import engine_page

    page = _select_page_renderer(arguments, engine_page)
    inference = {"latencyBudgetMs": arguments.budget, "device": arguments.device}
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
    return _write_outputs(arguments, report, bench.format_report(report), page)


def _bench_pipeline(arguments: argparse.Namespace) -> int:
    from visionedge.ops.bench import pipeline as bench
    from visionedge.ops.bench.pipeline_page import pipeline_page
    from visionedge.ops.bench.pipeline_run import PipelineLoad

    configure_malloc()  # as `run` does, for the same memory use
    if arguments.fps is None and (arguments.jitter or arguments.dropouts or arguments.saturate):
        raise ConfigError(
            ["--jitter, --dropouts and --saturate need --fps: without it frames have no schedule"]
        )
    if arguments.saturate and arguments.dropouts:
        raise ConfigError(
            ["--saturate: cannot be combined with --dropouts, which age results on any machine"]
        )
    # With --baseline both sides use the same precision, so that only the pipelines differ.
    precision = arguments.precision or ("fp32" if arguments.baseline else "auto")
    inference = {"device": arguments.device, "precision": precision}
    page = _select_page_renderer(arguments, pipeline_page)
    others = OtherProcessesLoad()
    report = bench.bench_pipeline(
        PipelineLoad(
            model=_model_path(arguments),
            source=arguments.source,
            cameras=arguments.cameras,
            fps=arguments.fps,
            jitter_ms=arguments.jitter or 0.0,
            dropouts_s=arguments.dropouts,
            slo_ms=arguments.slo_ms,
            saturate=arguments.saturate,
            max_cameras=arguments.max_cameras,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            baseline=arguments.baseline,
            in_process=arguments.in_process,
            compare_process=arguments.compare_process,
            inference=parse_config({"inference": inference}).inference,
            data=data_folder(os.environ),
        ),
        _print_progress,
    ) | {OTHER_PROCESSES_KEY: others.share()}
    return _write_outputs(arguments, report, bench.format_report(report), page)


def _bench_decode(arguments: argparse.Namespace) -> int:
    from visionedge.frames.types import InputSpec
    from visionedge.ops.bench import decode as bench

    load = bench.DecodeLoad(
        source=Path(arguments.source) if arguments.source else None,
        spec=InputSpec(arguments.size, arguments.size),
        fps=arguments.fps,
        key_fps=arguments.key_fps,
        rounds=arguments.rounds,
    )
    others = OtherProcessesLoad()
    report = bench.bench_decode(load, _print_progress) | {OTHER_PROCESSES_KEY: others.share()}
    return _write_outputs(arguments, report, bench.format_report(report), None)


def _bench_http(arguments: argparse.Namespace) -> int:
    from visionedge.ops.bench import http as bench
    from visionedge.ops.bench.http_page import http_page

    page = _select_page_renderer(arguments, http_page)
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
    # The load of a module that already ran cannot be separated from that of other processes.
    report = bench.bench_http(load, _print_progress)
    report[OTHER_PROCESSES_KEY] = others.share() if load.url is None else None
    return _write_outputs(arguments, report, bench.format_report(report), page)


def _bench_compare(arguments: argparse.Namespace) -> int:
    from visionedge.ops.bench.compare import compare_reports, format_report
    from visionedge.ops.bench.report import read_report

    before, after = (read_report(Path(path)) for path in (arguments.before, arguments.after))
    verdict = compare_reports(before, after, tolerance=arguments.tolerance, unlike=arguments.unlike)
    _write_outputs(arguments, verdict, format_report(verdict), None)
    return 1 if verdict["verdict"] == "worse" else 0


Report = dict[str, Any]


def _select_page_renderer(
    arguments: argparse.Namespace, page: Callable[[Report], str]
) -> Callable[[Report], str] | None:
    """The function that makes the page, or None without --html; checks matplotlib before the measurement."""
    if arguments.html is None:
        return None
    from visionedge.ops.bench.plots import import_matplotlib

    import_matplotlib()
    return page


def _write_outputs(
    arguments: argparse.Namespace, report: Report, text: str, page: Callable[[Report], str] | None
) -> int:
    """Write the report: as text on stdout, as JSON with --json, as a page with --html."""
    from visionedge.ops.bench.report import write_json, write_text

    if "-" not in (arguments.json, arguments.html):
        sys.stdout.write(text)
        if others := describe_other_load(report):
            sys.stdout.write(f"{others}\n")
    if arguments.json:
        write_json(report, Path(arguments.json))
    if arguments.html and page is not None:
        write_text(page(report), Path(arguments.html))
    return 0


def _model_path(arguments: argparse.Namespace) -> Path:
    from visionedge.model.model import find_bundled_model

    return Path(arguments.model) if arguments.model else find_bundled_model()


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr)
