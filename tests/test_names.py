"""One word for one thing: the field's terms, and no public class name twice."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

from visionedge.app.metrics import METRICS

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "module" / "visionedge"

# Former private names; each has a standard term in the code.
PRIVATE_CLASSES = """
AnyEngine Apart Arena Asked Attempt Backlog Bill Board Book Calls Children Choice Conductor ContentWatch
Crew Desk Door Ears EngineInUse EngineRoom Errand Facade Facts Fitting Fleet Halver Journal Keeper
Ladder Likeness Line Lineup Losable Machinery Material Means Meter ModuleView NodePlaces Order Outbox
Outlook Pace Page Painter Patience Pin Promise Proof Questions Ration Reading Remote Rooms Seam Shelf
Shelves Showing Sight Stage StandIn Tally Tempo Thinning Told Visitor Weaver Window Wish Workshop
"""

PRIVATE_MODULES = """
album any_engine arithmetic attention billing board box_form calls capacity closing conductor contest
counting deed door engine_room errand facade fleet giving half handing imprint inject interleaving
journal keeper ladder likeness line lineup lists losable machinery maps material net opening origins
outbox outlook patience picking places plausible preparation probing promise ration reading reasons
refining rooms rows sameness scaling seam settling shares shelves sight single sound stand_in
surroundings thinning together trial untold uris visit wire wish
"""

PRIVATE_FUNCTIONS = """
bury deeds errand give_way handing hearing let_in retire rung rungs settle_allocator stillborn suspect
tidy told untold vain vain_tries well wish wishes words
"""

METAPHORS = "Askew Basket Life River Siege Witness World"
"""Former names of doubles; the standard terms are harness, simulation, recorder, fake and stub."""

PRIVATE_TEXTS = ("rung", "letIn", "let_in", "vain", "untold", "DEED", "outbox")
"""Parts of former names of metrics, keys of documents and usage texts."""


@cache
def _trees(folder: Path = PACKAGE) -> list[tuple[Path, ast.Module]]:
    return [
        (path.relative_to(folder), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(folder.rglob("*.py"))
    ]


def _classes(folder: Path = PACKAGE) -> list[tuple[str, Path]]:
    return [
        (node.name, path)
        for path, tree in _trees(folder)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]


def test_classes_have_the_names_that_the_field_uses() -> None:
    assert not [(name, str(path)) for name, path in _classes() if name.lstrip("_") in PRIVATE_CLASSES.split()]


def test_classes_of_tests_have_the_names_that_the_field_uses() -> None:
    private = {*PRIVATE_CLASSES.split(), *METAPHORS.split()}
    assert not [(name, str(path)) for name, path in _classes(TESTS) if name.lstrip("_") in private]


def test_a_public_class_name_occurs_once() -> None:
    counts = Counter(name for name, _ in _classes() if not name.startswith("_"))
    assert not [name for name, count in counts.items() if count > 1]


def test_modules_have_the_names_that_the_field_uses() -> None:
    names = {part.removesuffix(".py") for path, _ in _trees() for part in path.parts}
    assert not names & set(PRIVATE_MODULES.split())


def test_functions_and_methods_have_the_names_that_the_field_uses() -> None:
    functions = [
        (node.name, str(path))
        for path, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert not [each for each in functions if each[0].lstrip("_") in PRIVATE_FUNCTIONS.split()]


def test_metrics_and_keys_of_documents_have_the_names_that_the_field_uses() -> None:
    """Keys: the texts of dictionaries and of literal types, where drop reasons and states are listed."""
    texts = {
        node.value
        for _, tree in _trees()
        for parent in ast.walk(tree)
        if isinstance(parent, ast.Dict | ast.Subscript)
        for node in ast.walk(parent)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value
    }
    names = texts | set(METRICS)
    assert not {name for name in names for word in PRIVATE_TEXTS if word in name}
