"""What else has to be right: memory, disk, clock, packages, the gateway, the workload socket, the cameras."""

from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from visionedge.ops.doctor.facts import HostFacts
from visionedge.ops.doctor.host import (
    CheckOutcome,
    CheckResult,
    Remedies,
    broken,
    info,
    ok,
    one_remedy,
    warning,
)
from visionedge.ops.doctor.passthrough import RESTART_VM_COMMANDS, set_eflow_vm_command
from visionedge.runtime.redaction import redact

_MIB, _GIB = 2**20, 2**30

# One module with a few cameras takes 200 to 400 MiB on the CPU; CUDA and cuDNN map and keep GiBs more.
# Where IoT Edge runs as well, its agent and hub want theirs; 1024, what EFLOW gives by itself, is too little.
_RECOMMENDED_MIB = {False: 768, True: 4096}
_EDGE_MIB = 768
_MIN_AVAILABLE_MIB = 256
# The spool may take 256 MB; compiled models, plans and TensorRT's engines come on top.
_LOW_DISK_MIB, _MIN_DISK_MIB = 1024, 128
# The GPU image is 4 GB unpacked, twice during an update, beside the images of IoT Edge and what is pulled.
_MIN_EFLOW_DISK_GIB = 16
_LARGE_SKEW_S, _TOKEN_SKEW_S = 60.0, 300.0
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class SystemCheck:
    """One thing beside the chain; `check` gives None where it has no meaning here."""

    name: str
    title: str
    check: Callable[[HostFacts], CheckOutcome | None]


def run_system_checks(facts: HostFacts) -> tuple[CheckResult, ...]:
    """Judge everything beside the chain, cameras last."""
    outcomes = [
        (system_check.name, system_check.title, system_check.check(facts)) for system_check in SYSTEM_CHECKS
    ]
    outcomes += [
        ("camera", f"camera {name}", _camera(facts, name, why)) for name, why in facts.cameras.items()
    ]
    return tuple(
        CheckResult(name, title, outcome.state, outcome.found, outcome.remedies)
        for name, title, outcome in outcomes
        if outcome is not None
    )


def _packages(facts: HostFacts) -> CheckOutcome:
    wheel = facts.wheel
    if wheel.others:
        every = ", ".join(sorted({wheel.package, *wheel.others}))
        instruction = "remove all of them, then install one"
        return broken(f"{every} own one folder; {wheel.package} came last and won", *one_remedy(instruction))
    if not wheel.package:
        return broken("no onnxruntime is installed", *one_remedy("install it", "pip install '.[cpu]'"))
    return ok(f"{wheel.name}, and no other onnxruntime")


def _cpu_quota(facts: HostFacts) -> CheckOutcome | None:
    quota = facts.cpu_quota
    if quota is None or quota >= facts.cores:
        return None
    text = f"{quota:.3g} of {facts.cores} cores, by the control group of this process"
    if quota >= 1:
        return info(text)
    where = (
        "HostConfig.NanoCpus" if facts.environment.module else "docker run --cpus, or CPUQuota= of systemd"
    )
    return warning(f"{text}: decoding and the model wait for each other", *one_remedy(f"raise it ({where})"))


def _memory(facts: HostFacts) -> CheckOutcome:
    total, available = facts.memory.total_bytes // _MIB, facts.memory.available_bytes // _MIB
    if not total:
        return info("not known")
    limit = " (the limit of this container)" if facts.memory.limited else ""
    text = f"{total} MiB{limit}, {available} available"
    wanted = _RECOMMENDED_MIB[facts.wheel.cuda > 0]
    if facts.environment.edge != "no" and not facts.memory.limited:
        wanted += _EDGE_MIB
    if total < wanted * 0.9:  # a VM of 4096 MiB shows less than that
        return warning(f"{text}: {wanted} MiB are wanted", *_more_memory(facts))
    if available < _MIN_AVAILABLE_MIB:
        return warning(f"{text}: little is left", *one_remedy("see what else runs here"))
    return ok(text)


def _more_memory(facts: HostFacts) -> Remedies:
    if facts.memory.limited:
        return one_remedy("raise this container's limit (HostConfig.Memory)")
    if facts.environment.kernel != "eflow":
        return one_remedy("give this machine more memory")
    way = {"dda": "DirectDeviceAssignment", "gpu-pv": "ParaVirtualization"}.get(facts.environment.passthrough)
    if way is None:
        line = set_eflow_vm_command("none", facts.cores, facts.memory.total_bytes).replace(
            ' -gpuName "NAME OF THE GPU"', ""
        )
    else:
        line = set_eflow_vm_command(way, facts.cores, facts.memory.total_bytes, _gpu_name(facts))
    return one_remedy("on Windows; whatever is left out of the line is set back, the GPU, too", line)


def _gpu_name(facts: HostFacts) -> str:
    devices = facts.probed.driver.step("devices").get("devices", [])
    return str(devices[0]["name"]) if devices else "NAME OF THE GPU"


def _disk(facts: HostFacts) -> CheckOutcome:
    data = facts.request.data
    if facts.space is None:
        return info(f"{data}: not known")
    free, total = facts.space.free_bytes, facts.space.total_bytes
    text = f"{data}: {free // _MIB} of {total // _MIB} MiB free"
    if not facts.writable:
        return broken(f"{text}, but user {facts.uid} cannot write there", *_fix_data_folder(facts))
    if free < _MIN_DISK_MIB * _MIB:
        return broken(f"{text}: nothing can be kept", *_free_disk_space(facts))
    if free < _LOW_DISK_MIB * _MIB:
        return warning(
            f"{text}: the spool and compiled models want {_LOW_DISK_MIB}", *_free_disk_space(facts)
        )
    if facts.environment.kernel == "eflow" and facts.wheel.cuda and total < _MIN_EFLOW_DISK_GIB * _GIB:
        instruction = "the disk of an EFLOW VM is set when it is deployed (10 GB if nothing is said)"
        line = "Deploy-Eflow -vmDataSize 20 …"
        return warning(
            f"{text}: an update of the GPU image wants {_MIN_EFLOW_DISK_GIB} GiB in all",
            *one_remedy(instruction, line),
        )
    return ok(text)


