"""Count scene events again from their evidence: `python scene_recount.py CAMERA.json < messages.jsonl`.

CAMERA.json has the `zones` and `lines` of a camera. Imports nothing of visionedge. Problems go to stderr.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any


def side(a: Any, b: Any, p: Any) -> float:
    return float((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]))


def is_inside(polygon: list[Any], p: Any) -> bool:
    inside = False
    for a, b in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if abs(side(a, b, p)) < 1e-9 and all(min(a[i], b[i]) <= p[i] <= max(a[i], b[i]) for i in (0, 1)):
            return True
        if (a[1] > p[1]) != (b[1] > p[1]):
            inside ^= p[0] < a[0] + (p[1] - a[1]) * (b[0] - a[0]) / (b[1] - a[1])
    return inside


def directions(start: Any, end: Any, path: list[Any]) -> list[str]:
    """Every passage of the segment by a path."""
    return [
        "left-to-right" if side(start, end, p) < 0 else "right-to-left"
        for p, q in pairwise(path)
        if (side(start, end, p) < 0) != (side(start, end, q) < 0) and side(p, q, start) * side(p, q, end) <= 0
    ]


def path_problem(event: Any, rule: Any) -> str | None:
    points = event["evidence"]["path"]
    sequences, path = [point[0] for point in points], [point[1:] for point in points]
    ends = [event["evidence"]["firstSequence"], event["evidence"]["lastSequence"]]
    if len(path) > 64 or sequences != sorted(set(sequences)) or [sequences[0], sequences[-1]] != ends:
        return "path is not in order"
    if event["type"] == "line-crossed":
        found = directions(rule["start"], rule["end"], path)
        return None if found == [event["direction"]] else f"passes the line {found}"
    inside = [is_inside(rule["polygon"], point) for point in path]
    changes = [now for before, now in pairwise(inside) if before != now]
    stays = inside[0] and inside[-1]
    entered, left = changes == [True] or inside == [True], changes == [False]
    proven = {"zone-entered": entered, "zone-left": left, "zone-lost": stays, "zone-dwell": stays}
    return None if proven[event["type"]] else f"path is inside {inside}"


def count_problem(event: Any, rule: Any, inside: set[int]) -> str | None:
    if event["evidence"]["trackIds"] != sorted(inside) or event["count"] != len(inside):
        return f"{sorted(inside)} are inside"
    many = len(inside) >= rule.get("occupancy", {}).get("atLeast", 0)
    holds = {"occupied": many, "vacated": not many, "empty": not inside, "filled": bool(inside)}
    return None if holds[event["type"].removeprefix("zone-")] else "condition does not hold"


def recount(events: Iterable[Any], camera: Any) -> tuple[Counter[str], list[str]]:
    """The totals by `RULE TOTAL LABEL`, and what the evidence does not prove."""
    totals, problems = Counter[str](), list[str]()
    inside: dict[str, set[int]] = {name: set() for name in camera["zones"]}
    for event in {event["id"]: event for event in events}.values():
        name, kind = event.get("zone", event.get("line")), event["type"].removeprefix("zone-")
        rule = camera["zones" if "zone" in event else "lines"][name]
        if kind in {"occupied", "vacated", "empty", "filled"}:
            problem = count_problem(event, rule, inside[name])
        else:
            problem = path_problem(event, rule)
            is_known = event["trackId"] in inside.get(name, ())
            if "zone" in event and is_known != (kind != "entered"):
                problem = "comes out of turn"
        if kind == "entered":
            inside[name].add(event["trackId"])
        elif kind in {"left", "lost"}:
            inside[name].discard(event["trackId"])
        if kind in {"entered", "left", "lost", "line-crossed"}:
            totals[f"{name} {event.get('direction', kind)} {event['label']}"] += 1
        problems += [f"{event['type']} {event['id']} of {name}: {problem}"] if problem else []
    return totals, problems


def read(lines: Iterable[str]) -> Iterator[Any]:
    for line in lines:
        with suppress(ValueError):  # a kill can cut a line; its events come again
            document = json.loads(line)
            yield from document.get("events", [document] if "evidence" in document else [])


if __name__ == "__main__":
    counted, wrong = recount(read(sys.stdin), json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(counted, indent=1))  # noqa: T201 - its result
    sys.exit("\n".join(wrong) or 0)
