"""What stands on what: directions of imports, circles, and what the inner rooms load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import ROOT

SLOTS = ("projectors", "encoders", "embedders", "decoders", "teachers", "heads")
ROOMS = (
    ("_moved",),
    ("core",),
    SLOTS,
    ("model",),
    ("data.records",),
    ("data.remote",),
    ("data.sources",),
    ("data.sample",),
    ("data.sets",),
    ("data.feed",),
    ("data",),
    ("worlds",),
    ("checkpoints",),
    ("hf", "gguf"),
    ("training",),
    ("evaluation",),
    ("serving",),
    ("testing",),
    ("callbacks",),
    ("planning",),
    ("cluster",),
    ("experiments",),
    ("commands", "__main__"),
)
"""From the ground up: a room imports from those before it, and from its own."""
INNER = [f"lit_vlm.{room}" for room in ("core", *SLOTS, "model")]
OUTER = ("lightning", "litdata", "pyarrow", "matplotlib", "mlflow")


def _modules() -> dict[str, Path]:
    found = {}
    for top in ("lit_vlm", "callbacks"):
        for file in (ROOT / top).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = _modules()


def _imports(module: str) -> Iterator[tuple[str, bool]]:
    """Modules of the kit that one imports, and whether it does so only when something is called."""

    def visit(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.module:
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    yield (inner if inner in MODULES else child.module), late
            elif isinstance(child, ast.Import):
                yield from ((alias.name, late) for alias in child.names)
            yield from visit(child, late or isinstance(child, ast.FunctionDef))

    yield from ((name, late) for name, late in visit(ast.parse(MODULES[module].read_text()), False) if name in MODULES)


def _floor(module: str) -> int:
    own = module.removeprefix("lit_vlm.")
    fitting = [
        (len(room), floor)
        for floor, rooms in enumerate(ROOMS)
        for room in rooms
        if own == room or own.startswith(f"{room}.")
    ]
    return max(fitting)[1]


def test_imports_go_down_only() -> None:
    up = [
        f"{module} → {name}"
        for module in MODULES
        if module != "lit_vlm"
        for name, _ in _imports(module)
        if name != "lit_vlm" and _floor(name) > _floor(module)
    ]
    assert up == []


def test_slots_know_neither_data_nor_each_other_s_insides_in_a_circle() -> None:
    # Those that name a neighbour's contract do so in this order: embedders know decoders, teachers encoders, and heads
    # know both.
    order = {room: place for place, room in enumerate(SLOTS)}
    order["decoders"] = order["embedders"] - 0.5
    back = [
        f"{module} → {name}"
        for module in MODULES
        for name, _ in _imports(module)
        if (own := module.split(".")[1:2]) and own[0] in order
        if (other := name.split(".")[1:2]) and other[0] in order
        if order[other[0]] > order[own[0]]
    ]
    assert back == []


def test_what_is_installed_needs_neither_the_tests_nor_pytest() -> None:
    named = [
        f"{module}: {name}"
        for module, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
        if name.split(".")[0] in ("tests", "pytest", "_pytest")
    ]  # fmt: skip
    assert named == []


def test_there_is_no_circle() -> None:
    left = {module: {name for name, _ in _imports(module) if name != module} for module in MODULES}
    for module, names in left.items():  # a package's face imports its own modules; they do not import the face
        names.discard(module.rpartition(".")[0])
    while free := [module for module, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """Packages in memory after the import of each inner room, one after the other in one process."""
    code = (
        "import importlib, json, sys\n"
        "found = {}\n"
        f"for room in {INNER!r}:\n"
        "    importlib.import_module(room)\n"
        "    found[room] = sorted({name for name in sys.modules})\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


@pytest.mark.parametrize("room", INNER)
def test_the_inner_rooms_load_the_model_s_libraries_alone(room: str, loaded: dict[str, list[str]]) -> None:
    names = loaded[room]
    assert {name.split(".")[0] for name in names} & set(OUTER) == set()
    own = {".".join(name.split(".")[:2]) for name in names if name.startswith("lit_vlm.")}
    assert own <= {*INNER, "lit_vlm._moved"}


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["compare", "--help"],
        ["doctor", "--help"],
        ["run", "--help"],
        ["status", "--help"],
        ["tune", "--help"],
        ["submit", "--help"],
        ["serve", "--help"],
    ],
)
def test_a_short_question_loads_no_pytorch(words: list[str]) -> None:
    code = (
        "import sys\nfrom lit_vlm.commands.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write(str('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.endswith("False")
    assert "usage: lit-vlm" in done.stdout
