"""Makes `.venv` hold what `make run` or `make test` needs: `prepare.py run` or `prepare.py dev`.

Everything comes from the locked, hashed files in requirements/, with pip alone. The second time nothing is
to do, which a small record inside `.venv` tells (`RECORD`), so it takes no time and no network.

onnxruntime (extra `cpu`) and onnxruntime-gpu (extra `gpu`) own the same folder and must never meet, so what
belongs to the other extra is removed first. The extra is `gpu` where a usable NVIDIA device is present, else
`cpu`; VISIONEDGE_EXTRA=cpu|gpu decides otherwise.

`run` installs PyAV too, the decoder of the images, so that cameras are read alike whatever was installed
before; VISIONEDGE_WITH_AV=0 (or WITH_PYAV=0, as the images call it) leaves it out, and takes it out where it
is. `dev` always has it: it makes the clips of the tests.

OpenVINO, the second runtime, is part of `dev`; VISIONEDGE_WITH_OPENVINO=1 installs it for `run` too. Its
dependency openvino-telemetry is left out.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

from gpu_present import usable_device

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / os.environ.get("VISIONEDGE_VENV", ".venv")
RECORD = VENV / "visionedge-setup.json"
LOCKS = ROOT / "requirements"
AV_LOCK = LOCKS / "run-av.txt"
OPENVINO_LOCK = LOCKS / "run-openvino.txt"
EXTRAS = ("cpu", "gpu")
KINDS = ("run", "dev")  # dev holds all of run
LARGE_MB = 10.0  # downloads from this size on get a line of their own


class SetupError(Exception):
    """Set-up cannot go on; the text is one line for people and names the remedy."""


def prepare(kind: str) -> None:
    """Bring `.venv` up to date for `kind`; quick when it is already."""
    extra, reason = chosen_extra()
    with_av = kind == "dev" or av_is_wanted()
    openvino = openvino_is_wanted()
    wanted = {
        one: digest(one, extra, with_av=with_av, with_openvino=openvino)
        for one in KINDS[: KINDS.index(kind) + 1]
    }
    if recorded().get(kind) == wanted[kind] and working():
        return
    say(f"setting up .venv for '{kind}' with the extra '{extra}' ({reason})")
    if not working() or recorded().get("root") != str(ROOT):
        make_venv()
    RECORD.write_text(json.dumps({"root": str(ROOT)}))  # what breaks off half-way is no set-up
    remove_others(extra)
    if not with_av and "av" in installed_names():
        say("removing PyAV, as VISIONEDGE_WITH_AV=0 says: OpenCV decodes everything")
        run_pip(["uninstall", "--yes", "av"])
    install("what building needs", "--requirement", LOCKS / "build.txt")
    install(f"{kind}-{extra}.txt", "--no-build-isolation", "--requirement", LOCKS / f"{kind}-{extra}.txt")
    if with_av:
        install("PyAV, the decoder", "--no-deps", "--requirement", AV_LOCK)
    if openvino or kind == "dev":
        install("OpenVINO, the second runtime", "--no-deps", "--requirement", OPENVINO_LOCK)
    install("visionedge itself", "--no-build-isolation", "--no-deps", "--editable", ROOT)
    RECORD.write_text(json.dumps({"root": str(ROOT), "extra": extra, **wanted}, indent=1) + "\n")
    say("set-up done")


def chosen_extra() -> tuple[str, str]:
    """The extra to install and why."""
    named = os.environ.get("VISIONEDGE_EXTRA", "")
    if named in EXTRAS:
        return named, "as VISIONEDGE_EXTRA says"
    if named:
        raise SetupError(f"VISIONEDGE_EXTRA is '{named}': make it cpu or gpu, or leave it out")
    usable, reason = usable_device()
    return ("gpu" if usable else "cpu"), reason


def av_is_wanted() -> bool:
    """Whether `run` decodes with PyAV, as the images do."""
    named = os.environ.get("VISIONEDGE_WITH_AV") or os.environ.get("WITH_PYAV") or "1"
    if named not in ("0", "1"):
        raise SetupError(f"VISIONEDGE_WITH_AV is '{named}': make it 0 (without PyAV) or 1, or leave it out")
    return named == "1"


def openvino_is_wanted() -> bool:
    """Whether `run` has the second runtime; one that is there already stays."""
    named = os.environ.get("VISIONEDGE_WITH_OPENVINO") or os.environ.get("WITH_OPENVINO") or "0"
    if named not in ("0", "1"):
        raise SetupError(
            f"VISIONEDGE_WITH_OPENVINO is '{named}': make it 1 (with OpenVINO) or 0, or leave it out"
        )
    return named == "1"


def digest(kind: str, extra: str, *, with_av: bool = True, with_openvino: bool = False) -> str:
    """A name for what an up-to-date `.venv` holds: it changes when a lock or pyproject.toml does."""
    text = hashlib.sha256(f"{ROOT} {kind} {extra} {with_av} {with_openvino}".encode())
    for file in (
        LOCKS / "build.txt",
        AV_LOCK,
        OPENVINO_LOCK,
        LOCKS / f"{kind}-{extra}.txt",
        ROOT / "pyproject.toml",
    ):
        text.update(file.read_bytes())
    return text.hexdigest()


def recorded() -> dict[str, str]:
    """What the last finished set-up wrote down; empty when there was none."""
    try:
        record: dict[str, str] = json.loads(RECORD.read_text())
    except (OSError, ValueError):
        return {}
    return record


def working() -> bool:
    """Whether `.venv` has an interpreter that is there (a system upgrade can take it away) and new enough."""
    python = VENV / "bin" / "python"
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    return python.exists() and subprocess.run([python, "-I", "-c", check], check=False).returncode == 0


def make_venv() -> None:
    """A fresh `.venv`; where Debian's python3-venv is missing, the outer pip will fill it."""
    if importlib.util.find_spec("venv") is None or not (_has("ensurepip") or _has("pip")):
        raise SetupError(
            "this Python can make no virtual environment; on Debian: apt-get install python3-venv"
        )
    shutil.rmtree(VENV, ignore_errors=True)
    options = [] if _has("ensurepip") else ["--without-pip"]
    made = subprocess.run(
        [sys.executable, "-m", "venv", *options, VENV], check=False, capture_output=True, text=True
    )
    if made.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SetupError(f"'{sys.executable} -m venv' failed: {(made.stdout + made.stderr).strip()}")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def remove_others(extra: str) -> None:
    """Uninstall what only the other extra brings, and everything named onnxruntime if both are there."""
    other = EXTRAS[1 - EXTRAS.index(extra)]
    foreign = locked_names(other) - locked_names(extra)
    present = installed_names()
    unwanted = sorted(foreign & present)
    if unwanted:
        runtimes = {"onnxruntime", "onnxruntime-gpu"} & present
        say(f"removing what the extra '{other}' brought: {', '.join(unwanted)}")
        run_pip(["uninstall", "--yes", *sorted({*unwanted, *runtimes})])


