"""A runtime in the terminal that prints the messages of a module.

    PYTHONPATH=tests/doubles python -m edge_runtime
        prints the environment for any module
    PYTHONPATH=tests/doubles python -m edge_runtime run --duration 30
        starts `visionedge run --duration 30` in it

The module shows the bundled clip unless the command names cameras or a configuration. Commands of the cloud
can be typed while the module runs: type `help`.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from edge_runtime.account import ReceivedMessage
from edge_runtime.console import run_command
from edge_runtime.runtime import EdgeRuntime, PortTakenError


def main() -> int:
    """Run until interrupted, or until the module ends."""
    parser = argparse.ArgumentParser(
        prog="edge_runtime", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="edge-device-1")
    parser.add_argument("--module", default="vision")
    parser.add_argument("--bodies", action="store_true", help="print whole bodies, not only a summary")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="run and its arguments: start the module, too"
    )
    arguments = parser.parse_args()
    show = show_body if arguments.bodies else show_line
    try:
        with EdgeRuntime(device=arguments.device, module=arguments.module, on_message=show) as runtime:
            if arguments.command:
                return run_module(runtime, arguments.command)
            return wait(runtime)
    except PortTakenError as error:
        sys.stderr.write(f"{error}\n")
        return 3


def wait(runtime: EdgeRuntime) -> int:
    """Print the environment variables for a module, and serve until interrupted."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    say("# in the shell that runs the module:")
    for name, value in runtime.environ.items():
        say(f"export {name}={shlex.quote(value)}")
    ended.wait()
    return 0


def run_module(runtime: EdgeRuntime, command: list[str]) -> int:
    """Start the module inside the runtime; returns its exit code."""
    module = subprocess.Popen(
        [sys.executable, "-m", "visionedge", *with_demo(command, os.environ)],
        env={**os.environ, **runtime.environ},
        process_group=0,  # else Ctrl-C reaches the module twice, which ends it at once
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: module.send_signal(got))
    say(f"# edgeHub at {runtime.address}; messages of {runtime.account.client_id} follow")
    say("# commands: desired, twin, call, send, help, quit")
    console = (runtime, sys.stdin, lambda: module.send_signal(signal.SIGTERM))
    threading.Thread(target=listen, args=console, name="console", daemon=True).start()
    return module.wait()


def with_demo(command: list[str], environ: Mapping[str, str]) -> list[str]:
    """Add the bundled clip as a camera if the command names neither cameras nor a file."""
    named = any(word.split("=")[0] in ("--camera", "--config") for word in command)
    if command[0] != "run" or named or environ.get("VISIONEDGE_CONFIG"):
        return command
    return [*command, "--camera", "demo=demo:"]


def listen(runtime: EdgeRuntime, typed: Iterable[str], end: Callable[[], None]) -> None:
    """Run typed commands until the input ends; `quit` ends the module in order."""
    for line in typed:
        if line.strip() in ("quit", "exit"):
            end()
            return
        say(run_command(runtime, line))


def show_line(message: ReceivedMessage) -> None:
    """Print one line about a message."""
    document = message.json()
    if "frames" in document:
        what = summary(document)
    elif "events" in document:
        what = ", ".join(f"{event['camera']} {event['type']}" for event in document["events"])
    else:
        what = f"{document['code']}: {document['message']}"
    say(f"{message.output} {document['messageSequence']} ({len(message.body)} bytes): {what}")


def summary(document: dict[str, Any]) -> str:
    """The number of frames by camera, and the labels in the last one."""
    last = {frame["camera"]: frame for frame in document["frames"]}
    parts = []
    for camera, frame in last.items():
        count = sum(each["camera"] == camera for each in document["frames"])
        labels = [row["label"] for row in frame["detections"]]
        seen = ", ".join(f"{labels.count(label)} {label}" for label in sorted(set(labels))) or "nothing"
        parts.append(f"{camera} {count} frames, last: {seen}")
    return "; ".join(parts)


def show_body(message: ReceivedMessage) -> None:
    """Print a whole message."""
    body = json.dumps(message.json(), indent=2, ensure_ascii=False)
    say(f"{message.output} {message.message_id} {message.properties}\n{body}")


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
