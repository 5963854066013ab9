"""Our CUDA options before the real provider: it knows every one of them and takes every value.

Without a GPU it reads them all and then fails over the device, which is how it can be asked on any machine.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from stub_driver import Script, script, stub_folder
from visionedge.engine.device.session import CUDA_GRAPH_OPTIONS, CUDA_MINIMAL_OPTIONS, CUDA_OPTIONS

__all__ = ["script", "stub_folder"]

# A hyphen is no part of a Python name.
pytestmark = [
    getattr(pytest.mark, "cuda-libs"),
    pytest.mark.skipif(
        importlib.util.find_spec("nvidia") is None,
        reason="NVIDIA's libraries are not installed here; `make test-gpu-libs` does it",
    ),
]

ASK = """
import json, sys
import onnx
from visionedge.engine.device.probe import _make_tiny_model
from visionedge.runtime.ort import import_onnxruntime, load_cuda_libraries
onnxruntime = import_onnxruntime()
load_cuda_libraries(onnxruntime)
try:
    providers = [("CUDAExecutionProvider", json.loads(sys.argv[1]))]
    onnxruntime.InferenceSession(_make_tiny_model(), providers=providers, enable_fallback=0)
except Exception as error:
    print(error)
"""


def words_on(options: dict[str, str]) -> str:
    """What a session says to these options; the device, which is looked for at once, is left out."""

    given = {name: value for name, value in options.items() if name != "device_id"}
    module = Path(__file__).resolve().parents[3] / "module"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(module)!r})\n{ASK}", json.dumps(given)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return done.stdout


@pytest.mark.parametrize(
    "options", [CUDA_OPTIONS, CUDA_GRAPH_OPTIONS, CUDA_MINIMAL_OPTIONS], ids=["all", "graphs", "least"]
)
def test_the_provider_accepts_all_options_and_fails_only_without_a_device(
    script: Script, options: dict[str, str]
) -> None:
    script(init=100)
    assert "CUDA failure 100" in words_on(options)


@pytest.mark.parametrize(
    ("name", "value"), [("use_ep_level_unified_streams", "1"), ("arena_extend_strategy", "kSame")]
)
def test_a_misspelt_option_is_named(script: Script, name: str, value: str) -> None:
    """So the test above can fail."""
    script(init=100)
    words = words_on({**CUDA_OPTIONS, name: value})
    assert "CUDA failure" not in words
    assert f'option: "{name}"' in words or f'option "{name}"' in words
