"""Print the files whose code one frame runs through, from the camera to IoT Hub.

The module runs on a video inside the stand-in for IoT Edge. Each process records which of its files run,
thread by thread, from 2 s after its first batch, for 8 s: what happens once at the start or the end does not
count. Of the main thread only what handles a result counts; what camera, lane, spool and hub threads do
counts whole, and so does the engine's process.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "module" / "visionedge"
MAX_FILES = 35
_SECONDS = 40
_THREADS = ("MainThread", "camera:", "source:", "lane:", "hub:", "spool", "engine")

_HOOK = """
import json, os, sys, threading, time
FOLDER, PACKAGE = os.environ.get("PYTHONTRACEFRAME"), {package!r}
IN_ENGINE = "visionedge.engine.process.server" in sys.orig_argv
if FOLDER:
    begin, seen = [None], {{}}
    def handles_result(frame):
        if frame.f_code.co_name in ("drain_queue", "_handle_item"):
            return True
        while frame is not None:
            if frame.f_code.co_name == "offer":
                return True
            frame = frame.f_back
        return False
    def profile(frame, event, argument):
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        file, thread, now = frame.f_code.co_filename, threading.current_thread().name, time.monotonic()
        if begin[0] is None and frame.f_code.co_name in ("_infer", "_answer"):
            begin[0] = now + 2
        if begin[0] is None or not begin[0] <= now < begin[0] + 8:
            return
        files = seen.setdefault(thread, {{}})
        if file in files or thread == "MainThread" and not IN_ENGINE and not handles_result(frame):
            return
        files[file] = frame.f_code.co_name
        with open(os.path.join(FOLDER, f"{{os.getpid()}}.json"), "w") as out:
            json.dump(seen, out)
    threading.setprofile(profile)
    sys.setprofile(profile)
"""
"""Runs at the start of every Python that finds it; an engine's process inherits PYTHON… variables."""


def main() -> int:
    """0 when a frame runs through `MAX_FILES` files at most."""
    with tempfile.TemporaryDirectory() as folder:
        files = _record(Path(folder))
    for name in sorted(files):
        print(name)
    print(f"{len(files)} files, {MAX_FILES} at most")
    return 0 if 0 < len(files) <= MAX_FILES else 1


def _record(folder: Path) -> set[str]:
    (folder / "sitecustomize.py").write_text(_HOOK.format(package=f"{PACKAGE}/"))
    path = os.pathsep.join([str(folder), str(REPOSITORY / "module"), str(REPOSITORY / "tests" / "doubles")])
    variables = {"PYTHONPATH": path, "PYTHONTRACEFRAME": str(folder), "VISIONEDGE_DATA": str(folder / "data")}
    video = REPOSITORY / "media" / "demo.mp4"
    words = ["run", "--camera", f"door={video}", "--http", "127.0.0.1:0", "--device", "cpu"]
    subprocess.run(
        [sys.executable, "-m", "edge_runtime", *words, "--duration", str(_SECONDS)],
        env={**os.environ, **variables},
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=300,
    )
    threads = [
        each for record in folder.glob("[0-9]*.json") for each in json.loads(record.read_text()).items()
    ]
    return {
        Path(file).relative_to(PACKAGE).as_posix()
        for thread, files in threads
        if thread.startswith(_THREADS)
        for file in files
    }


if __name__ == "__main__":
    sys.exit(main())
