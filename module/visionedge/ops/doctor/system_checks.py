"""What else has to be right: memory, disk, clock, packages, the gateway, the workload socket, the cameras."""

from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from visionedge.ops.doctor.finding import Finding, Judged, Remedies, broken, info, ok, one, warning
from visionedge.ops.doctor.gather import Facts
from visionedge.ops.doctor.passthrough import RESTART_VM, set_eflow_vm
from visionedge.runtime.redaction import redact

_MIB, _GIB = 2**20, 2**30

# One module with a few cameras takes 200 to 400 MiB on the CPU; CUDA and cuDNN map and keep GiBs more.
# Where IoT Edge runs as well, its agent and hub want theirs; 1024, what EFLOW gives by itself, is too little.
_WANTED_MIB = {False: 768, True: 4096}
_EDGE_MIB = 768
_LITTLE_MIB = 256
# The spool may take 256 MB; compiled models, plans and TensorRT's engines come on top.
_LOW_DISK_MIB, _NO_DISK_MIB = 1024, 128
# The GPU image is 4 GB unpacked, twice during an update, beside the images of IoT Edge and what is pulled.
_EFLOW_DISK_GIB = 16
_LARGE_SKEW_S, _TOKEN_SKEW_S = 60.0, 300.0
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing beside the chain; `check` gives None where it has no meaning here."""

    name: str
    title: str
    check: Callable[[Facts], Judged | None]


def look(facts: Facts) -> tuple[Finding, ...]:
    """Judge everything beside the chain, cameras last."""
    judged = [(thing.name, thing.title, thing.check(facts)) for thing in THINGS]
    judged += [("camera", f"camera {name}", _camera(facts, name, why)) for name, why in facts.cameras.items()]
    return tuple(
        Finding(name, title, j.state, j.found, j.remedies) for name, title, j in judged if j is not None
    )


def _packages(facts: Facts) -> Judged:
    wheel = facts.wheel
    if wheel.others:
        every = ", ".join(sorted({wheel.package, *wheel.others}))
        say = "remove all of them, then install one"
        return broken(f"{every} own one folder; {wheel.package} came last and won", *one(say))
    if not wheel.package:
        return broken("no onnxruntime is installed", *one("install it", "pip install '.[cpu]'"))
    return ok(f"{wheel.name}, and no other onnxruntime")


def _cpu_quota(facts: Facts) -> Judged | None:
    quota = facts.cpu_quota
    if quota is None or quota >= facts.cores:
        return None
    text = f"{quota:.3g} of {facts.cores} cores, by the control group of this process"
    if quota >= 1:
        return info(text)
    where = "HostConfig.NanoCpus" if facts.place.module else "docker run --cpus, or CPUQuota= of systemd"
    return warning(f"{text}: decoding and the model wait for each other", *one(f"raise it ({where})"))


def _memory(facts: Facts) -> Judged:
    total, available = facts.memory.total_bytes // _MIB, facts.memory.available_bytes // _MIB
    if not total:
        return info("not known")
    limit = " (the limit of this container)" if facts.memory.limited else ""
    text = f"{total} MiB{limit}, {available} available"
    wanted = _WANTED_MIB[facts.wheel.cuda > 0]
    if facts.place.edge != "no" and not facts.memory.limited:
        wanted += _EDGE_MIB
    if total < wanted * 0.9:  # a VM of 4096 MiB shows less than that
        return warning(f"{text}: {wanted} MiB are wanted", *_more_memory(facts))
    if available < _LITTLE_MIB:
        return warning(f"{text}: little is left", *one("see what else runs here"))
    return ok(text)


def _more_memory(facts: Facts) -> Remedies:
    if facts.memory.limited:
        return one("raise this container's limit (HostConfig.Memory)")
    if facts.place.kernel != "eflow":
        return one("give this machine more memory")
    way = {"dda": "DirectDeviceAssignment", "gpu-pv": "ParaVirtualization"}.get(facts.place.passthrough)
    if way is None:
        line = set_eflow_vm("none", facts.cores, facts.memory.total_bytes).replace(
            ' -gpuName "NAME OF THE GPU"', ""
        )
    else:
        line = set_eflow_vm(way, facts.cores, facts.memory.total_bytes, _gpu_name(facts))
    return one("on Windows; whatever is left out of the line is set back, the GPU, too", line)


def _gpu_name(facts: Facts) -> str:
    devices = facts.told.driver.step("devices").get("devices", [])
    return str(devices[0]["name"]) if devices else "NAME OF THE GPU"


def _disk(facts: Facts) -> Judged:
    data = facts.request.data
    if facts.space is None:
        return info(f"{data}: not known")
    free, total = facts.space.free_bytes, facts.space.total_bytes
    text = f"{data}: {free // _MIB} of {total // _MIB} MiB free"
    if not facts.writable:
        return broken(f"{text}, but user {facts.uid} cannot write there", *_own_folder(facts))
    if free < _NO_DISK_MIB * _MIB:
        return broken(f"{text}: nothing can be kept", *_make_room(facts))
    if free < _LOW_DISK_MIB * _MIB:
        return warning(f"{text}: the spool and compiled models want {_LOW_DISK_MIB}", *_make_room(facts))
    if facts.place.kernel == "eflow" and facts.wheel.cuda and total < _EFLOW_DISK_GIB * _GIB:
        say = "the disk of an EFLOW VM is set when it is deployed (10 GB if nothing is said)"
        line = "Deploy-Eflow -vmDataSize 20 …"
        return warning(
            f"{text}: an update of the GPU image wants {_EFLOW_DISK_GIB} GiB in all", *one(say, line)
        )
    return ok(text)


def _own_folder(facts: Facts) -> Remedies:
    if facts.place.container:
        return one(
            "on the host, give the folder that is bound to it to this user",
            f"chown {facts.uid}:{facts.uid} …",
        )
    return one("name a folder of your own", "VISIONEDGE_DATA=… visionedge run")


def _make_room(facts: Facts) -> Remedies:
    return one("remove images that nobody needs" if facts.place.container else "make room")


def _clock(facts: Facts) -> Judged:
    if facts.now_s < facts.newest_file_s - _DAY_S:
        days = (facts.newest_file_s - facts.now_s) / _DAY_S
        return broken(f"{days:.0f} days behind the files of this installation", *_set_clock(facts))
    kept = facts.told.clock.step("kernel").get("synchronised")
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


def _skew_s(facts: Facts) -> float | None:
    """Our clock less the hub's; None where the hub did not tell."""
    try:
        date = parsedate_to_datetime(facts.told.network.step("date")["date"])
    except (KeyError, TypeError, ValueError):
        return None
    return facts.now_s - date.timestamp()


