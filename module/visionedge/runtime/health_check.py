"""The health check of the container images: ``python -m visionedge.runtime.health_check``.

The module writes the address that it listens on into its data folder, because the twin may change the port.
"""

import os
import sys
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from visionedge.runtime.files import read_regular_file, write_atomically

ADDRESS_FILE_NAME = "http-address"
_DEFAULT_ADDRESS = "127.0.0.1:8080"
_TIMEOUT_S = 4


def keep_address(data: Path, url: str) -> None:
    """Keep the address of the running module, such as ``http://127.0.0.1:8080/``; blocks, raises nothing."""
    with suppress(OSError):
        write_atomically(data / ADDRESS_FILE_NAME, url.encode())


def find_address(environ: Mapping[str, str]) -> str:
    """The address that the module listens on, else the one in VISIONEDGE_HTTP."""
    with suppress(OSError, UnicodeDecodeError):
        kept = read_regular_file(
            Path(environ.get("VISIONEDGE_DATA", "/data")) / ADDRESS_FILE_NAME, max_bytes=300
        )
        if (url := kept.decode("ascii").strip()).startswith("http://"):
            return url
    port = environ.get("VISIONEDGE_HTTP", _DEFAULT_ADDRESS).rpartition(":")[2]
    return f"http://127.0.0.1:{port}/"


def main(environ: Mapping[str, str]) -> int:
    """0 if the module says that it is healthy, else 1."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{find_address(environ)}healthz", timeout=_TIMEOUT_S):
            return 0
    except OSError as error:
        sys.stderr.write(f"not healthy: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(os.environ))
