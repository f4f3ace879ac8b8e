"""Imports point downwards: no file imports a layer above its own, siblings of the fourth layer do not meet, no
circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

LAYERS = {
    1: ("model", "files", "images", "tables", "recipes"),
    2: ("data", "inference", "teacher", "metrics"),
    3: ("evaluate", "visualize", "hub"),
    4: ("commands", "train", "compose", "pack", "export", "lmms_eval"),
    5: ("cli", "__main__"),
}
LAYER = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
ABOVE = ("train_hf.py", "benchmarks", "tools", "examples")
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in ("microvlm", *ABOVE))
FILES += sorted(ROOT.glob("*_microvlm.py"))


def name_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ("microvlm", *parts) if path.parent == ROOT else parts


MODULES = {name_of(path) for path in FILES} | {name_of(path.parent / "x")[:-1] for path in FILES}


def imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of this repository that a file imports."""
    targets = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (*name_of(path)[: -node.level],) if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            targets |= {base + (alias.name,) if base + (alias.name,) in MODULES else base for alias in node.names}
    return {("microvlm", *target) if target == ("train_hf",) else target for target in targets} & MODULES


def layer(module: tuple[str, ...]) -> int:
    if module[0] != "microvlm" or module[1:] == ("train_hf",):
        return 6
    return 0 if module[1:] == () or module[1].endswith("_microvlm") else LAYER[module[1]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = name_of(path)
    for target in imports(path):
        assert layer(target) <= layer(own) or own[1:] == ("cli",) and target[1:] == ("train_hf",), f"{own} -> {target}"
        if layer(target) == layer(own) == 4:
            assert target[1] == own[1], f"siblings: {own} -> {target}"
        if len(target) > 1 and target[1].endswith("_microvlm"):
            assert layer(own) == 0 or own == ("microvlm", "model"), f"not through microvlm/model.py: {own} -> {target}"


def test_there_is_no_circle():
    TopologicalSorter({name_of(path): imports(path) - {name_of(path)} for path in FILES}).prepare()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_changes_how_python_imports(path):
    used = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not used & {"sys.path", "sys.modules"}
