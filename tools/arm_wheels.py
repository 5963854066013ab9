"""Check that every locked package of the CPU image has a wheel for arm64, with the locked hash.

Asks the package index through pip; nothing is installed. paho-mqtt, which was never published as a wheel, is
pure Python and is built in the image.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
PYTHON_VERSION = "3.12"
"""That of the Dockerfile's default base."""
PLATFORMS = (*(f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)), "manylinux2014_aarch64")
"""What Debian 12 runs, whose glibc is 2.36."""
BUILT = ("paho-mqtt",)


def without_built(lock: str) -> str:
    """The text of a lock without the packages that the image builds from source."""
    parts = re.split(r"^(?=[\w.-]+==)", lock, flags=re.MULTILINE)
    return "".join(part for part in parts if part.partition("==")[0] not in BUILT)


def main() -> int:
    """0 if all resolve, else 1, with the words of pip."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder, "lock.txt")
        texts = [
            REQUIREMENTS.joinpath(name).read_text(encoding="utf-8")
            for name in ("run-cpu.txt", "run-av.txt", "run-openvino.txt")
        ]
        lock.write_text(without_built("".join(texts)), encoding="utf-8")
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--ignore-installed",
            "--quiet",
            "--no-deps",
        ]
        command += [
            "--require-hashes",
            "--only-binary",
            ":all:",
            "--python-version",
            PYTHON_VERSION,
            *platforms,
        ]
        ended = subprocess.run([*command, "--target", folder, "--requirement", str(lock)], check=False)
    if ended.returncode:
        print("arm-wheels: a locked package has no wheel for arm64", file=sys.stderr)
        return 1
    print(f"arm-wheels: every locked package has a wheel for Python {PYTHON_VERSION} on linux/arm64")
    return 0


if __name__ == "__main__":
    sys.exit(main())
