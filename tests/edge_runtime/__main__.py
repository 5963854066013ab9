"""By hand: ``PYTHONPATH=tests python -m edge_runtime`` prints a module's environment and messages."""

import argparse
import shlex
import signal
import sys
import threading

from edge_runtime.broker import Received
from edge_runtime.runtime import EdgeRuntime, PortTakenError


def main() -> int:
    """Run until interrupted."""
    parser = argparse.ArgumentParser(prog="edge_runtime", description=__doc__)
    parser.add_argument("--device", default="edge-device-1")
    parser.add_argument("--module", default="vision")
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        with EdgeRuntime(device=arguments.device, module=arguments.module, on_message=_show) as runtime:
            say("# in the shell that runs the module:")
            for name, value in runtime.environ.items():
                say(f"export {name}={shlex.quote(value)}")
            ended.wait()
    except PortTakenError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    return 0


def _show(message: Received) -> None:
    say(f"{message.output} {message.message_id} {message.properties}\n    {message.body.decode()}")


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
