"""The CUDA options of the module with the real provider: it accepts all keys and values.

Without a GPU it reads them all and then fails for lack of a device, so this test runs on any machine.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_check_steps import list_option_sets
from stub_driver import Script, script, stub_folder
from visionedge.engine.device.devices import PROVIDERS
from visionedge.engine.device.session import (
    CUDA_GRAPH_OPTIONS,
    CUDA_MINIMAL_OPTIONS,
    CUDA_OPTIONS,
    KNOWN_OPTIONS,
)

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
    """The error of a session with these options, without the missing device."""

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


@pytest.mark.parametrize("name", list_option_sets("cuda"))
def test_the_provider_accepts_the_option_sets_of_the_gpu_check(script: Script, name: str) -> None:
    script(init=100)
    assert "CUDA failure 100" in words_on(dict(list_option_sets("cuda")[name].options))


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_every_known_option_is_a_name_in_the_library_of_its_provider(device: str) -> None:
    """TensorRT's provider cannot be loaded without TensorRT, so its library is only read."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    library = (Path(spec.origin).parent / f"capi/libonnxruntime_providers_{device}.so").read_bytes()
    assert {
        name for name in KNOWN_OPTIONS[PROVIDERS[device]] if name.encode() + b"\0" not in library
    } == set()


@pytest.mark.parametrize(
    ("name", "value"), [("use_ep_level_unified_streams", "1"), ("arena_extend_strategy", "kSame")]
)
def test_a_misspelt_option_is_named(script: Script, name: str, value: str) -> None:
    """So the test above can fail."""
    script(init=100)
    words = words_on({**CUDA_OPTIONS, name: value})
    assert "CUDA failure" not in words
    assert f'option: "{name}"' in words or f'option "{name}"' in words
