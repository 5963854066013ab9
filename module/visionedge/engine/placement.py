"""A child process that tells where the nodes of a model lie (``python -m …engine.device.placement``).

It takes ``placement '{"device": "cuda", "model": "PATH"}'`` and prints one JSON line with the device that
the session came up on, how many nodes are computed there, which are left to the CPU, and a doubt about a
device that is slow.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from visionedge.engine.device.session import Runs, open_session, words_of
from visionedge.engine.device_parity import Pace, median_ms
from visionedge.engine.local_engine import noise
from visionedge.model.compiler.build import compiled
from visionedge.model.model import Model, bundled_model_path, load_model

_ROUNDS = 5


def main(arguments: dict[str, Any]) -> None:
    """Compile the model (without a path the bundled one), open it on the device, print what became of it."""
    path = Path(arguments["model"]) if arguments.get("model") else bundled_model_path()
    told: dict[str, Any] = {"step": "placement", "model": path.stem}
    try:
        model = load_model(path)
        graph = compiled(model, None)
        session = open_session(graph, arguments["device"], max_batch=1)
    except Exception as error:  # noqa: BLE001 - whatever it is, its words are the answer
        told |= {"error": words_of(error)}
    else:
        places = session.places
        told |= {"device": session.device, "onDevice": places.on_device, "onCpu": list(places.on_cpu)}
        if session.device != "cpu":
            told["doubt"] = pace_beside_cpu(session, graph, model).doubt(session.device)
        session.close()
    sys.stdout.write(json.dumps(told) + "\n")


def pace_beside_cpu(session: Runs, graph: bytes, model: Model) -> Pace:
    """How long a picture takes on a session, and on one core of the CPU."""
    cpu = open_session(graph, "cpu", max_batch=1)
    batch = model.reading.input.batch or 1
    pictures = noise(model.input, batch)
    taken_ms = [
        median_ms(partial(runs.run, pictures, batch), rounds=_ROUNDS) / batch for runs in (session, cpu)
    ]
    cpu.close()
    return Pace(*taken_ms)


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
