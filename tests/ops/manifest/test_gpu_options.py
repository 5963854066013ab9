"""`visionedge manifest lint` and the GPU: whether image, passthrough and configuration belong together."""

from typing import Any

import pytest

from manifests import (
    HOST,
    IN_MODULE,
    IN_OPTIONS,
    MODULE,
    VISION,
    change,
    finding_places,
    fresh_known_secrets,
    lint,
    valid_manifest,
    value_at,
)
from visionedge.ops.manifest.gpu_options import classify_image

__all__ = ["fresh_known_secrets"]

GPU_REQUESTS = [{"Count": -1, "Capabilities": [["gpu"]]}]


@pytest.mark.parametrize("gpu", ["dda", "gpu-pv", "gpu-pv-by-hand"])
def test_gpu_options_must_fit_the_image(gpu: str) -> None:
    """The finding names the fitting image; a CPU image with GPU options is a warning, and vice versa."""
    manifest = valid_manifest(gpu)
    report = lint(manifest)
    assert report.findings == ()
    assert ("by hand" in report.modules["vision"]) == (gpu == "gpu-pv-by-hand")
    value_at(manifest, MODULE)["settings"]["image"] = "registry.example.com/visionedge:1.0-cpu"
    (finding,) = lint(manifest).findings
    assert "cannot use" in finding.problem
    bare = change(
        valid_manifest("none"), (*MODULE, "settings", "image"), "registry.example.com/visionedge:1.0-gpu"
    )
    value_at(bare, VISION)["inference"]["device"] = "auto"
    (finding,) = lint(bare).findings
    assert '{"HostConfig":{"DeviceRequests":[{"Count":-1,"Capabilities":[["gpu"]]}]}}' in finding.remedy


@pytest.mark.parametrize(
    ("gpu", "path", "value", "place", "word"),
    [
        (
            "dda",
            "DeviceRequests",
            [{"Count": -1, "Capabilities": ["gpu"]}],
            "DeviceRequests[0].Capabilities",
            "double",
        ),
        (
            "dda",
            "DeviceRequests",
            [{"Count": 1, "DeviceIDs": ["0"], "Capabilities": [["gpu"]]}],
            "DeviceRequests[0]",
            "both",
        ),
        ("dda", "DeviceRequests", [{"Capabilities": [["gpu"]]}], "DeviceRequests[0]", '"Count": -1'),
        ("dda", "Devices", [{"PathOnHost": "/dev/dxg"}], "Devices[0]", "does the same"),
        ("none", "Devices", [{"PathOnHost": "/dev/nvidia0"}], "Devices[0]", "device nodes alone"),
        ("gpu-pv-by-hand", "Devices", [], "Binds[0]", "but not /dev/dxg"),
        ("gpu-pv-by-hand", "Binds", ["d:/data"], "Devices[0]", "but not its libraries"),
        (
            "gpu-pv-by-hand",
            "Binds",
            ["d:/data", "/usr/lib/wsl/lib:/usr/lib/wsl/lib:ro"],
            "Binds[1]",
            "load others from drivers",
        ),
    ],
)
def test_incomplete_gpu_options_are_reported(gpu: str, path: str, value: Any, place: str, word: str) -> None:
    """Every one of these starts, or not, in its own puzzling way."""
    report = lint(change(valid_manifest(gpu), (*HOST, path), value))
    found = [f for f in report.findings if f.path == f"{IN_OPTIONS}.HostConfig.{place}"]
    assert any(word in finding.line() for finding in found), [f.line() for f in report.findings]


def openvino_manifest() -> Any:
    """A module for an Intel GPU on Linux."""
    manifest = valid_manifest("dri", device="openvino-gpu", render_group="992")
    return change(manifest, (*MODULE, "settings", "image"), "registry.example.com/visionedge:1.0-cpu")


