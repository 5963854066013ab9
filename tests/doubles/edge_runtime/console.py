"""Commands that are typed while a module runs: the cloud's side of twin, direct methods and inputs."""

import json
from pathlib import Path
from typing import Any

from edge_runtime.runtime import EdgeRuntime

HELP = """\
desired {"telemetry": {"mode": "all"}}   change desired properties (a patch; null takes a key away)
twin                                     both halves of the module twin
call NAME [{…}]                          call a direct method: status, ping, snapshot, …
send INPUT FILE                          send a file to an input: send frames photo.jpg
quit                                     stop the module and end"""


def run_command(runtime: EdgeRuntime, line: str) -> str:
    """Run a command; returns the text to print."""
    command, _, rest = line.strip().partition(" ")
    try:
        match command:
            case "desired":
                return f"desired properties are at version {runtime.desire(_document(rest))}"
            case "twin":
                return json.dumps(json.loads(runtime.broker.twin.document()), indent=2, ensure_ascii=False)
            case "call":
                name, _, payload = rest.strip().partition(" ")
                answer = runtime.invoke(name, json.loads(payload) if payload.strip() else None)
                return f"{answer.status} {json.dumps(answer.payload, indent=2, ensure_ascii=False)}"
            case "send":
                name, _, file = rest.strip().partition(" ")
                runtime.input(name, Path(file.strip()).read_bytes())
                return f"{file.strip()} is sent to {name}"
            case _:
                return HELP
    except (OSError, ValueError) as error:
        return f"{command}: {error}"


def _document(text: str) -> dict[str, Any]:
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError("must be a JSON object")  # noqa: TRY004 - a wrong text, not a wrong type
    return document
