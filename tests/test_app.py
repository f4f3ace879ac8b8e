"""The page: its handlers, and the real thing in a browser.

APP_SCREENSHOTS=docs python -m pytest tests/test_app.py    # also takes docs/app_desktop.png and docs/app_phone.png
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

gr = pytest.importorskip("gradio")

import app  # noqa: E402
from caption import load  # noqa: E402

SWAN, DRUM = (str(ROOT / "examples" / name) for name in ("swan.png", "drum.png"))
FACT = "This is Bimo the swan."
SECONDS = 150  # for one step of the browser, on a busy machine


@pytest.fixture(scope="module")
def page():
    return app.Page(*load(ROOT))


@pytest.fixture(scope="module")
def taught(page):
    return page.teach(SWAN, f"  {FACT} ", None)[0]


def last(steps):
    steps = list(steps)
    return steps[-1], steps


# ------------------------------------------------------------------------------------------------------------------- handlers


def test_a_caption_comes_in_pieces_and_is_the_models(page):
    (caption, said, maps), steps = last(page.look(SWAN, None))
    pixel_values = page.processor.image_processor([Image.open(SWAN)], return_tensors="pt")["pixel_values"]
    prompt = page.model.default_prompt(1)
    pixel_values = pixel_values.to(page.model.dtype)
    ids = page.model.generate(input_ids=prompt, pixel_values=pixel_values, max_new_tokens=32, do_sample=False)
    assert caption == page.processor.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    texts = [step[0] for step in steps]
    assert len(set(texts)) > 1 and all(b.startswith(a) for a, b in zip(texts, texts[1:]))
    assert said == app.NO_MEMORY
    assert " ".join(label for _, label in maps) == " ".join(caption.split())
    assert all(picture.size == maps[0][0].size for picture, _ in maps)


def test_what_was_taught_is_recalled_listed_and_forgotten(page, taught):
    (_, said, maps), _ = last(page.look(SWAN, taught))
    assert "The memory speaks" in said and FACT in said and "class=speaks" in said
    assert all(re.search(r" \d+%$", label) for _, label in maps)
    (_, said, _), _ = last(page.look(DRUM, taught))
    assert "The memory is silent" in said and FACT in said
    listed, download = page.items(taught)
    assert listed.choices == [(f"0. {FACT}", 0)] and not download.visible
    empty = page.forget(0, taught)
    assert last(page.look(SWAN, empty))[0][1] == app.NO_MEMORY
    assert page.items(empty)[0].choices == [] == page.items(None)[0].choices
    assert taught.counts.tolist() == [1]  # another visitor's would be untouched


def test_a_question_is_answered_from_the_memory(page, taught):
    (answer, said), _ = last(page.ask("Who is the swan?", taught))
    assert answer and FACT in said and "Probability" in said
    assert last(page.ask("Who is the swan?", None))[0][1] == app.NO_MEMORY


def test_a_file_goes_and_comes_back(page, taught, tmp_path):
    path = tmp_path / "mine.safetensors"
    saving = page.save(taught)
    button = next(saving)
    shutil.copy(button.value["path"] if isinstance(button.value, dict) else button.value, path)
    written = button.value["path"] if isinstance(button.value, dict) else button.value
    assert list(saving) == []
    assert not os.path.exists(written) or "gradio" in written  # ours is gone
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


def test_wrong_use_is_told(page, taught, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for wrong in (
        lambda: page.teach(None, FACT, None),
        lambda: page.teach(SWAN, "  ", None),
        lambda: page.teach(SWAN, "word " * 100, None),  # longer than can be stored
        lambda: list(page.ask(" ", None)),
        lambda: list(page.look(str(broken), None)),
        lambda: page.forget(None, taught),
        lambda: page.forget(5, taught),
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
    said = app.Recall(["<script>x</script>"] * 9, torch.arange(9.0) / 9, torch.ones(9), 0.9, 0.5, True)
    assert "<script" not in app.table(said) and "and 3 more" in app.table(said)


# -------------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log.txt"
    with log.open("w") as file:
        command = [sys.executable, str(ROOT / "app.py"), "--port", str(port)]
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
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


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

    def open_page():
        tab.goto(address)
        expect(tab.locator("#picture input[type=file]").first).to_be_attached()

    def example(name):
        tab.locator("button.gallery-item").nth(app.EXAMPLES.index(name)).click()

    open_page()
    show(SWAN)
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

    example("drum")
    expect(said).to_contain_text("The memory is silent.")
    example("swan")
    expect(said).to_contain_text("The memory speaks.")

    tab.locator("#stored input").click()
    tab.get_by_role("option", name=FACT).click()
    button("forget").click()
    expect(said).to_contain_text("The memory is empty.")

    # a reload takes the memory away, the file brings it back; on a phone this time
    tab.set_viewport_size({"width": 360, "height": 740})
    open_page()
    show(SWAN)
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
    wide = "[...document.querySelectorAll('.gradio-container *')].filter(e => e.getBoundingClientRect().right > 361).length"
    widths = tab.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
    cut = "[...document.querySelectorAll('#maps .caption-label, #said td, #answer_said td')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)"
    assert tab.locator("#maps .caption-label").count() == len(FACT.split()) and tab.evaluate(cut) == []
    screenshot(tab, "app_phone.png")
    assert widths == [360, 360], f"{tab.evaluate(wide)} elements are too wide"
    context.close()
    assert hosts - {""} == {urlparse(address).netloc}  # nothing comes from elsewhere