def _set_clock(facts: Facts) -> Remedies:
    if facts.place.kernel == "eflow":
        return one("the clock of the VM stands still while Windows sleeps: restart the VM", *RESTART_VM)
    where = "on the host, let" if facts.place.container else "let"
    return one(f"{where} a time service keep the clock", "timedatectl set-ntp true")


def _gateway(facts: Facts) -> Judged | None:
    name = facts.environ.get("IOTEDGE_GATEWAYHOSTNAME", "")
    if facts.place.edge != "edge":
        return None
    step = facts.told.network.step(f"resolve:{name}")
    if addresses := step.get("addresses"):
        return ok(f"{name} is {', '.join(addresses)}")
    why = step.get("error") or facts.told.network.words or "no answer"
    options = '{"NetworkingConfig":{"EndpointsConfig":{"azure-iot-edge":{}}}}'
    return broken(
        f"{name} cannot be resolved: {why}",
        *one(
            "edgeHub must run, with the module on its network; createOptions that name a network need",
            options,
        ),
    )


def _workload(facts: Facts) -> Judged | None:
    uri = facts.environ.get("IOTEDGE_WORKLOADURI", "")
    if facts.place.edge != "edge":
        return None
    if not facts.socket:
        return ok(uri)
    if "Permission denied" in facts.socket:
        say = "the agent makes it with mode 0666: let nobody change that, or run the module as root"
        return broken(f"user {facts.uid} cannot open it: {facts.socket}", *one(say))
    return broken(
        facts.socket, *one("restart the module: the agent binds the socket when it makes the container")
    )


def _http(facts: Facts) -> Judged | None:
    http = facts.request.config.http if facts.request.config else None
    if http is None or not http.is_open:
        return None
    return warning(
        f"listens on {http.host}:{http.port} without a token: every machine that reaches it sees pictures,"
        " status and log",
        *one("set http.token (or VISIONEDGE_HTTP_TOKEN), or listen on 127.0.0.1"),
    )


def _camera(facts: Facts, name: str, why: str) -> Judged:
    """`why` is what was known without the network: "" fine, "disabled", "network", else an error."""
    if why == "disabled":
        return info("disabled")
    if why != "network":
        if not why:
            return ok("can be read")
        denied = one("add the group of the device (HostConfig.GroupAdd)") if "Permission" in why else ()
        return broken(why, *denied)
    step = facts.told.network.step(f"reach:{name}")
    if step.get("reached"):
        return ok("answers at its port")
    why = step.get("error") or facts.told.network.words or "no answer"
    return broken(
        redact(f"does not answer: {why}"), *one("check its address, its power and the network to it")
    )


THINGS = (
    Thing("packages", "packages", _packages),
    Thing("cpu-quota", "CPU quota", _cpu_quota),
    Thing("memory", "memory", _memory),
    Thing("disk", "disk", _disk),
    Thing("clock", "clock", _clock),
    Thing("gateway", "gateway", _gateway),
    Thing("workload-socket", "workload socket", _workload),
    Thing("http", "HTTP", _http),
)
"""Everything beside the chain and the cameras, in order."""
