"""A child process that tells where the nodes of a model lie: ``python -m visionedge.inference.placement``.

It takes ``placement '{"device": "cuda", "model": "PATH"}'`` and prints one JSON line with the device that
the session came up on, how many nodes are computed there, and which are left to the CPU.
"""

import json
import sys
from pathlib import Path
from typing import Any

from visionedge.inference.cache import compiled
from visionedge.inference.model import bundled_model_path, load_model
from visionedge.inference.session import open_session, words_of


def main(arguments: dict[str, Any]) -> None:
    """Compile the model (without a path the bundled one), open it on the device, print what became of it."""
    path = Path(arguments["model"]) if arguments.get("model") else bundled_model_path()
    told: dict[str, Any] = {"step": "placement", "model": path.stem}
    try:
        model = load_model(path)
        session = open_session(compiled(model, None), arguments["device"], max_batch=1)
    except Exception as error:  # noqa: BLE001 - whatever it is, its words are the answer
        told |= {"error": words_of(error)}
    else:
        places = session.places
        told |= {"device": session.device, "onDevice": places.on_device, "onCpu": list(places.on_cpu)}
        session.close()
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
