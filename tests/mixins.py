"""transformers' own test mixins, from the `tests/` folder that `TRANSFORMERS_TESTS` names.

A checkout of transformers holds all of them. Its source archive lacks the folders below `tests/`: for the names in
`ELSEWHERE` stands an empty class there, and `MISSING` tells which.
"""

import importlib
import os
import sys
import types
from pathlib import Path

PACKAGE = "transformers_tests"  # not `tests`, which is this folder
FOLDER = Path(os.environ["TRANSFORMERS_TESTS"]).resolve()
ELSEWHERE = {
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}
IMAGE, IMAGES = Path(__file__).parents[1] / "examples/chipmunk.png", (".png", ".jpg", ".jpeg")
MISSING = [name for name in ELSEWHERE if not (FOLDER / name.replace(".", "/")).with_suffix(".py").is_file()]


def package(name: str, folder: Path | None) -> types.ModuleType:
    """A package of a folder, with or without an `__init__.py`."""
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [str(folder)]
    return module


def mixin(module: str, name: str):
    """One class of transformers' tests."""
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)


package(PACKAGE, FOLDER)
script = sys.modules["fetch_hub_objects_for_ci"] = types.ModuleType("fetch_hub_objects_for_ci")
script.url_to_local_path = lambda url: str(IMAGE) if url.endswith(IMAGES) else url  # no network
for missing in MISSING:
    folder, module = missing.split(".")
    package(f"{PACKAGE}.{folder}", FOLDER / folder)
    stub = sys.modules[f"{PACKAGE}.{missing}"] = types.ModuleType(f"{PACKAGE}.{missing}")
    vars(stub).update(ELSEWHERE[missing])
