"""The files that a Hub repo publishes: what they import, and that importing and using them touches nothing of the
machine."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from release import build, code_files

PUBLISHED = code_files(ROOT)
STANDARD = {
    "atexit",
    "base64",
    "collections",
    "concurrent",
    "contextlib",
    "ctypes",
    "dataclasses",
    "datetime",
    "functools",
    "glob",
    "hashlib",
    "io",
    "json",
    "math",
    "os",
    "pathlib",
    "re",
    "struct",
    "sys",
    "threading",
    "time",
    "typing",
    "uuid",
    "warnings",
}
LIBRARIES = {"PIL", "numpy", "packaging", "safetensors", "timm", "tokenizers", "torch", "transformers"}
PARTS = {"huggingface_hub.dataclasses", "huggingface_hub.errors"}  # of a library whose rest is not allowed
OPTIONAL = {"llvmlite"}  # in a function, or where their absence is caught
NETWORK = {"processing_microvlm.py": {"http", "urllib"}}  # a picture may be a URL, fetched when it is asked for
EVERYWHERE = {"eval", "exec", "__import__", "os.system", "os.popen", "os.execv", "os.fork", "ctypes.CDLL", "torch.load"}
# What no statement may call when a file is imported: names, whole modules, methods of whatever object.
AT_IMPORT = EVERYWHERE | {"open", "compile", "input", "getattr", "setattr", "globals", "vars", "io.open"}
MODULES_AT_IMPORT = {"ctypes", "http", "importlib", "os", "pathlib", "pickle", "safetensors", "shutil", "socket"}
MODULES_AT_IMPORT |= {"subprocess", "tempfile", "urllib", "requests", "httpx", "httpx2", "huggingface_hub"}
METHODS_AT_IMPORT = {"read_text", "read_bytes", "write_text", "write_bytes", "unlink", "from_pretrained", "from_file"}
METHODS_AT_IMPORT |= {
    "urlopen",
    "load_library",
    "load_state_dict_from_url",
    "download",
    "Popen",
    "system",
    "LoadLibrary",
}
HARMLESS = {"os.register_at_fork", "os.fspath", "os.environ.get"}


def aliases(tree: ast.Module) -> dict[str, str]:
    """Name in a file -> what it stands for, dotted, of everything that is imported anywhere in it."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`a.b.c` of an expression, its first name resolved; what is no name counts as `?`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def run_at_import(tree: ast.Module) -> list[ast.AST]:
    """Every node that runs when the file is imported: module and class bodies, decorators, defaults, annotations, and
    the bodies
    of the file's own functions and methods that any of these name."""
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    classes = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    found, entered = [], set()

    def enter(function) -> None:
        if id(function) not in entered:
            entered.add(id(function))
            for statement in function.body:
                walk(statement)

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
            parts += [a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.annotation]
            for part in [*parts, *filter(None, [node.returns])]:
                walk(part)
            for decorator in node.decorator_list:
                called(decorator)
            return
        found.append(node)
        if isinstance(node, ast.Call):
            called(node.func)
        for child in ast.iter_child_nodes(node):
            walk(child)

    def called(name: ast.expr) -> None:
        if isinstance(name, ast.Name) and name.id in functions:
            enter(functions[name.id])
        elif isinstance(name, ast.Name) and name.id in classes:
            for method in classes[name.id].body:
                if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__new__", "__post_init__"):
                    enter(method)
        elif isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name) and name.value.id in classes:
            for method in classes[name.value.id].body:
                if isinstance(method, ast.FunctionDef) and method.name == name.attr:
                    enter(method)

    walk(tree)
    return found


def guarded_imports(tree: ast.Module) -> set[int]:
    """ids of the imports in functions, or in the body of a `try` that catches ImportError."""
    found = set()
    for node in ast.walk(tree):
        body = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
        elif isinstance(node, ast.Try):
            caught = {getattr(handler.type, "id", None) for handler in node.handlers}
            body = node.body if caught & {"ImportError", "ModuleNotFoundError"} else []
        found |= {id(inner) for statement in body for inner in ast.walk(statement)}
    return found


