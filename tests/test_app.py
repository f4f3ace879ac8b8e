"""The page: its handlers, its server, and the real thing in a browser.

APP_SCREENSHOTS=docs python -m pytest tests/test_app.py    # also takes docs/app_desktop.png and docs/app_phone.png
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import pytest
import torch
from conftest import ROOT, microvlm
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

gr = pytest.importorskip("gradio")

import httpx
from gradio_client.utils import apply_diff

from microvlm.commands.app import EXAMPLES, GONE, LONGEST, NO_MEMORY, Page, build, recall_table
from microvlm.files import one_line
from microvlm.inference import question_query
from microvlm.model import load
from microvlm.visualize.attention import Recall

SWAN, DRUM = {}, {}  # uploaded, see `uploads`
FACT, OTHER = "This is Bimo the swan.", "This is Tavo the drum."
SECONDS = 150  # for one step of the browser, on a busy machine


@pytest.fixture(scope="module", autouse=True)
def uploads(tmp_path_factory):
    """Make pytest's folder the one where gradio keeps uploads."""
    folder = tmp_path_factory.getbasetemp()
    for picture, name in ((SWAN, "swan.png"), (DRUM, "drum.png")):
        picture["path"] = shutil.copy(ROOT / "examples" / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def page():
    return Page(*load(ROOT))


@pytest.fixture(scope="module")
def taught(page):
    return page.teach(SWAN, f"  {FACT} ", None)[0]


def last(steps):
    steps = list(steps)
    return steps[-1], steps


# --- handlers


def test_a_caption_comes_in_pieces_and_is_the_models(page):
    (caption, said, maps), steps = last(page.look(SWAN, None))
    pixel_values = page.processor.image_processor([Image.open(SWAN["path"])], return_tensors="pt")["pixel_values"]
    prompt = page.model.default_prompt(1)
    pixel_values = pixel_values.to(page.model.dtype)
    ids = page.model.generate(input_ids=prompt, pixel_values=pixel_values, max_new_tokens=32, do_sample=False)
    assert caption == page.processor.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    texts = [step[0] for step in steps]
    assert len(set(texts)) > 1 and all(b.startswith(a) for a, b in zip(texts, texts[1:]))
    assert said == NO_MEMORY
    assert " ".join(label for _, label in maps) == " ".join(caption.split())
    assert all(picture.size == maps[0][0].size for picture, _ in maps)


def test_what_was_taught_is_recalled_listed_and_forgotten(page, taught):
    (_, said, maps), _ = last(page.look(SWAN, taught))
    assert "The memory speaks" in said and FACT in said and "class=speaks" in said
    assert all(re.search(r" \d+%$", label) for _, label in maps)
    (_, said, _), _ = last(page.look(DRUM, taught))
    assert "The memory is silent" in said and FACT in said
    listed, download, *answer = page.items(taught)
    ((label, uid),) = listed.choices
    assert label == f"0. {FACT}" and not download.visible and answer == ["", ""]
    empty = page.forget(uid, taught)
    assert last(page.look(SWAN, empty))[0][1] == NO_MEMORY
    assert page.items(empty)[0].choices == [] == page.items(None)[0].choices
    assert taught.counts.tolist() == [1]  # another visitor's would be untouched


def test_a_second_click_teaches_nothing(page, taught):
    assert page.teach(SWAN, FACT, taught)[0] is taught
    for picture, fact in ((SWAN, OTHER), (DRUM, FACT)):
        assert page.teach(picture, fact, taught)[0].counts.tolist() == [2]


def test_a_stale_choice_forgets_nothing_else(page, taught):
    both = page.teach(DRUM, OTHER, taught)[0]
    uid = page.items(both)[0].choices[0][1]
    left = page.forget(uid, both)
    assert [label for label, _ in page.items(left)[0].choices] == [f"0. {OTHER}"]
    with pytest.raises(gr.Error, match="nothing was forgotten"):
        page.forget(uid, left)


def test_a_question_is_answered_from_the_memory(page, taught):
    (answer, said), _ = last(page.ask("Who is the swan?", taught))
    assert answer and FACT in said and "Probability" in said
    assert last(page.ask("Who is the swan?", None))[0][1] == NO_MEMORY


def test_a_file_goes_and_comes_back(page, taught, tmp_path, monkeypatch):
    path, scratch = tmp_path / "mine.safetensors", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    saving = page.save(taught)
    button = next(saving)
    shutil.copy(button.value["path"] if isinstance(button.value, dict) else button.value, path)
    ours = lambda: [file for file in scratch.rglob("*.safetensors") if "gradio" not in file.parts]  # noqa: E731
    assert len(ours()) == 1 and list(saving) == [] and not ours()
    assert torch.equal(page.load(str(path)).mean, taught.mean)


def test_a_bad_file_is_refused_by_name(page, taught, tmp_path):
    good, cut, other, text = (tmp_path / f"{name}.safetensors" for name in ("good", "cut", "other", "text"))
    taught.save(good)
    cut.write_bytes(good.read_bytes()[:-1000])
    text.write_text("hello")
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(good), other, {**metadata, "fingerprint": "0" * 32})
    for path, why in ((cut, "not a whole"), (text, "not a whole"), (other, "another model")):
        with pytest.raises(gr.Error) as error:
            page.load(str(path))
        assert why in error.value.message and f"memory file {path.name} is refused" in error.value.message


