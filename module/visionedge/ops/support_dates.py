"""Which versions of IoT Edge, EFLOW, edgeHub and the metrics collector are supported: a table with its date.

The dates are Microsoft's; `doctor` and `manifest lint` show them with `TABLE_DATE`.
"""

import re
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

Product = Literal["IoT Edge", "EFLOW", "edgeHub", "metrics collector"]
SupportState = Literal["supported", "ended", "faulty"]
Version = tuple[int, ...]

TABLE_DATE = date(2026, 11, 30)
"""The day on which the sources of the table were read."""

IOT_EDGE_TAG = "1.6.8"
"""The newest tag of edgeAgent and edgeHub (2026-11-02, Azure/azure-iotedge releases/tag/1.6.8)."""

EFLOW_VERSION = "1.6.1.11026"
"""The newest EFLOW for X64: Azure Linux 3.0.20261105, IoT Edge 1.6.4 (Azure/iotedge-eflow releases)."""
EFLOW_ARM64_VERSION = "1.5.7.01026"
"""The newest EFLOW for ARM64; its support has ended, and it has no successor."""

_IMAGES: dict[str, tuple[Product, ...]] = {
    "azureiotedge-agent": ("IoT Edge",),
    "azureiotedge-hub": ("edgeHub", "IoT Edge"),
    "azureiotedge-metrics-collector": ("metrics collector",),
}
_VERSION = re.compile(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class SupportEntry:
    """A range of versions, from `first` to before `end`.

    `supported_until`: the last day of support; None: none is published. `fault`: why this version must not be
    used, empty if there is no reason. `remedy`: what to use instead. `source`: where the facts stand.
    """

    product: Product
    versions: str
    first: Version
    end: Version
    supported_until: date | None
    fault: str
    remark: str
    remedy: str
    source: str

    @property
    def state(self) -> SupportState:
        """On the day of the table."""
        if self.fault:
            return "faulty"
        is_over = self.supported_until is not None and self.supported_until < TABLE_DATE
        return "ended" if is_over else "supported"

    @property
    def ended_lately(self) -> bool:
        """Whether the support ended in the year before the table: whole fleets still have such a version."""
        until = self.supported_until
        return self.state == "ended" and until is not None and TABLE_DATE - until < timedelta(days=365)

    def describe(self) -> str:
        """The state in words, with the date of the table."""
        if self.fault:
            return f"{self.fault} (as of {TABLE_DATE})"
        if self.supported_until is None:
            return f"has no published end of support (as of {TABLE_DATE})"
        if self.state == "ended":
            return f"is out of support since {self.supported_until} (as of {TABLE_DATE})"
        return f"is supported until {self.supported_until} (as of {TABLE_DATE})"


SUPPORT_DATES: tuple[SupportEntry, ...] = (
    SupportEntry(
        *("IoT Edge", "1.4 and older", (0,), (1, 5), date(2024, 11, 12), ""),
        "",
        f"write the tag {IOT_EDGE_TAG}",
        "MicrosoftDocs/azure-docs articles/iot-edge/version-history.md",
    ),
    SupportEntry(
        *("IoT Edge", "1.5 LTS", (1, 5), (1, 6), date(2026, 11, 10), ""),
        "its last images are 1.5.44 (2026-08-17)",
        f"write the tag {IOT_EDGE_TAG}",
        "Azure/azure-iotedge releases/tag/1.5.0",
    ),
    SupportEntry(
        *("IoT Edge", "1.6 LTS", (1, 6), (1, 7), date(2028, 11, 14), ""),
        "it does not support Mariner 2.0, the Linux of older EFLOW VMs",
        "",
        "Azure/azure-iotedge releases/tag/1.6.0",
    ),
    SupportEntry(
        *("edgeHub", "1.6.0 and 1.6.1", (1, 6, 0), (1, 6, 2), date(2028, 11, 14)),
        "loses MQTT connections, which visionedge uses",
        "the fix was merged on 2026-08-21; 1.6.2 was prepared after it (inferred)",
        f"write the tag {IOT_EDGE_TAG}",
        "Azure/iotedge pull/7539",
    ),
    SupportEntry(
        *("EFLOW", "1.4 and older", (0,), (1, 5), date(2024, 11, 12), ""),
        "",
        f"install EFLOW {EFLOW_VERSION} (X64)",
        "MicrosoftDocs/azure-docs articles/iot-edge/version-history.md",
    ),
    SupportEntry(
        *("EFLOW", "1.5.6", (1, 5, 6), (1, 5, 7), date(2026, 11, 10)),
        "was withdrawn: names of VM and identity differ after an installation",
        "",
        f"update EFLOW to {EFLOW_ARM64_VERSION}, then on X64 to {EFLOW_VERSION}",
        "Azure/iotedge-eflow releases/tag/1.5.6.08025",
    ),
    SupportEntry(
        *("EFLOW", "1.5", (1, 5), (1, 6), date(2026, 11, 10), ""),
        f"ARM64 stays on {EFLOW_ARM64_VERSION}: it has no successor",
        f"on X64 update EFLOW to {EFLOW_VERSION} by Microsoft Update (1.5.7 first); ARM64 has no successor",
        "Azure/iotedge-eflow releases/tag/1.6.1.11026",
    ),
    SupportEntry(
        *("EFLOW", "1.6", (1, 6), (1, 7), date(2028, 11, 14), ""),
        "X64 only; the end is that of IoT Edge 1.6 (inferred)",
        "",
        "Azure/iotedge-eflow releases/tag/1.6.1.11026",
    ),
    SupportEntry(
        *("metrics collector", "1.x", (1,), (2,), date(2026, 9, 14)),
        "cannot upload to Azure Monitor since 2026-09-14, when its API was retired",
        "UploadTarget IotMessage still works",
        "use azureiotedge-metrics-collector:2.0",
        "MicrosoftDocs/azure-docs articles/iot-edge/how-to-collect-and-transport-metrics.md",
    ),
)
"""Of several entries with a version, the first with a narrower range applies."""


def find_support(product: Product, version: str) -> SupportEntry | None:
    """The entry of a version such as ``1.6.1.11026`` or ``1.5``; None if the table has none.

    A version without its third part, such as the tag ``1.6``, stands for the newest of its kind.
    """
    found = _VERSION.match(version)
    if found is None:
        return None
    known: Version = tuple(int(part) for part in found.groups() if part is not None)
    matches = [e for e in SUPPORT_DATES if e.product == product and _has(e, known)]
    return min(matches, key=_width, default=None)


def find_image_support(image: str) -> tuple[SupportEntry, ...]:
    """The entries that apply to an image of Microsoft; empty for other images and tags without a number."""
    repository, _, tag = image.rpartition("/")[2].partition(":")
    entries = (find_support(product, tag) for product in _IMAGES.get(repository, ()))
    return tuple(entry for entry in entries if entry is not None)


def _has(entry: SupportEntry, version: Version) -> bool:
    narrow = len(entry.first) == 3
    return (len(version) == 3 or not narrow) and entry.first <= version < entry.end


def _width(entry: SupportEntry) -> int:
    """0 for an entry about patch versions, else 1."""
    return 0 if len(entry.first) == 3 else 1
