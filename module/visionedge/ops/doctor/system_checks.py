"""Checks beside the chain to the GPU: packages, memory, disk, clock, gateway, workload socket, HTTP, cameras.

A check evaluates the facts and reads nothing itself.
"""

import re
from dataclasses import replace
from email.utils import parsedate_to_datetime

from visionedge.engine.device.devices import REMEDIES, ReasonCode
from visionedge.engine.device.remote import ServerExamination
from visionedge.ops.doctor.checks import Check, CheckResult, Remedies, broken, info, ok, remedy, warning
from visionedge.ops.doctor.facts import NOT_DOWNLOADED, HostFacts
from visionedge.ops.doctor.remedies import RESTART_VM_COMMANDS, set_eflow_vm_command
from visionedge.ops.support_dates import find_support
from visionedge.runtime.memory_requirement import recommend_memory_mib
from visionedge.runtime.redaction import redact

_MIB, _GIB = 2**20, 2**30

# IoT Edge's agent and hub need memory too; EFLOW's default of 1024 MiB is too little.
_EDGE_MIB = 768
_MIN_AVAILABLE_MIB = 256
# The spool may take 256 MB, and compiled models, plans and TensorRT engines need space too.
_LOW_DISK_MIB, _MIN_DISK_MIB = 1024, 128
# The GPU image is 4 GB unpacked, twice during an update, beside the images of IoT Edge and the download.
_MIN_EFLOW_DISK_GIB = 16
_LARGE_SKEW_S, _TOKEN_SKEW_S = 60.0, 300.0
_DAY_S = 86400.0
_MARINER = re.compile(r"\.cm\d", re.IGNORECASE)


def run_system_checks(facts: HostFacts) -> tuple[CheckResult, ...]:
    """Run the checks that apply to this machine, then one for each server, model and camera."""
    results = [result for check in SYSTEM_CHECKS if (result := check.run(facts)) is not None]
    results += [replace(_server(each), name="remote", title="server") for each in facts.servers]
    results += [
        replace(_model(error), name="model", title=f"model {name}".rstrip())
        for name, error in facts.models.items()
    ]
    results += [
        replace(_camera(facts, name, state), name="camera", title=f"camera {name}")
        for name, state in facts.cameras.items()
    ]
    return tuple(results)


def _packages(facts: HostFacts) -> CheckResult:
    wheel = facts.wheel
    if wheel.others:
        every = ", ".join(sorted({wheel.package, *wheel.others}))
        instruction = "uninstall all of them, then install one"
        return broken(f"{every} share one folder; {wheel.package} was installed last", *remedy(instruction))
    if not wheel.package:
        return broken("onnxruntime is not installed", *remedy("install it", "pip install '.[cpu]'"))
    return ok(f"{wheel.name}, no other onnxruntime")


def _intel_gpu(facts: HostFacts) -> CheckResult | None:
    """An Intel GPU while the chain to an NVIDIA GPU is shown."""
    if facts.concerns_intel or not facts.environment.sees_intel:
        return None
    return info("there is one; inference.device: openvino-gpu uses it by OpenVINO")


def _last_start(facts: HostFacts) -> CheckResult | None:
    if facts.last_start is None:
        return None
    at, changes = facts.last_start
    return info(f"changed since {at}: {changes}") if changes else ok(f"nothing changed since {at}")


def _cpu_quota(facts: HostFacts) -> CheckResult | None:
    quota = facts.cpu_quota
    if quota is None or quota >= facts.cores:
        return None
    text = f"{quota:.3g} of {facts.cores} cores, limited by the control group of this process"
    if quota >= 1:
        return info(text)
    where = (
        "HostConfig.NanoCpus" if facts.environment.module else "docker run --cpus, or CPUQuota= of systemd"
    )
    return warning(
        f"{text}: decoding and inference slow each other down", *remedy(f"raise the quota ({where})")
    )


def _memory(facts: HostFacts) -> CheckResult:
    total, available = facts.memory.total_bytes // _MIB, facts.memory.available_bytes // _MIB
    if not total:
        return info("unknown")
    limit = " (the limit of this container)" if facts.memory.limited else ""
    text = f"{total} MiB{limit}, {available} available"
    config = facts.request.config
    wanted = recommend_memory_mib(gpu=facts.wheel.cuda > 0, more_models=len(config.models) if config else 0)
    if facts.environment.edge != "no" and not facts.memory.limited:
        wanted += _EDGE_MIB
    if total < wanted * 0.9:  # a VM of 4096 MiB reports less
        return warning(f"{text}: {wanted} MiB are recommended", *_more_memory(facts))
    if available < _MIN_AVAILABLE_MIB:
        return warning(f"{text}: too little is available", *remedy("stop other programs, or add memory"))
    return ok(text)


