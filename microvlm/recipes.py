"""Read recipe files: YAML, with `--set section.key=value` to change a value, which is YAML too."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import type_validator

from .model import require

DOTTED_KEYS = ("config", "learning_rates", "modules")  # sections whose own keys have dots


class RecipeLoader(yaml.SafeLoader):
    """Read YAML 1.1, but `1e-4` is a number and a repeated key is refused."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.value != "<<"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_recipe(path: str | Path, overrides: list[str] = ()) -> dict[str, Any]:
    """Read the values of a recipe of any kind, with the overrides."""
    values = parse(Path(path).read_text(), str(path))
    require(isinstance(values, dict), f"{path} is no recipe: expected keys with values, got {values!r}.")
    for override in overrides:
        set_value(values, override)
    return values


def set_value(values: dict[str, Any], override: str) -> None:
    """Change one value by its dotted name, `section.key=value`."""
    name, equals, value = override.partition("=")
    require(bool(equals), f"--set takes key=value, got {override!r}.")
    *parents, leaf = name.split(".", 1 if name.partition(".")[0] in DOTTED_KEYS else -1)
    for parent in parents:
        values[parent] = values = values.get(parent) or {}
        require(isinstance(values, dict), f"--set {name}: {parent} is {values!r}, not a section.")
    values[leaf] = parse(value, f"--set {name}")


def parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}.") from error


def check_keys(section: str, keys: Iterable[str], known: Iterable[str]) -> None:
    unknown = ", ".join(sorted(map(str, set(keys) - set(known))))
    require(not unknown, f"unknown key in {section}: {unknown}. Known: {', '.join(sorted(known))}.")


def check_types(name: str | Path, values: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """Refuse unknown keys and values of another type than in `kinds`; returns the values that are not None."""
    check_keys(str(name), values, kinds)
    for key, kind in kinds.items():
        try:
            type_validator(key, values.get(key), kind)
        except TypeError as error:
            raise ValueError(f"{name}: {error}.") from error
    return {key: value for key, value in values.items() if value is not None}