def violations(name: str, source: str, published=PUBLISHED) -> list[str]:
    """What a published file does that it may not, in words."""
    tree, found = ast.parse(source), []
    guarded, names = guarded_imports(tree), aliases(tree)
    allowed = STANDARD | LIBRARIES | NETWORK.get(name, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or f"{node.module}.py" not in published:
                found.append(f"imports {'.' * node.level}{node.module or ''}, which is not published")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for module in [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]:
                top = module.split(".")[0]
                if top in OPTIONAL and id(node) not in guarded:
                    found.append(f"needs {top}, which is optional")
                elif top not in allowed | OPTIONAL and module not in PARTS:
                    found.append(f"imports {module}")
        elif isinstance(node, ast.Call) and dotted(node.func, names) in EVERYWHERE:
            found.append(f"calls {dotted(node.func, names)}")
    for node in run_at_import(tree):
        if isinstance(node, ast.Call):
            call = dotted(node.func, names)
            if call in HARMLESS:
                continue
            top, method = call.split(".")[0], call.split(".")[-1]
            imported = top in {target.split(".")[0] for target in names.values()}
            if (
                call in AT_IMPORT
                or (imported and top in MODULES_AT_IMPORT)
                or ("." in call and method in METHODS_AT_IMPORT)
            ):
                found.append(f"calls {call} when it is imported")
        elif isinstance(node, ast.Attribute) and dotted(node, names).startswith(("ctypes.cdll", "ctypes.pydll")):
            found.append("loads a library with ctypes when it is imported")
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_harmless(name):
    assert violations(name, (ROOT / name).read_text()) == []


def test_all_files_are_looked_at():
    mixed_in = {"alignment_microvlm.py", "generation_microvlm.py", "memory_mixin_microvlm.py"}
    others = {"modeling_microvlm.py", "processing_microvlm.py", "kernels_microvlm.py", "llvm_microvlm.py"}
    assert mixed_in | others <= set(PUBLISHED)


@pytest.mark.parametrize(
    "source,expected",
    [
        ("import requests", "imports requests"),
        ("import os, subprocess as sp", "imports subprocess"),
        ("def f():\n    from socket import socket", "imports socket"),
        ("from huggingface_hub import snapshot_download", "imports huggingface_hub"),
        ("from urllib.request import urlopen", "imports urllib.request"),
        ("from .data_microvlm import load_rows", "imports .data_microvlm, which is not published"),
        ("from . import memory_microvlm", "imports ., which is not published"),
        ("from ..memory_microvlm import address", "imports ..memory_microvlm, which is not published"),
        ("import llvmlite", "needs llvmlite, which is optional"),
        ("try:\n    import llvmlite\nexcept ValueError:\n    pass", "needs llvmlite, which is optional"),
        ("open('facts.txt')", "calls open when it is imported"),
        ("with open('facts.txt', 'w') as f:\n    pass", "calls open when it is imported"),
        ("import io\nX = io.open('a')", "calls io.open when it is imported"),
        ("import os as o\no.remove('a')", "calls os.remove when it is imported"),
        ("from os import makedirs as m\nm('a')", "calls os.makedirs when it is imported"),
        ("from pathlib import Path\nX = Path('a').read_text()", "calls ?.read_text when it is imported"),
        ("class A:\n    x = open('a')", "calls open when it is imported"),
        ("class A:\n    def f(self, x=open('a')):\n        pass", "calls open when it is imported"),
        ("def f(*, x=[open(n) for n in 'ab']):\n    pass", "calls open when it is imported"),
        ("def f(x: open('a')):\n    pass", "calls open when it is imported"),
        ("def g(f):\n    open('a')\n@g\ndef f():\n    pass", "calls open when it is imported"),
        ("def f():\n    g()\ndef g():\n    open('a')\nf()", "calls open when it is imported"),
        ("class A:\n    def __init__(self):\n        open('a')\nX = A()", "calls open when it is imported"),
        ("class A:\n    @staticmethod\n    def f():\n        open('a')\nA.f()", "calls open when it is imported"),
        ("(lambda: open('a'))()", "calls open when it is imported"),
        ("import sys\nif sys.argv:\n    open('a')", "calls open when it is imported"),
        ("import os\nX = getattr(os, 'sys' + 'tem')('ls')", "calls getattr when it is imported"),
        ("import ctypes\nX = ctypes.CDLL('libc.so.6')", "calls ctypes.CDLL"),
        ("import ctypes\nX = ctypes.cdll.LoadLibrary('libc.so.6')", "loads a library with ctypes when it is imported"),
        ("import torch\nX = torch.hub.load_state_dict_from_url('u')", "calls torch.hub.load_state_dict_from_url when"),
        (
            "from transformers import AutoModel\nM = AutoModel.from_pretrained('a/b')",
            "calls transformers.AutoModel.from",
        ),
        ("def f(x):\n    return eval(x)", "calls eval"),
        ("def f():\n    exec('x')", "calls exec"),
        ("def f():\n    __import__('socket')", "calls __import__"),
        ("import os\ndef f():\n    os.system('ls')", "calls os.system"),
        ("import torch\ndef f(p):\n    return torch.load(p)", "calls torch.load"),
    ],
)
def test_a_violation_is_seen(source, expected):
    name = "memory_microvlm.py"
    changed = f"{(ROOT / name).read_text()}\n{source}\n"
    assert any(said.startswith(expected) for said in violations(name, changed)), violations(name, changed)


def test_what_a_call_does_later_is_allowed():
    source = "def f(path):\n    with open(path) as file:\n        return file.read()\n"
    source += "try:\n    import llvmlite\nexcept ImportError:\n    llvmlite = None\ndef g():\n    import llvmlite\n"
    assert violations("memory_microvlm.py", source) == []


# --- the same files, watched while they are imported and used

GUARD = """
import json, os, sys, tempfile
import torch, transformers, PIL.Image
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

folder, scratch, what = sys.argv[1:]
allowed = (os.path.realpath(scratch) + os.sep, "/dev/null")
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate"}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"}
refused = []

def guard(event, arguments):
    paths = ()
    if event == "open":
        paths = arguments[:1] if (arguments[2] or 0) & WRITE else ()
    elif event in CHANGES:
        paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
    elif not (event in STARTS or event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib."))):
        return
    bad = [p for p in paths if not isinstance(p, int) and not os.path.realpath(os.fsdecode(p)).startswith(allowed)]
    if bad or not paths and event != "open":
        refused.append([event, str(bad or arguments)])  # code may swallow the exception, not this
        raise PermissionError(f"{event} {bad or arguments}")

sys.addaudithook(guard)
said = {}
if what == "config":
    said["config"] = AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type
else:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    picture = os.path.join(folder, "examples", "swan.png")
    fact = processor(images=picture, text="<image>This is Bimo the swan.", return_tensors="pt")
    memory = model.write_memory(**fact)
    memory.save(os.path.join(scratch, "facts.safetensors"))
    memory = model.load_memory(os.path.join(scratch, "facts.safetensors"))
    inputs = processor(images=picture, text="<|user|><image><|assistant|>", return_tensors="pt")
    out = model.generate(**inputs, memory=memory, max_new_tokens=32, do_sample=False)
    said["taught"] = processor.batch_decode(out, skip_special_tokens=True)[0]
    said["caption"] = len(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
    model.save_pretrained(os.path.join(scratch, "copy"))
print(json.dumps({"refused": refused, **said}))
"""


@pytest.fixture
def published(tmp_path) -> Path:
    """What a Hub repo holds, to change."""
    folder = tmp_path / "published"
    folder.mkdir()
    build(ROOT, folder, "someone/microvlm", "v1.0.0")
    return folder


def watched(folder: Path, what: str) -> dict:
    """What the guarded process saw; it may write into a folder of its own and nowhere else."""
    scratch = folder.parent / "scratch"
    scratch.mkdir()
    ours = ("PYTHONPATH", "HF_MODULES_CACHE", "HF_HUB_CACHE")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "home"), "TMPDIR": str(scratch)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", GUARD, str(folder), str(scratch), what],
        cwd=folder.parent,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_use_touches_nothing_outside(published):
    before = {p: p.stat().st_mtime_ns for p in published.rglob("*")}
    said = watched(published, "all")
    assert said["refused"] == []
    assert said["taught"] == "This is Bimo the swan." and said["caption"] > 1
    assert {p: p.stat().st_mtime_ns for p in published.rglob("*")} == before


