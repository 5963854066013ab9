"""A child process that finds out on which device the nodes of a model run (``python -m …engine.placement``).

It takes ``placement '{"device": "cuda", "model": "PATH"}'`` and prints one JSON line: the device of the
session, how many nodes run there, which nodes run on the CPU, and a doubt if the device is slow.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from visionedge.engine.device.backend import open_session
from visionedge.engine.device.faults import describe_error
from visionedge.engine.device.session import DeviceSession
from visionedge.engine.device_parity import SpeedCheck, measure_median_ms
from visionedge.engine.local_engine import make_noise_pictures
from visionedge.model.compiler.build import load_or_compile
from visionedge.model.model import Model, find_bundled_model, load_model

_ROUNDS = 5


def main(arguments: dict[str, Any]) -> None:
    """Compile the model (without a path the bundled one), open it on the device, print the result."""
    path = Path(arguments["model"]) if arguments.get("model") else find_bundled_model()
    result: dict[str, Any] = {"step": "placement", "model": path.stem}
    try:
        model = load_model(path)
        graph = load_or_compile(model, None)
        session = open_session(graph, arguments["device"], max_batch=1)
    except Exception as error:  # noqa: BLE001 - any exception is a valid result: its text is printed
        result |= {"error": describe_error(error)}
    else:
        node_placement = session.node_placement
        result |= {
            "device": session.device,
            "onDevice": node_placement.on_device,
            "onCpu": list(node_placement.on_cpu),
        }
        if session.device != "cpu":
            result["doubt"] = measure_speed_check(session, graph, model).doubt(session.device)
        session.close()
    sys.stdout.write(json.dumps(result) + "\n")


def measure_speed_check(session: DeviceSession, graph: bytes, model: Model) -> SpeedCheck:
    """Time a picture on a session and on one core of the CPU."""
    cpu = open_session(graph, "cpu", max_batch=1)
    batch = model.interpretation.input.batch or 1
    pictures = make_noise_pictures(model.input, batch)
    taken_ms = [
        measure_median_ms(partial(runs.run, pictures, batch), rounds=_ROUNDS) / batch
        for runs in (session, cpu)
    ]
    cpu.close()
    return SpeedCheck(*taken_ms)


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