def test_a_render_node_is_a_gpu_of_intel_or_amd_and_needs_no_nvidia_runtime() -> None:
    report = lint(openvino_manifest())
    assert report.findings == ()
    assert report.modules["vision"].startswith("a GPU of Intel or AMD by its render node")


@pytest.mark.parametrize(
    ("path", "value", "problem", "remedy"),
    [
        ((*HOST, "Devices"), [], "passes no Intel GPU", "/dev/dxg"),
        ((*HOST, "GroupAdd"), [], "gives the module no group", "stat -c %g"),
        ((*HOST, "DeviceRequests"), GPU_REQUESTS, "requests a GPU from the NVIDIA runtime", "remove"),
        ((*MODULE, "settings", "image"), "visionedge:1.0-gpu", "has no OpenVINO", "WITH_OPENVINO=1"),
    ],
)
def test_what_an_intel_gpu_lacks_is_reported(
    path: tuple[str, ...], value: Any, problem: str, remedy: str
) -> None:
    findings = lint(change(openvino_manifest(), path, value)).findings
    (found,) = (finding for finding in findings if problem in finding.problem)
    assert remedy in found.remedy
    assert found.severity == "warning"


def test_root_needs_no_group_for_a_render_node() -> None:
    manifest = change(openvino_manifest(), (*HOST, "GroupAdd"), [])
    manifest = change(manifest, (*MODULE, "settings", "createOptions", "User"), "0:0")
    assert not [finding for finding in lint(manifest).findings if "no group" in finding.problem]


def test_a_missing_library_path_for_gpu_pv_is_reported() -> None:
    """LD_LIBRARY_PATH of the deployment wins over that of the image."""
    manifest = valid_manifest("gpu-pv-by-hand")
    value_at(manifest, MODULE)["env"] = {"LD_LIBRARY_PATH": {"value": "/usr/local/lib"}}
    assert finding_places(lint(manifest)) == {("warning", f"{IN_MODULE}.env.LD_LIBRARY_PATH.value")}


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        ("registry.example.com/visionedge:1.0-gpu", "gpu"),
        ("registry.example.com/visionedge-cpu:1.0", "cpu"),
        ("gpu.example.com/visionedge:1.0", ""),
        ("visionedge:cuda12", "gpu"),
        ("${MODULES.vision.amd64.cpu}", "cpu"),
        ("visionedge:cpu-and-gpu", ""),
        ("visionedge:gpus", ""),
        ("", ""),
    ],
)
def test_the_kind_of_an_image_is_recognised_by_its_name(image: str, kind: str) -> None:
    """In its own name, tag or platform; not in that of the registry."""
    assert classify_image(image) == kind


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NVIDIA_VISIBLE_DEVICES", "none"),
        ("NVIDIA_VISIBLE_DEVICES", ""),
        ("NVIDIA_DRIVER_CAPABILITIES", "utility"),
    ],
)
def test_variables_that_hide_the_gpu_are_reported(name: str, value: str) -> None:
    """At any place and for any image."""
    manifest = change(valid_manifest("dda"), (*MODULE, "env"), {name: {"value": value}})
    assert finding_places(lint(manifest)) == {("warning", f"{IN_MODULE}.env.{name}.value")}
    manifest = change(
        valid_manifest("dda"), (*MODULE, "settings", "createOptions", "Env"), [f"{name}={value}"]
    )
    assert finding_places(lint(manifest)) == {("warning", f"{IN_OPTIONS}.Env[0]")}


@pytest.mark.parametrize("key", ["DeviceRequests", "Devices", "Mounts", "Binds"])
@pytest.mark.parametrize("value", ["gpu", {"Count": -1}, [5], 1])
def test_docker_lists_must_be_lists(key: str, value: Any) -> None:
    """Docker refuses anything else, when the module is created."""
    report = lint(change(valid_manifest("dda"), (*HOST, key), value))
    place = f"{IN_OPTIONS}.HostConfig.{key}" + ("[0]" if isinstance(value, list) else "")
    assert ("error", place) in finding_places(report)
