"""The supported range of transformers: stated once, checked at import, and both ends found by tools/compat.py."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import compat
import pytest
from conftest import ROOT
from microvlm.configuration_microvlm import TRANSFORMERS
from packaging.version import Version

FAKED = """
import importlib.metadata, json, sys
from transformers import AutoConfig
said, real = {}, importlib.metadata.version
for version in sys.argv[2:]:
    importlib.metadata.version = lambda name: version if name == "transformers" else real(name)
    try:
        said[version] = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).model_type
    except ImportError as error:
        said[version] = str(error)
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]
print(json.dumps(said))
"""


def test_what_is_no_version_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        compat.main(["abc"])
    assert "invalid Version value: 'abc'" in capsys.readouterr().err


def test_other_versions_are_refused_by_name(tmp_path):
    found = compat.supported()
    lowest, end = (next(s.version for s in found if s.operator == sign) for sign in (">=", "<"))
    wanted = f">={lowest},<{end}"
    below = f"{Version(lowest).major}.{Version(lowest).minor - 1}.9"
    good = [lowest, f"{lowest}.0", f"{lowest}.1.dev0", f"{Version(end).major - 1}.999.0"]
    bad = ["4.57.6", below, end, f"{end}.0.0.dev0", f"{end}.1.0"]
    done = subprocess.run(
        [sys.executable, "-c", FAKED, str(ROOT), *good, *bad],
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    message = (
        f"transformers{wanted}.dev0 is required for a normal functioning of this module, but found "
        f"transformers=={{}}.\nMicroVLM: pip install 'transformers{wanted}'"
    )
    assert said == dict.fromkeys(good, "microvlm") | {name: message.format(name) for name in bad}


def test_the_range_is_the_same_everywhere():
    assert version("transformers") in compat.supported()
    assert {s.operator: s.version for s in compat.supported()} == dict(zip((">=", "<"), TRANSFORMERS))


def test_only_what_differs_is_run(monkeypatch, capsys):
    ran = []
    installed = Version(version("transformers"))
    monkeypatch.setattr(compat, "run", lambda number, expected: ran.append(number) or number != "5.998.0")
    monkeypatch.setattr(compat, "use", lambda path: {})
    (lowest,) = (s.version for s in compat.supported() if s.operator == ">=")
    differs = [lowest] if Version(lowest) != installed else []

    monkeypatch.setattr(compat, "newest", lambda wanted: str(installed))
    assert compat.main([]) == 0 and ran == differs
    said = capsys.readouterr().out
    assert f"lowest {lowest}, newest {installed}, installed {installed}." in said
    assert ("nothing to do" in said) == (not differs)

    ran.clear()
    monkeypatch.setattr(compat, "newest", lambda wanted: "5.999.0")
    assert compat.main([]) == 0 and ran == [*differs, "5.999.0"]
    monkeypatch.setattr(compat, "newest", lambda wanted: None)
    assert compat.main([]) == 0 and "pip cannot look" in capsys.readouterr().out
    assert compat.main(["5.998.0", "5.999.0"]) == 1 and ran[-2:] == ["5.998.0", "5.999.0"]


def test_an_overlay_comes_first(monkeypatch, tmp_path):
    """A version in a folder of its own is the one that the checkpoint runs with; its words are those of the installed one."""
    installed = version("transformers")
    (tmp_path / "sitecustomize.py").write_text("import transformers\ntransformers.__version__ = '5.777.0'\n")
    with monkeypatch.context() as patch:
        patch.setattr(compat, "overlay", lambda wanted: tmp_path)
        patch.setattr(compat, "TESTS", ("--version",))
        expected = compat.use(None)
        assert expected["transformers"] == Version(installed)
        assert compat.run("5.777.0", expected)


def test_differences_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(compat, "overlay", lambda number: None)
    monkeypatch.setattr(compat, "TESTS", ("--version",))
    answers = {"caption": "A cat.", "transformers": Version("5.23.0")}
    monkeypatch.setattr(compat, "use", lambda path: answers)
    expected = answers | {"transformers": Version("5.24.0")}
    assert compat.run("5.23", expected)
    assert not compat.run("5.22.0", expected) and not compat.run("5.23", expected | {"caption": "A dog."})
    assert "'A cat.'" in capsys.readouterr().out.splitlines()[-1]