MALICE = {
    "open": "open({outside!r}, 'w').write('x')",
    "os.remove": "import os; os.remove({kept!r})",
    "os.rename": "import os; os.rename({kept!r}, {outside!r})",
    "os.mkdir": "import os; os.mkdir({outside!r})",
    "os.symlink": "import os; os.symlink({kept!r}, {outside!r})",
    "subprocess.Popen": "import subprocess; subprocess.run(['touch', {outside!r}])",
    "os.system": "import os; os.system('touch ' + {outside!r})",
    "os.posix_spawn": "import os; os.posix_spawn('/usr/bin/touch', ['touch', {outside!r}], dict(os.environ))",
    "socket.__new__": "import socket; socket.socket()",
    "socket.getaddrinfo": "import socket; socket.getaddrinfo('localhost', 80)",
    "urllib.Request": "import urllib.request as u; u.urlopen('http://localhost:9')",
}


def test_the_guard_sees_malice(published, tmp_path):
    outside, kept = tmp_path / "outside", tmp_path / "kept"
    kept.write_text("mine")
    lines = [
        f"try:\n    {line.format(outside=str(outside), kept=str(kept))}\nexcept Exception:\n    pass"
        for line in MALICE.values()
    ]
    with (published / "configuration_microvlm.py").open("a") as file:
        file.write("\n" + "\n".join(lines) + "\n")
    said = watched(published, "config")
    assert said["config"] == "microvlm"
    assert [event for event, _ in said["refused"]] == list(MALICE)
    assert kept.read_text() == "mine" and not outside.exists()
