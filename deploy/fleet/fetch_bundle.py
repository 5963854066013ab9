"""Fetches the support bundle of a device through IoT Hub: a zip with report, configuration, status and log.

    python3 deploy/fleet/fetch_bundle.py --hub HUB --device edge-01 -o edge-01.zip

Needs Python 3.9 or newer, and `az` with the extension azure-iot, logged in. Secrets are masked by the module;
look at the zip all the same before you send it. An error is one line on stderr and exit code 1.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_TRIES = 12
_WAIT_S = 5.0
_AGAIN = frozenset({409, 503, 504})
"""The module is still making the bundle, or busy."""


class FetchError(Exception):
    """The bundle cannot be fetched; the text is one line for people."""


def find_az() -> str:
    """The Azure CLI on the PATH; on Windows it has a suffix."""
    az = shutil.which("az")
    if az is None:
        raise FetchError("az is not installed")
    return az


def call_bundle(az: str, arguments: argparse.Namespace, payload: dict[str, Any]) -> dict[str, Any]:
    """The answer of the direct method `bundle`; waits while the module is busy."""
    command = [az, "iot", "hub", "invoke-module-method", "--hub-name", arguments.hub]
    command += ["--device-id", arguments.device, "--module-id", arguments.module, "--method-name", "bundle"]
    command += ["--method-payload", json.dumps(payload), "--output", "json"]
    for left in reversed(range(_TRIES)):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise FetchError(f"az: {reason[-1]}")
        try:
            answer = json.loads(done.stdout)
            status, document = int(answer["status"]), answer["payload"]
        except (ValueError, KeyError, TypeError):
            raise FetchError("az: the answer has no status and payload") from None
        if status == 200:
            return dict(document)
        if status not in _AGAIN or left == 0:
            raise FetchError(f"{arguments.device}: {describe_error(status, document)}")
        time.sleep(arguments.wait)
    raise AssertionError


def describe_error(status: int, document: Any) -> str:
    """The error of an answer as text."""
    error = document.get("error", {}) if isinstance(document, dict) else {}
    return f"{status} {error.get('code', '')}: {error.get('message', 'no message')}"


def fetch_bundle(az: str, arguments: argparse.Namespace) -> bytes:
    """The whole zip, compared with its hash."""
    first = call_bundle(az, arguments, {})
    parts = [base64.b64decode(first["data"])]
    for number in range(1, int(first["chunks"])):
        part = call_bundle(az, arguments, {"id": first["id"], "chunk": number})
        parts.append(base64.b64decode(part["data"]))
    data = b"".join(parts)
    if hashlib.sha256(data).hexdigest() != first["sha256"]:
        raise FetchError("the chunks do not fit together: fetch the bundle again")
    return data


def main() -> int:
    """Fetch, write, and return the exit code."""
    parser = argparse.ArgumentParser(description="Fetch the support bundle of a device through IoT Hub.")
    parser.add_argument("--hub", required=True, help="the name of the IoT hub")
    parser.add_argument("--device", required=True, help="the device id")
    parser.add_argument("--module", default="vision", help="the module id (default: vision)")
    parser.add_argument("-o", "--output", help="the zip to write (default: DEVICE.zip)")
    parser.add_argument("--wait", type=float, default=_WAIT_S, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = Path(arguments.output or f"{arguments.device}.zip")
    try:
        data = fetch_bundle(find_az(), arguments)
        path.write_bytes(data)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{path}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{path}: {len(data):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