def bad_pictures(folder):
    """Files that are no pictures or too large, each with a part of what is said."""
    names = ("broken", "empty", "cut", "large", "bomb", "no picture and " + "a long name " * 12)
    broken, empty, cut, large, bomb, long = (folder / f"{name}.png" for name in names)
    for path in (broken, long):
        path.write_bytes(b"no picture")
    empty.touch()
    cut.write_bytes(Path(SWAN["path"]).read_bytes()[:1000])
    Image.new("1", (9000, 9000)).save(large)
    Image.new("1", (20_000, 20_000)).save(bomb)
    unread = "is not an image that Pillow can read"
    whys = (unread, unread, "cannot be decoded", "9000 x 9000 pixels", "exceeds limit of", unread)
    return list(zip((broken, empty, cut, large, bomb, long), whys))


def test_a_bad_picture_is_refused_by_name(page, tmp_path):
    for path, why in bad_pictures(tmp_path):
        looking, picture = page.look({"path": str(path)}, None), {"path": str(path)}
        assert next(looking) == ("", "", [])  # nothing of the picture before
        for wrong in (lambda: list(looking), lambda: page.teach(picture, FACT, None)):  # noqa: B023
            with pytest.raises(gr.Error) as error:
                wrong()
            message = error.value.message
            assert message.startswith(path.name) and why in message and "\n" not in message
            assert tmp_path.parts[1] not in message.replace(path.name, "")


def test_a_picture_that_is_gone_is_told(page, tmp_path):
    for picture in ({"path": str(tmp_path / "gone.png")}, {"path": None}):
        for wrong in (lambda: list(page.look(picture, None)), lambda: page.teach(picture, FACT, None)):  # noqa: B023
            with pytest.raises(gr.Error) as error:
                wrong()
            assert error.value.message == GONE


def test_only_uploads_are_opened(page, taught, uploads, tmp_path):
    taught.save(facts := tmp_path / "facts.safetensors")
    outside = Path(tempfile.mkdtemp())
    try:
        for path in (SWAN["path"], facts):
            shutil.copy(path, outside)
        (tmp_path / "link.png").symlink_to(outside / "swan.png")
        for path in (outside / "swan.png", tmp_path / "link.png", f"{uploads}/../{outside.name}/swan.png", "\0", 5):
            picture = {"path": path if path == 5 else str(path)}
            for wrong in (lambda: list(page.look(picture, None)), lambda: page.teach(picture, FACT, None)):  # noqa: B023
                with pytest.raises(gr.Error) as error:
                    wrong()
                assert error.value.message == GONE
        with pytest.raises(gr.Error, match="Choose a file first."):
            page.load(str(outside / "facts.safetensors"))
    finally:
        shutil.rmtree(outside)


def test_files_stay_for_a_day(page):
    assert build(page.model, page.processor).delete_cache == (3600, 86400)