def _fix_data_folder(facts: HostFacts) -> Remedies:
    if facts.environment.container:
        return one_remedy(
            "on the host, give the folder that is bound to it to this user",
            f"chown {facts.uid}:{facts.uid} …",
        )
    return one_remedy("name a folder of your own", "VISIONEDGE_DATA=… visionedge run")


def _free_disk_space(facts: HostFacts) -> Remedies:
    return one_remedy("remove images that nobody needs" if facts.environment.container else "make room")


def _clock(facts: HostFacts) -> CheckOutcome:
    if facts.now_s < facts.newest_file_s - _DAY_S:
        days = (facts.newest_file_s - facts.now_s) / _DAY_S
        return broken(f"{days:.0f} days behind the files of this installation", *_set_clock(facts))
    kept = facts.probed.clock.step("kernel").get("synchronised")
    text = (
        "not known who keeps it" if kept is None else "kept by NTP" if kept else "the kernel knows of no NTP"
    )
    skew_s = _skew_s(facts)
    if skew_s is None:
        return info(text)
    text = f"{skew_s:+.0f} s against the hub, {text}"
    if abs(skew_s) > _TOKEN_SKEW_S:
        return broken(f"{text}: the hub refuses tokens made with it", *_set_clock(facts))
    return warning(text, *_set_clock(facts)) if abs(skew_s) > _LARGE_SKEW_S else ok(text)


def _skew_s(facts: HostFacts) -> float | None:
    """Our clock less the hub's; None where the hub did not tell."""
    try:
        date = parsedate_to_datetime(facts.probed.network.step("date")["date"])
    except (KeyError, TypeError, ValueError):
        return None
    return facts.now_s - date.timestamp()


def _set_clock(facts: HostFacts) -> Remedies:
    if facts.environment.kernel == "eflow":
        return one_remedy(
            "the clock of the VM stands still while Windows sleeps: restart the VM", *RESTART_VM_COMMANDS
        )
    where = "on the host, let" if facts.environment.container else "let"
    return one_remedy(f"{where} a time service keep the clock", "timedatectl set-ntp true")


def _gateway(facts: HostFacts) -> CheckOutcome | None:
    name = facts.environ.get("IOTEDGE_GATEWAYHOSTNAME", "")
    if facts.environment.edge != "edge":
        return None
    step = facts.probed.network.step(f"resolve:{name}")
    if addresses := step.get("addresses"):
        return ok(f"{name} is {', '.join(addresses)}")
    why = step.get("error") or facts.probed.network.reason or "no answer"
    options = '{"NetworkingConfig":{"EndpointsConfig":{"azure-iot-edge":{}}}}'
    return broken(
        f"{name} cannot be resolved: {why}",
        *one_remedy(
            "edgeHub must run, with the module on its network; createOptions that name a network need",
            options,
        ),
    )


def _workload(facts: HostFacts) -> CheckOutcome | None:
    uri = facts.environ.get("IOTEDGE_WORKLOADURI", "")
    if facts.environment.edge != "edge":
        return None
    if not facts.socket:
        return ok(uri)
    if "Permission denied" in facts.socket:
        instruction = "the agent makes it with mode 0666: let nobody change that, or run the module as root"
        return broken(f"user {facts.uid} cannot open it: {facts.socket}", *one_remedy(instruction))
    return broken(
        facts.socket,
        *one_remedy("restart the module: the agent binds the socket when it makes the container"),
    )


def _http(facts: HostFacts) -> CheckOutcome | None:
    http = facts.request.config.http if facts.request.config else None
    if http is None or not http.is_open:
        return None
    return warning(
        f"listens on {http.host}:{http.port} without a token: every machine that reaches it sees pictures,"
        " status and log",
        *one_remedy("set http.token (or VISIONEDGE_HTTP_TOKEN), or listen on 127.0.0.1"),
    )


def _camera(facts: HostFacts, name: str, why: str) -> CheckOutcome:
    """`why` is what was known without the network: "" fine, "disabled", "network", else an error."""
    if why == "disabled":
        return info("disabled")
    if why != "network":
        if not why:
            return ok("can be read")
        denied = (
            one_remedy("add the group of the device (HostConfig.GroupAdd)") if "Permission" in why else ()
        )
        return broken(why, *denied)
    step = facts.probed.network.step(f"reach:{name}")
    if step.get("reached"):
        return ok("answers at its port")
    why = step.get("error") or facts.probed.network.reason or "no answer"
    return broken(
        redact(f"does not answer: {why}"), *one_remedy("check its address, its power and the network to it")
    )


SYSTEM_CHECKS = (
    SystemCheck("packages", "packages", _packages),
    SystemCheck("cpu-quota", "CPU quota", _cpu_quota),
    SystemCheck("memory", "memory", _memory),
    SystemCheck("disk", "disk", _disk),
    SystemCheck("clock", "clock", _clock),
    SystemCheck("gateway", "gateway", _gateway),
    SystemCheck("workload-socket", "workload socket", _workload),
    SystemCheck("http", "HTTP", _http),
)
"""Everything beside the chain and the cameras, in order."""