def locked_names(extra: str) -> set[str]:
    """The packages of the run lock of `extra`, in their normal spelling."""
    lock = (LOCKS / f"run-{extra}.txt").read_text()
    return {normal(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", lock, re.MULTILINE)}


def installed_names() -> set[str]:
    """The packages that `.venv` holds, in their normal spelling."""
    found = VENV.glob("lib/python*/site-packages/*.dist-info")
    return {normal(folder.name.removesuffix(".dist-info").rsplit("-", 1)[0]) for folder in found}


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def install(what: str, *arguments: str | Path) -> None:
    """One `pip install`, with a line of its own and one for every large download."""
    say(f"installing {what}")
    hashed = [] if "--editable" in arguments else ["--require-hashes"]
    # Wheels only, so no compiler is needed; paho-mqtt 1.6.1 was never published as one.
    wheels = ["--only-binary", ":all:", "--no-binary", "paho-mqtt"]
    run_pip(["install", *hashed, *wheels, *map(str, arguments)])


def how_to_call() -> str:
    """Where the command is that docs call `visionedge`."""
    folder = VENV.relative_to(ROOT) if VENV.is_relative_to(ROOT) else VENV
    return f"the command is {folder}/bin/visionedge; `source {folder}/bin/activate` makes it `visionedge`"


def run_pip(arguments: list[str]) -> None:
    """Run pip on `.venv`; raises SetupError after showing pip's last lines."""
    inside = VENV / "bin" / "python"
    outside = [sys.executable, "-m", "pip", "--python", str(inside)]
    pip = outside if not (VENV / "bin" / "pip").exists() else [str(inside), "-m", "pip"]
    tail: deque[str] = deque(maxlen=15)
    with subprocess.Popen(
        [*pip, *arguments, *(["--progress-bar", "off"] if arguments[0] == "install" else [])],
        cwd=ROOT,
        env=pip_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            show(line)
    if process.returncode:
        print("\n".join(tail), file=sys.stderr)
        raise SetupError(
            f"pip {arguments[0]} failed, its own words are above (a first set-up needs the package registry)"
        )


def pip_environment() -> dict[str, str]:
    """The environment for pip: the user's settings (mirrors, certificates), less what would mislead it."""
    misleading = {
        "PYTHONPATH",
        "PYTHONHOME",
        "PIP_USER",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_REQUIRE_VIRTUALENV",
    }
    kept = {name: value for name, value in os.environ.items() if name not in misleading}
    return {**kept, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def show(line: str) -> None:
    """Say what a line of pip's output tells, if it tells a person something."""
    if match := re.match(r"\s+Downloading (\S+?)-\d\S* \(([\d.]+) (MB|GB)\)", line):
        size_mb = float(match[2]) * (1000 if match[3] == "GB" else 1)
        if size_mb >= LARGE_MB:
            say(f"  downloading {Path(match[1]).name.replace('_', '-')}, {size_mb:.0f} MB")
    elif line.startswith("Installing collected packages:"):
        say(f"  unpacking {line.count(',') + 1} package(s)")


def say(text: str) -> None:
    """Progress goes to stderr: stdout belongs to the command that follows."""
    print(f"visionedge: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """The command; one set-up at a time in a clone."""
    if len(arguments) != 1 or arguments[0] not in KINDS:
        say(f"usage: prepare.py {'|'.join(KINDS)}")
        return 2
    with (ROOT / "pyproject.toml").open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        try:
            prepare(arguments[0])
            if arguments[0] == "run":
                say(how_to_call())
        except SetupError as error:
            say(f"error: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