def _more_memory(facts: HostFacts) -> Remedies:
    if facts.memory.limited:
        return remedy("raise the limit of this container (HostConfig.Memory)")
    if facts.environment.kernel != "eflow":
        return remedy("add memory to this machine")
    passthrough = {"dda": "DirectDeviceAssignment", "gpu-pv": "ParaVirtualization"}.get(
        facts.environment.passthrough
    )
    if passthrough is None:
        line = set_eflow_vm_command("none", facts.cores, facts.memory.total_bytes).replace(
            ' -gpuName "NAME OF THE GPU"', ""
        )
    else:
        line = set_eflow_vm_command(passthrough, facts.cores, facts.memory.total_bytes, _gpu_name(facts))
    return remedy("on Windows; omitted options are reset, the GPU included", line)


def _gpu_name(facts: HostFacts) -> str:
    devices = facts.probed.driver.step("devices").get("devices", [])
    return str(devices[0]["name"]) if devices else "NAME OF THE GPU"


def _disk(facts: HostFacts) -> CheckResult:
    data = facts.request.data
    if facts.space is None:
        return info(f"{data}: unknown")
    free, total = facts.space.free_bytes, facts.space.total_bytes
    text = f"{data}: {free // _MIB} of {total // _MIB} MiB free"
    if not facts.writable:
        return broken(f"{text}, but user {facts.uid} cannot write there", *_fix_data_folder(facts))
    if free < _MIN_DISK_MIB * _MIB:
        return broken(f"{text}: too little to store anything", *_free_disk_space(facts))
    if free < _LOW_DISK_MIB * _MIB:
        return warning(
            f"{text}: the spool and compiled models need {_LOW_DISK_MIB}", *_free_disk_space(facts)
        )
    if facts.environment.kernel == "eflow" and facts.wheel.cuda and total < _MIN_EFLOW_DISK_GIB * _GIB:
        instruction = "the disk size of an EFLOW VM is set when it is deployed (default 10 GB)"
        line = "Deploy-Eflow -vmDataSize 20 …"
        return warning(
            f"{text}: an update of the GPU image needs {_MIN_EFLOW_DISK_GIB} GiB in total",
            *remedy(instruction, line),
        )
    return ok(text)


def _fix_data_folder(facts: HostFacts) -> Remedies:
    if facts.environment.container:
        return remedy(
            "on the host, make this user the owner of the folder that is mounted there",
            f"chown {facts.uid}:{facts.uid} …",
        )
    return remedy("use a folder that you can write to", "VISIONEDGE_DATA=… visionedge run")


def _free_disk_space(facts: HostFacts) -> Remedies:
    return remedy("remove unused images" if facts.environment.container else "free disk space")


def _clock(facts: HostFacts) -> CheckResult:
    if facts.now_s < facts.newest_file_s - _DAY_S:
        days = (facts.newest_file_s - facts.now_s) / _DAY_S
        return broken(f"{days:.0f} days behind the files of this installation", *_set_clock(facts))
    kept = facts.probed.clock.step("kernel").get("synchronised")
    text = (
        "synchronisation unknown"
        if kept is None
        else "synchronised by NTP"
        if kept
        else "not synchronised by NTP"
    )
    skew_s = _skew_s(facts)
    if skew_s is None:
        return info(text)
    text = f"{skew_s:+.0f} s compared to the IoT hub, {text}"
    if abs(skew_s) > _TOKEN_SKEW_S:
        return broken(f"{text}: the IoT hub refuses tokens of this module", *_set_clock(facts))
    return warning(text, *_set_clock(facts)) if abs(skew_s) > _LARGE_SKEW_S else ok(text)


def _skew_s(facts: HostFacts) -> float | None:
    """This clock minus the IoT hub's, in s; None if the hub did not answer."""
    try:
        date = parsedate_to_datetime(facts.probed.network.step("date")["date"])
    except (KeyError, TypeError, ValueError):
        return None
    return facts.now_s - date.timestamp()


def _set_clock(facts: HostFacts) -> Remedies:
    if facts.environment.kernel == "eflow":
        return remedy("the clock of the VM stops while Windows sleeps: restart the VM", *RESTART_VM_COMMANDS)
    where = "on the host, " if facts.environment.container else ""
    return remedy(f"{where}synchronise the clock by NTP", "timedatectl set-ntp true")


