"""The child that asks the driver, against a driver that does what a script says."""

import pytest

from stub_driver import Script, script, stub_folder
from visionedge.ops.doctor.host import ProbeResult, run_probe_child

__all__ = ["script", "stub_folder"]


def ask(limit_s: float = 10) -> ProbeResult:
    return run_probe_child("driver", {"nodes": []}, limit_s)


def test_a_driver_with_a_device_is_queried_completely(script: Script) -> None:
    script(init=0, version=12040, capability=86, free_mib=6000)
    answer = ask()
    assert answer.ended == "fine"
    assert answer.step("library")["path"].endswith("libcuda.so.1")
    assert answer.step("version")["cuda"] == 12040
    assert answer.step("init")["code"] == 0
    device = {"name": "Scripted GPU", "capability": 86, "totalBytes": 2**34}
    assert answer.step("devices")["devices"] == [device]
    memory = answer.step("memory")
    assert (memory["code"], memory["freeBytes"], memory["totalBytes"]) == (0, 6000 * 2**20, 2**34)


@pytest.mark.parametrize("code", [3, 100, 803, 999])
def test_a_driver_that_fails_is_not_queried_further(script: Script, code: int) -> None:
    script(init=code)
    answer = ask()
    assert answer.step("init") == {"step": "init", "code": code, "name": "CUDA_ERROR_BY_SCRIPT"}
    assert "devices" not in answer.steps


def test_a_hanging_driver_leaves_the_steps_so_far(script: Script) -> None:
    script(does="hang")
    answer = ask(limit_s=1)
    assert answer.ended == "late"
    assert answer.step("version")["cuda"] == 12080
    assert "starting" in answer.steps
    assert "init" not in answer.steps


def test_a_crashing_driver_ends_only_the_child(script: Script) -> None:
    script(does="crash")
    answer = ask()
    assert (answer.ended, answer.reason) == ("died", "signal 11")
    assert "starting" in answer.steps
