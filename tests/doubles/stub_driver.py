"""A scripted NVIDIA driver (`stub_libcuda.c`), compiled by the tests."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Script = Callable[..., None]
"""Scripts the driver for every child from now on: ``script(init=100, version=12080)``."""


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `libcuda.so.1` in it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here to build the scripted driver with")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("stub_libcuda.c")
    options = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *options, "-o", str(folder / "libcuda.so.1"), str(source)], check=True)
    return folder


@pytest.fixture
def script(stub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Puts the driver into the library path of every child; see `Script`."""
    paths = [str(stub_folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join(paths))

    def scripted(**answers: object) -> None:
        for name, value in answers.items():
            monkeypatch.setenv(f"STUB_{name.upper()}", str(value))

    return scripted