def _gateway(facts: HostFacts) -> CheckResult | None:
    name = facts.environ.get("IOTEDGE_GATEWAYHOSTNAME", "")
    if facts.environment.edge != "edge":
        return None
    step = facts.probed.network.step(f"resolve:{name}")
    if addresses := step.get("addresses"):
        return ok(f"{name} resolves to {', '.join(addresses)}")
    why = step.get("error") or facts.probed.network.reason or "no answer"
    options = '{"NetworkingConfig":{"EndpointsConfig":{"azure-iot-edge":{}}}}'
    return broken(
        f"{name} cannot be resolved: {why}",
        *remedy(
            "edgeHub must run, and the module must be on its network; if createOptions name a network, add",
            options,
        ),
    )


def _workload(facts: HostFacts) -> CheckResult | None:
    uri = facts.environ.get("IOTEDGE_WORKLOADURI", "")
    if facts.environment.edge != "edge":
        return None
    if not facts.socket:
        return ok(uri)
    if "Permission denied" in facts.socket:
        instruction = (
            "edgeAgent creates the socket with mode 0666: restore that mode, or run the module as root"
        )
        return broken(f"user {facts.uid} cannot open it: {facts.socket}", *remedy(instruction))
    return broken(
        facts.socket, *remedy("restart the module: edgeAgent mounts the socket when it creates the container")
    )


def _eflow_support(facts: HostFacts) -> CheckResult | None:
    """A module cannot read the version of EFLOW; the kernel tells Mariner from Azure Linux 3."""
    ended = find_support("EFLOW", "1.5")
    if facts.environment.kernel != "eflow" or ended is None:
        return None
    if _MARINER.search(facts.environment.release):
        found = (
            f"Mariner: EFLOW 1.5 or older, which {ended.describe()}; IoT Edge 1.6 does not support Mariner"
        )
        return warning(found, *remedy(ended.remedy))
    return info(f"EFLOW 1.5 {ended.describe()}; Windows lists the installed version among its apps")


def _http(facts: HostFacts) -> CheckResult | None:
    http = facts.request.config.http if facts.request.config else None
    if http is None or not http.is_open:
        return None
    return warning(
        f"listens on {http.host}:{http.port} without a token (http.allowAnonymous): every machine that"
        " reaches it can read pictures, status and log",
        *remedy("set http.token (or VISIONEDGE_HTTP_TOKEN), or listen on 127.0.0.1"),
    )


def _server(server: ServerExamination) -> CheckResult:
    if server.verdict.code is ReasonCode.OK:
        return ok(f"{server.url}: {server.found}; pictures leave this device")
    return broken(f"{server.url}: {server.found}", *remedy(REMEDIES[server.verdict.code]))


def _model(state: str) -> CheckResult:
    """`state` is that of `HostFacts.models`."""
    if state == NOT_DOWNLOADED:
        return info("is not downloaded yet; `visionedge run` does it")
    if not state:
        return ok("can be read")
    return broken(state, *remedy("correct its path; in a container bind the folder of the file"))


def _camera(facts: HostFacts, name: str, state: str) -> CheckResult:
    """`state` is that of `HostFacts.cameras`."""
    if state == "disabled":
        return info("disabled")
    if state != "network":
        if not state:
            return ok("can be read")
        denied = (
            remedy("add the group of the device to the container (HostConfig.GroupAdd)")
            if "Permission" in state
            else ()
        )
        return broken(state, *denied)
    step = facts.probed.network.step(f"reach:{name}")
    if step.get("reached"):
        return ok("reachable at its port")
    reason = step.get("error") or facts.probed.network.reason or "no answer"
    return broken(
        redact(f"cannot be reached: {reason}"), *remedy("check its address, its power and the network")
    )


SYSTEM_CHECKS = (
    Check("last-start", "last good start", _last_start),
    Check("packages", "packages", _packages),
    Check("intel-gpu", "Intel GPU", _intel_gpu),
    Check("cpu-quota", "CPU quota", _cpu_quota),
    Check("memory", "memory", _memory),
    Check("disk", "disk", _disk),
    Check("clock", "clock", _clock),
    Check("gateway", "gateway", _gateway),
    Check("workload-socket", "workload socket", _workload),
    Check("eflow-support", "EFLOW", _eflow_support),
    Check("http", "HTTP", _http),
)
"""All checks beside the chain and the cameras, in order."""
