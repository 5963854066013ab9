"""The module of a made-up next version: `python -m next_version additive|incompatible WORD…`.

Its state files have the next schema numbers; everything else is the module of today. `additive`: an older
module can use the spool; `incompatible`: it cannot.
"""

import sys
from typing import Literal

from visionedge.__main__ import main
from visionedge.camera import registry
from visionedge.iothub import desired_properties
from visionedge.outbound import sqlite_store
from visionedge.outbound.sqlite_store import StoreFormat

Kind = Literal["additive", "incompatible"]


def next_format(kind: Kind) -> StoreFormat:
    """The format of the spool after the one of today."""
    today = sqlite_store.FORMAT
    lowest = {"additive": str(today.version), "incompatible": str(today.version + 1)}[kind]
    upgrade = (
        f"CREATE TABLE compatibility AS SELECT {lowest} AS min_reader",
        "ALTER TABLE message ADD COLUMN priority INTEGER NOT NULL DEFAULT 0",
        "CREATE TABLE note(text TEXT NOT NULL)",
    )
    return StoreFormat((*today.upgrades, ";".join(upgrade)))


def next_schema(schema: str) -> str:
    """The schema after one."""
    name, _, number = schema.rpartition("/")
    return f"{name}/{int(number) + 1}"


def become_next_version(kind: Kind) -> None:
    """Make this process one of the next version."""
    sqlite_store.FORMAT = next_format(kind)
    registry.SEQUENCES_SCHEMA = next_schema(registry.SEQUENCES_SCHEMA)
    desired_properties.DESIRED_SCHEMA = next_schema(desired_properties.DESIRED_SCHEMA)


if __name__ == "__main__":
    become_next_version("additive" if sys.argv[1] == "additive" else "incompatible")
    sys.exit(main(sys.argv[2:]))
