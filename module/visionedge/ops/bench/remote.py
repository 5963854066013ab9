"""`visionedge bench remote`: the time of a batch on the servers of `inference.remote`, beside this CPU.

`bench_remote` returns the report as a JSON document; `format_report` makes text of it. Both compute the same
pictures in turns on one thread, so that other load on the machine slows both.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from visionedge.config.schema import InferenceConfig
from visionedge.engine.autotune import (
    BatchRunner,
    ThroughputSample,
    make_noise_pictures,
    run_interleaved,
)
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.engine.plan import OperatingPoint, list_batch_sizes
from visionedge.model.model import load_model
from visionedge.ops.bench.machine import describe_machine
from visionedge.runtime.measurement import median_ratio, run_in_rounds

_NO_LIMIT = 1_000_000


@dataclass(frozen=True, slots=True)
class RemoteLoad:
    """What to run; `inference` requests the device `remote`. `batches` default to powers of two."""

    model: Path
    inference: InferenceConfig
    batches: tuple[int, ...] | None = None
    seconds: float = 0.5
    rounds: int = 5
    data: Path | None = None


def bench_remote(load: RemoteLoad, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the report as a document. `progress` gets a line for each step.

    Raises:
        ModelError: the model cannot be run.
        DeviceError: no server can be used.
    """
    model = load_model(load.model)
    batches = load.batches or list_batch_sizes(load.inference.max_batch)
    wanted = {"fallback": "exit", "precision": "fp32", "max_batch": max(batches)}
    remote = open_engine(model, load.inference.model_copy(update=wanted), data=load.data)
    with closing(remote):
        progress(f"{model.name}: {remote.info().device.describe()}")
        cpu = load.inference.model_copy(update={**wanted, "device": "cpu"})
        with closing(open_engine(model, cpu, data=load.data)) as local:
            samples = _measure(remote, local, batches, load, progress)
        servers = [replica.url for replica in remote.info().replicas]
        return {
            "schema": "visionedge/bench-remote/1",
            "machine": describe_machine(remote.info().device),
            "load": {"seconds": load.seconds, "rounds": load.rounds},
            "model": {"name": model.name, "width": model.input.width_px, "height": model.input.height_px},
            "servers": servers,
            "batches": [_line(batch, given) for batch, given in samples.items()],
        }


def _measure(
    remote: LocalEngine,
    local: LocalEngine,
    batches: tuple[int, ...],
    load: RemoteLoad,
    progress: Callable[[str], None],
) -> dict[int, list[Mapping[str, ThroughputSample]]]:
    """The samples of both by batch size, one a round."""
    pictures = np.asarray(make_noise_pictures(remote.info().model.input, max(batches)), np.uint8)
    runs: Mapping[str, BatchRunner] = {
        "remote": lambda batch: remote.infer(pictures[:batch]),
        "local": lambda batch: local.infer(pictures[:batch]),
    }

    def trial(batch: int) -> Mapping[str, ThroughputSample]:
        return run_interleaved(runs, OperatingPoint(1, batch), load.seconds, max_count=_NO_LIMIT)

    trials = {batch: partial(trial, batch) for batch in batches}
    return run_in_rounds(
        trials, load.rounds, lambda number, _results: progress(f"round {number}/{load.rounds}")
    )


def _line(batch: int, given: list[Mapping[str, ThroughputSample]]) -> dict[str, Any]:
    remote, local = ([each[name] for each in given] for name in ("remote", "local"))
    return {
        "batch": batch,
        "remoteMs": round(median(sample.batch_ms for sample in remote), 3),
        "localMs": round(median(sample.batch_ms for sample in local), 3),
        "remoteToLocal": round(median_ratio(remote, local, lambda sample: sample.batch_ms), 3),
        "remoteToLocalAll": [
            round(theirs.batch_ms / ours.batch_ms, 3) for theirs, ours in zip(remote, local, strict=True)
        ],
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    model, on = report["model"], report["machine"]
    lines = [
        f"{model['name']} ({model['width']} x {model['height']}) on {', '.join(report['servers'])}",
        f"beside one thread of {on['cpu']}, {on['usableCores']} usable cores,"
        f" load average {on['loadAverage']:g}",
        "",
        "  batch   remote ms   local ms   remote/local",
    ]
    lines += [
        f"  {row['batch']:5}   {row['remoteMs']:9.2f}   {row['localMs']:8.2f}   {row['remoteToLocal']:12.3f}"
        for row in report["batches"]
    ]
    return "\n".join(lines) + "\n"