def test_a_checkpoint_without_memory_captions(page, tmp_path):
    for path in ROOT.iterdir():
        if path.is_file() and path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    config = json.loads((ROOT / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_memory": False}))
    plain = Page(*load(tmp_path))
    (caption, said, maps), _ = last(plain.look(SWAN, None))
    (expected, _, expected_maps), _ = last(page.look(SWAN, None))
    assert caption == expected and said == "" and [word for _, word in maps] == [word for _, word in expected_maps]
    for wrong in (lambda: plain.teach(SWAN, FACT, None), lambda: list(plain.ask("Who is the swan?", None))):
        with pytest.raises(gr.Error, match="no episodic memory"):
            wrong()

    def is_shown(block):
        return getattr(block, "visible", True) and (block.parent is None or is_shown(block.parent))

    for each, has_memory in ((page, True), (plain, False)):
        blocks = build(each.model, each.processor).blocks.values()
        visible = {block.elem_id: is_shown(block) for block in blocks if getattr(block, "elem_id", None)}
        assert visible["picture"] and visible["caption"] and visible["maps"]
        teaching = ("said", "sentence", "teach", "question", "ask", "answer", "stored", "forget", "save", "load")
        assert {visible[name] for name in teaching} == {has_memory}
        text = " ".join(block.value for block in blocks if isinstance(block, gr.Markdown))
        assert ("This checkpoint has no memory" in text) != has_memory == ("from the memory" in text)


@pytest.mark.parametrize("name", ["missing", "no/where", "empty"])
def test_a_checkpoint_that_cannot_be_loaded_is_a_line(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert microvlm("app", "--model", name) == 1
    error = capsys.readouterr().err
    assert error.startswith("microvlm: ") and error.count("\n") == 1


def test_a_taken_port_and_another_model_are_a_line(page, monkeypatch, capsys):
    monkeypatch.setattr("microvlm.commands.app.load", lambda *_: (page.model, page.processor))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert microvlm("app", "--port", port) == 1
    error = capsys.readouterr().err
    assert error.startswith("microvlm: ") and str(port) in error and error.count("\n") == 1
    monkeypatch.setattr(
        "microvlm.commands.app.load", lambda *_: (SimpleNamespace(config=SimpleNamespace(model_type="llava")), None)
    )
    assert microvlm("app") == 1
    assert "is a model of type llava, not a MicroVLM." in capsys.readouterr().err


def test_what_people_write_is_text(page):
    """No word is a control token or a placeholder, in sentences and in questions."""
    model, processor = page.model, page.processor
    for token in ("<|endoftext|>", "<image>", "<|assistant|>", "<|pad|>"):
        for sentence in (f"The {token} tag is a robot.", f"{token} is it", f"It is {token}"):
            memory = page.teach(SWAN, sentence, None)[0]
            assert page.items(memory)[0].choices[0][0] == f"0. {sentence}"
            assert f"0. {sentence!r} (" in memory.describe(processor) and model.forget(memory, sentence)
        ids = question_query(model, processor, f"Who is {token}?").input_ids[0].tolist()
        special = processor.tokenizer.all_special_ids
        assert [i for i in ids if i in special] == [2, 3] and processor.decode(ids[1:-1]) == f"Who is {token}?"
    assert question_query(model, processor, "Who?").input_ids.tolist() == [
        processor.tokenizer("<|user|>Who?<|assistant|>").input_ids
    ]


def test_wrong_use_is_told(page, taught):
    for wrong in (
        lambda: page.teach(None, FACT, None),
        lambda: page.teach(SWAN, "  ", None),
        lambda: page.teach(SWAN, "word " * 39, None),  # longer than can be stored
        lambda: list(page.ask(" ", None)),
        *(lambda wrong=wrong: page.teach(SWAN, wrong, None) for wrong in (None, 5, ["a"], {}, "word " * 20_000)),
        *(lambda wrong=wrong: list(page.ask(wrong, None)) for wrong in (None, 5, "a" * (LONGEST + 1))),
        lambda: page.forget(None, taught),
        lambda: page.forget("5", taught),
        lambda: page.forget("5", None),
        lambda: list(page.save(None)),
        lambda: page.load(None),
    ):
        with pytest.raises(gr.Error):
            wrong()
    assert last(page.look(None, taught))[0] == ("", "", [])


def test_an_error_while_generating_ends_the_stream(page, monkeypatch):
    def fail(**kwargs):
        raise ValueError("<b>no</b>")

    monkeypatch.setattr(page.model, "generate", fail)
    with pytest.raises(gr.Error, match="&lt;b&gt;no"):
        list(page.look(SWAN, None))


def test_sentences_are_shown_as_text(page):
    said = Recall(["<script>x</script>"] * 9, torch.arange(9.0) / 9, torch.ones(9), 0.9, 0.5, True)
    assert "<script" not in recall_table(said) and "and 3 more" in recall_table(said)


# --- server


class Address(str):
    """Where the page is served, and the `log` of its server."""

    log: Path


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log.txt"
    with log.open("w") as file:
        command = [sys.executable, "-m", "microvlm", "app", "--port", str(port)]
        environment = os.environ | {"GRADIO_TEMP_DIR": str(log.parent / "cache"), "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(2 * SECONDS):
            if f":{port}" in log.read_text():
                break
            assert server.poll() is None, log.read_text()
            time.sleep(1)
        else:
            pytest.fail(f"the page did not come up: {log.read_text()}")
        address = Address(f"http://127.0.0.1:{port}")
        address.log = log
        yield address
    finally:
        server.terminate()
        server.wait(30)


class Visitor:
    """What a browser sends for one visitor, without the browser."""

    def __init__(self, address, name):
        self.address, self.name, self.client = f"{address}/gradio_api", name, httpx.Client(timeout=SECONDS)
        events = self.client.get(f"{address}/config").json()["dependencies"]
        self.events = {event["api_name"]: event["id"] for event in events}

    def upload(self, path):
        with open(path, "rb") as file:
            (there,) = self.client.post(f"{self.address}/upload", files={"files": (path.name, file)}).json()
        return {"path": there, "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}

    def join(self, event, *data):
        event = {"data": data, "fn_index": self.events[event], "session_hash": self.name}
        self.client.post(f"{self.address}/queue/join", json=event).raise_for_status()

    def messages(self, event, *data):
        self.join(event, *data)
        path = f"{self.address}/queue/data"
        with self.client.stream("GET", path, params={"session_hash": self.name}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:") or "{}")
                if message.get("msg") in ("process_generating", "process_completed"):
                    yield message
                if message.get("msg") == "process_completed":
                    return

    def __call__(self, event, *data):
        """What an event ends in: its outputs as `data`, of those that do not stream, or an `error`."""
        return list(self.messages(event, *data))[-1]["output"]

    def last(self, event, *data):
        """The outputs of an event that streams, at its end."""
        outputs = []
        for message in self.messages(event, *data):
            for place, value in enumerate(message["output"].get("data", [])):
                if place >= len(outputs):
                    outputs.append(value)
                elif message["msg"] == "process_generating":  # changes since the message before
                    outputs[place] = apply_diff(outputs[place], value)
        return outputs


def test_a_bad_picture_is_refused_by_name_on_the_page(address, tmp_path):
    visitor = Visitor(address, "bad")
    visitor("load_example", 0)  # makes the component anew
    for path, why in bad_pictures(tmp_path):
        picture = visitor.upload(path)
        for said in (visitor("look", picture, None), visitor("teach", picture, FACT, None)):
            assert said["error"].startswith(path.name) and why in said["error"] and "/" not in said["error"]


def test_a_picture_that_is_gone_is_told_on_the_page(address, tmp_path):
    visitor = Visitor(address, "gone")
    path = tmp_path / "swan.png"
    shutil.copy(SWAN["path"], path)
    picture = visitor.upload(path)
    os.remove(picture["path"])
    assert visitor("look", picture, None)["error"] == visitor("teach", picture, FACT, None)["error"] == GONE
    assert "error" not in visitor("teach", visitor.upload(path), FACT, None)


@pytest.mark.parametrize("listed", [False, True], ids=["before the list is new", "after"])
def test_a_stale_choice_forgets_nothing_else_on_the_page(address, listed):
    visitor = Visitor(address, f"stale {listed}")
    for picture, fact in ((SWAN, FACT), (DRUM, OTHER)):
        assert "error" not in visitor("teach", visitor.upload(Path(picture["path"])), fact, None)
    choices = visitor("items", None)["data"][0]["choices"]
    first = json.loads(json.dumps(choices[0][1]), parse_int=lambda digits: int(float(digits)))  # as a browser
    assert "error" not in visitor("forget", first, None)
    if listed:
        visitor("items", None)
    assert "nothing was forgotten" in visitor("forget", first, None).get("error", "")
    names, _, *answer = visitor("items", None)["data"]
    assert [label for label, _ in names["choices"]] == [f"0. {OTHER}"] and answer == ["", ""]


PRIVATE = ("/etc/hostname", "/etc/no such file", str(ROOT / "examples" / "swan.png"), "file:///etc/hostname")


@pytest.mark.parametrize("meta", [None, {"_type": "gradio.FileData"}, {"_type": "x"}])
@pytest.mark.parametrize("url", [None, "/gradio_api/file=/etc/hostname", "http://127.0.0.1:9/a.png"])
def test_nothing_else_of_the_server_is_read(address, meta, url):
    visitor, said = Visitor(address, f"thief {meta} {url}"), set()
    for path in PRIVATE:
        file = {"path": path, "url": url} | ({} if meta is None else {"meta": meta})
        for output in (visitor("look", file, None), visitor("teach", file, FACT, None), visitor("load", file, None)):
            assert output["error"] is not None and "data" not in output, output
            said.add(output["error"].replace(path, "PATH").partition(" [type=")[0])  # pydantic repeats the input
    assert len(said) < 4  # the same for what is there and for what is not
    for path in PRIVATE:
        assert visitor.client.get(f"{visitor.address}/file={path}").status_code in (403, 404)


def test_no_address_is_fetched(address, taught):
    """gradio by itself downloads a `path` that is an address, into any component, and streams `/file=http...`."""
    visitor = Visitor(address, "fetch")
    for url in ("http://a.example/b.png", "https://huggingface.co/b.png", "http://127.0.0.1:1/"):
        file = {"path": url, "meta": {"_type": "gradio.FileData"}}
        events = ("look", file, None), ("teach", file, FACT, None), ("teach", None, file, None), ("load", file)
        for event in (*events, ("ask", file, None), ("ask", [{"a": file}], None), ("forget", file, None)):
            assert visitor(*event)["error"] == GONE, event
        for path in (url, url.replace(":", "%3A").replace("/", "%2F")):
            for start in ("file=", "file/"):
                response = visitor.client.get(f"{visitor.address}/{start}{path}")
                assert response.status_code == 403 and response.json()["detail"] == "This page does not do that."


def test_gradios_extras_are_off(address):
    visitor = Visitor(address, "extras")
    video = {"video": ("a.mp4", b"#EXTM3U", "video/mp4")}
    assert visitor.client.post(f"{visitor.address}/process_recording", files=video).status_code == 403
    for path in ("gradio_api/run-history/buckets", "gradio_api/runs", "monitoring", "monitoring/summary"):
        assert visitor.client.get(f"{address}/{path}").status_code in (403, 404), path


def test_a_huge_file_is_not_taken(address):
    """What the browser refuses by itself."""
    visitor = Visitor(address, "huge")
    kept = lambda: {path for path in (address.log.parent / "cache").rglob("*") if path.is_file()}  # noqa: E731
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    before, parts = kept(), (head, *[bytes(2**24)] * 13, b"\r\n--x--\r\n")
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert visitor.client.post(f"{visitor.address}/upload", content=iter(parts), headers=form).status_code == 413
    assert kept() == before


CONTROLS = "\x1b[31m\u202e\x07"


def test_the_log_of_the_server_is_plain(address, taught, tmp_path):
    """What visitors send cannot command the terminal, nor fill the log with traces."""
    visitor, before = Visitor(address, "log"), address.log.stat().st_size
    taught.save(good := tmp_path / "good.safetensors")
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(good), bad := tmp_path / "bad.safetensors", {**metadata, "version": CONTROLS})
    (named := tmp_path / f"{CONTROLS}.png").write_bytes(b"no picture")
    there = {"path": f"/etc/{CONTROLS}", "meta": {"_type": "gradio.FileData"}}
    picture = visitor.upload(named)
    for event in (("load", visitor.upload(bad)), ("look", picture, None), ("look", there, None), ("load", there)):
        error = visitor(*event)["error"]
        assert error and not re.search(r"[\x00-\x1f\u202e]", error), error
    assert address.log.read_text()[before:] == ""


def test_a_button_and_the_enter_key_are_one_event(page):
    events = build(page.model, page.processor).config["dependencies"]
    names = [event["api_name"] for event in events]
    looks = {event["trigger_mode"] for event in events if event["api_name"].startswith("look")}
    assert looks == {"always_last"}  # what was taught while a caption comes is shown
    assert [name for name in names if name.startswith(("teach", "ask"))] == ["teach", "ask"]


def test_what_a_browser_would_not_send_is_told(address):
    visitor, start = Visitor(address, "odd"), time.monotonic()
    picture = visitor.upload(Path(SWAN["path"]))
    for text in ("word " * 100_000, None, 5, [], {"a": 1}):
        for event in (("teach", picture, text, None), ("ask", text, None)):
            error = visitor(*event).get("error", "")
            if event[0] == "teach" or not isinstance(text, (int, list, dict)):  # gradio makes a text of these
                assert re.match(r"Type a (sentence|question) first\.|This text has 499999 characters", error), (
                    event,
                    error,
                )
    for odd in ("swan.png", 5, [], {}, {"path": 5}, {"path": None}, {"path": ["a"]}):
        assert visitor("look", odd, None)["error"] and visitor("teach", odd, FACT, None)["error"], odd
    for uid in (5, [], {"a": 1}, "x" * 10**6):
        assert "nothing was forgotten" in visitor("forget", uid, None)["error"]
    assert time.monotonic() - start < SECONDS
    assert "error" not in visitor("teach", picture, FACT, None)  # the page still works


def test_markup_in_a_sentence_is_text(address):
    visitor = Visitor(address, "markup")
    picture = visitor.upload(Path(SWAN["path"]))
    markup = "<img src=x onerror=alert(1)> is a swan."
    assert "error" not in visitor("teach", picture, markup, None)
    caption, *page = visitor.last("look", picture, None)
    assert caption == markup  # in a text box, which shows it as it is
    assert "&lt;img src=x" in json.dumps(page) and "<img src=x" not in json.dumps(page)


@pytest.fixture
def here(page):
    """A server in this process, whose model a test can change."""
    blocks = build(page.model, page.processor)
    try:
        yield blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, show_error=True)[1].rstrip("/")
    finally:
        blocks.close(verbose=False)


def test_two_visitors_are_served_at_once(here, page, monkeypatch):
    both, real = threading.Barrier(2), page.model.generate
    monkeypatch.setattr(page.model, "generate", lambda **kwargs: (both.wait(60), real(**kwargs))[1])
    visitors = [Visitor(here, name) for name in "ab"]
    pictures = [visitor.upload(Path(p["path"])) for visitor, p in zip(visitors, (SWAN, DRUM))]
    with ThreadPoolExecutor(2) as pool:
        captions = list(pool.map(lambda visitor, picture: visitor.last("look", picture, None)[0], visitors, pictures))
    monkeypatch.undo()
    assert captions == [last(page.look(picture, None))[0][0] for picture in (SWAN, DRUM)]


def test_who_leaves_stops_the_work(here, page, monkeypatch):
    steps, real, started = [], page.model.forward, threading.Event()

    @wraps(real)
    def forward(*args, **kwargs):
        steps.append(time.monotonic())
        started.set()
        time.sleep(0.5)
        return real(*args, **kwargs)

    monkeypatch.setattr(page.model, "forward", forward)
    monkeypatch.setattr(page.model.generation_config, "eos_token_id", None)  # 32 tokens
    visitor = Visitor(here, "leaves")
    visitor.join("ask", "Who is the swan?", None)
    with visitor.client.stream("GET", f"{visitor.address}/queue/data", params={"session_hash": visitor.name}):
        assert started.wait(60)
    time.sleep(3)
    count = len(steps)
    time.sleep(1.5)
    assert len(steps) == count < 16


# --- browser


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"]
    flags = [f"--{flag}" for flag in (*flags, "disable-sync", "no-first-run")]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags, timeout=1000 * SECONDS)
        yield browser
        browser.close()


MARKUP = (
    '<img src=x onerror="hit()">',
    "<script>hit()</script> &lt;b&gt;",
    "[a](javascript:hit())",
    "![b](http://a.example/b.png)",
    '<img src="//a.example/c.png">',
    "<svg onload=hit()>{{7*7}} **c**",
    "d\0e \u202efg\u202c \u200fh",
)


def test_markup_is_shown_as_it_was_typed(address, browser, tmp_path):
    """In sentences, questions, names and memory files: nothing runs, nothing leaves for another host."""
    from playwright.sync_api import expect

    expect.set_options(timeout=1000 * SECONDS)
    context = browser.new_context(viewport={"width": 1000, "height": 900}, accept_downloads=True)
    context.set_default_timeout(1000 * SECONDS)
    hosts, hits = set(), []
    context.on("request", lambda request: hosts.add(urlparse(request.url).netloc))
    context.expose_function("hit", lambda: hits.append("hit"))

    def open_tab():
        tab = context.new_page()
        tab.goto(address)
        tab.locator("#picture input[type=file]").first.set_input_files(SWAN["path"])
        expect(tab.locator("#caption textarea")).to_have_value(re.compile(r"\w+"))
        return tab

    tab = open_tab()
    box = lambda name: tab.locator(f"#{name} textarea, #{name} input").first  # noqa: E731
    shown = lambda text: text.replace("\0", "\ufffd")  # noqa: E731
    # sentences: in the table, in the list
    for count, text in enumerate(MARKUP, 1):
        box("sentence").fill(text)
        tab.locator("button#teach").click(click_count=1 if count < len(MARKUP) else 2)
        expect(tab.locator("#stored")).to_contain_text(f"({count})")
        expect(box("sentence")).to_have_value("")
    expect(tab.locator("#said tr")).to_have_count(len(MARKUP) + 1)
    cells = [cell.text_content() for cell in tab.locator("#said td:first-child").all()][:-1]
    assert len(cells) == 6 and set(cells) < {shown(text) for text in MARKUP}
    box("stored").click()
    assert [option.text_content().strip().removeprefix("✓").strip() for option in tab.get_by_role("option").all()] == [
        f"{number}. {text}" for number, text in enumerate(MARKUP)
    ]
    tab.keyboard.press("Escape")
    # a question that is too long, and one
    box("question").evaluate("box => box.removeAttribute('maxlength')")
    for text in ("word " * 20_000, MARKUP[0]):
        box("question").fill(text)
        tab.locator("button#ask").click()
        expect(tab.locator(".toast-body", has_text="This text has 99999 characters")).to_be_visible()
    expect(tab.locator("#answer_said")).to_contain_text(MARKUP[0])
    # another tab has a memory of its own; who leaves in the middle disturbs nobody
    other = open_tab()
    expect(other.locator("#said")).to_contain_text("The memory is empty.")
    other.locator("#question textarea, #question input").first.fill("Who is the swan?")
    other.locator("button#ask").click()
    other.close()
    # memory files, and what is none
    button = lambda name: tab.locator(f"button#{name}, #{name} button").first  # noqa: E731
    button("save").click()
    expect(tab.locator("#download")).to_be_visible()
    with tab.expect_download() as saved:
        tab.locator("#download").click()
    saved.value.save_as(good := tmp_path / "good.safetensors")
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    upload = tab.locator("input[data-testid$=upload-button]").or_(tab.locator("#load input[type=file]")).first
    for key in ("fingerprint", "version", "noise"):
        path, text = tmp_path / f"{key}.safetensors", " ".join(MARKUP[:5])
        save_file(load_file(good), path, {**metadata, key: text})
        upload.set_input_files(path)
        expect(tab.locator(".toast-body", has_text=path.name).first).to_contain_text(text)
    # names of files
    text = "<img src=x onerror=hit()> [a](javascript:hit()) &lt;b&gt; \u202ea\u202c"
    for chooser, suffix in ((upload, "safetensors"), (tab.locator("#picture input[type=file]").first, "png")):
        (path := tmp_path / f"{text}.{suffix}").write_bytes(b"neither")
        chooser.set_input_files(path)
        name = one_line(re.sub(r"[<>:]", "", path.name))  # as gradio keeps it
        expect(tab.locator(".toast-body", has_text=name).first).to_be_visible()
    assert not hits and not tab.locator("img[src=x], svg[onload], [href^=javascript]").count()
    context.close()
    assert hosts - {""} == {urlparse(address).netloc}


def screenshot(tab, name):
    folder = os.environ.get("APP_SCREENSHOTS")
    if folder:
        tab.evaluate("window.scrollTo(0, 0)")
        tab.wait_for_timeout(8000)  # the last words come
        path = Path(folder) / name
        tab.screenshot(path=path, full_page=True)
        with Image.open(path) as picture:
            picture.convert("RGB").quantize(128).save(path, optimize=True)


def test_in_a_browser(address, browser, tmp_path):
    from playwright.sync_api import expect

    expect.set_options(timeout=1000 * SECONDS)
    context = browser.new_context(viewport={"width": 1000, "height": 900}, accept_downloads=True)
    context.set_default_timeout(1000 * SECONDS)
    tab, hosts = context.new_page(), set()
    tab.on("request", lambda request: hosts.add(urlparse(request.url).netloc))
    caption, said = tab.locator("#caption textarea"), tab.locator("#said")
    button = lambda name: tab.locator(f"button#{name}, #{name} button").first  # noqa: E731

    def show(path):
        tab.locator("#picture input[type=file]").first.set_input_files(path)

    def choose(fact):
        tab.locator("#stored input").click()
        tab.get_by_role("option", name=fact).click()

    def open_page():
        tab.goto(address)
        expect(tab.locator("#picture input[type=file]").first).to_be_attached()

    def example(name):
        tab.locator("button.gallery-item").nth(EXAMPLES.index(name)).click()

    open_page()
    show(SWAN["path"])
    expect(caption).to_have_value(re.compile(r"\w+"))
    expect(said).to_contain_text("The memory is empty.")
    expect(tab.locator("#maps img").first).to_be_visible()

    tab.locator("#sentence textarea, #sentence input").first.fill(FACT)
    button("teach").click()
    expect(said).to_contain_text("The memory speaks.")
    expect(said).to_contain_text(FACT)
    tab.locator("#question textarea, #question input").first.fill("Who is the swan?")
    button("ask").click()
    expect(tab.locator("#answer_said")).to_contain_text(FACT)
    expect(tab.locator("#answer textarea")).to_have_value(re.compile(r"\w+"))
    expect(tab.locator("#maps")).to_contain_text("%")
    screenshot(tab, "app_desktop.png")

    button("save").click()
    download = tab.locator("#download")
    expect(download).to_be_visible()
    with tab.expect_download() as saved:
        download.click()
    facts = tmp_path / "facts.safetensors"
    saved.value.save_as(facts)

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    show(broken)
    expect(tab.get_by_text("broken.png is not an image that Pillow can read as PNG").first).to_be_visible()
    expect(caption).to_have_value("")

    example("drum")
    expect(said).to_contain_text("The memory is silent.")
    tab.locator("#sentence textarea, #sentence input").first.fill(OTHER)
    button("teach").click()
    expect(tab.locator("#stored")).to_contain_text("(2)")
    expect(tab.locator("#answer textarea")).to_have_value("")
    expect(tab.locator("#answer_said")).not_to_contain_text(FACT)
    example("swan")
    expect(said).to_contain_text("The memory speaks.")

    choose(FACT)
    button("forget").dblclick()
    expect(said).to_contain_text("The memory is silent.")
    expect(tab.locator("#stored")).to_contain_text("(1)")
    choose(OTHER)
    button("forget").click()
    expect(said).to_contain_text("The memory is empty.")

    # a reload takes the memory away, the file brings it back; on a phone this time
    tab.set_viewport_size({"width": 360, "height": 740})
    open_page()
    show(SWAN["path"])
    expect(said).to_contain_text("The memory is empty.")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(facts.read_bytes()[:-1000])
    upload = tab.locator("input[data-testid$=upload-button]").or_(tab.locator("#load input[type=file]")).first
    upload.set_input_files(cut)
    expect(tab.get_by_text("cut.safetensors is refused")).to_be_visible()
    expect(said).to_contain_text("The memory is empty.")
    upload.set_input_files(facts)
    expect(said).to_contain_text("The memory speaks.")
    expect(said).to_contain_text(FACT)
    expect(tab.locator("#maps")).to_contain_text("%")
    expect(tab.get_by_text("cut.safetensors is refused")).to_be_hidden()
    every = "[...document.querySelectorAll('.gradio-container *')]"
    wide = f"{every}.filter(e => e.getBoundingClientRect().right > 361).length"
    widths = tab.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
    cells = "[...document.querySelectorAll('#maps .caption-label, #said td, #answer_said td')]"
    cut = f"{cells}.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)"
    assert tab.locator("#maps .caption-label").count() == len(FACT.split()) and tab.evaluate(cut) == []
    screenshot(tab, "app_phone.png")
    assert widths == [360, 360], f"{tab.evaluate(wide)} elements are too wide"
    context.close()
    assert hosts - {""} == {urlparse(address).netloc}  # nothing comes from elsewhere
