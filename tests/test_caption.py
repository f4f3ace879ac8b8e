"""microvlm caption: pictures in, captions out, whatever lies among the pictures."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice

import pytest
import torch
from conftest import microvlm
from PIL import Image
from test_processing import picture, save_checkpoint

from microvlm.commands.caption import ContactSheet, HtmlPage, JsonLines
from microvlm.commands.memory import show_answer
from microvlm.files import atomic_file
from microvlm.images import find_images, natural_key
from microvlm.inference import Answer, Caption, caption
from microvlm.model import load, open_image

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint, device="cpu")


@pytest.fixture
def pictures(tmp_path):
    """Eleven pictures in a folder, one of them broken, beside a text file and a folder with another."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for i in range(1, 12):
        picture(30 + i, 20, seed=i).save(folder / f"p{i}.png")
    (folder / "p3.png").write_bytes((folder / "p3.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no picture")
    picture(seed=99).save(folder / "more" / "deep.JPG", "JPEG")
    picture().save(folder / ".hidden.png")
    return folder


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "microvlm", "caption", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, **kwargs)


def names(paths):
    return [os.path.basename(path) for path in paths]


# --- the command


def test_command_with_all_outputs(checkpoint, pictures, tmp_path):
    """From another directory, with a folder, a glob that names some of it again, and a file that is not there."""
    outputs = {name: tmp_path / f"out.{name}" for name in ("json", "html", "png")}
    options = [x for name, path in outputs.items() for x in (f"--{name}", path)]
    sources = [pictures, pictures / "p1*.png", pictures / "gone.png"]
    result = run(*sources, "--model", checkpoint, "--batch-size", 4, "--max-new-tokens", 4, *options, cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("microvlm: ")]
    assert errors == [
        f"microvlm: no image at {pictures / 'gone.png'}",
        f"microvlm: {pictures / 'p3.png'} cannot be decoded: image file is truncated",
    ]
    good = [str(pictures / f"p{i}.png") for i in range(1, 12) if i != 3]
    lines = [line.partition(": ") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == good and all(line[2] for line in lines)

    rows = [json.loads(line) for line in outputs["json"].read_text().splitlines()]
    assert names(row["path"] for row in rows) == [f"p{i}.png" for i in range(1, 12)]
    assert [(row["path"], row["caption"]) for row in rows if "caption" in row] == [(a, b) for a, _, b in lines]
    assert "truncated" in rows[2]["error"] and set(rows[2]) == {"path", "error"}

    page = outputs["html"].read_text()
    assert page.count("<figure>") == 11 and page.count('src="data:image/jpeg;base64,') == 10
    assert (
        page.startswith("<!doctype html>") and page.endswith("</main></body></html>\n") and "width=device-width" in page
    )
    assert html.escape(lines[0][2]) in page and "truncated" in page and "http" not in page

    sheet = Image.open(outputs["png"])
    sheet.load()
    assert sheet.format == "PNG" and sheet.size == (5 * 252 + 12, 3 * 336 + 12)
    assert sorted(names(tmp_path.iterdir())) == ["out.html", "out.json", "out.png", "pictures"]


# --- in this process


def call(capsys, *arguments):
    code = microvlm("caption", *arguments)
    return code, *capsys.readouterr()


@pytest.fixture
def no_loading(monkeypatch, loaded):
    monkeypatch.setattr("microvlm.commands.caption.load", lambda *args: loaded)


def test_all_well(no_loading, pictures, capsys):
    code, out, _ = call(capsys, pictures / "p1.png", "--max-new-tokens", 2)
    assert code == 0 and out.startswith(f"{pictures / 'p1.png'}: ") and out.count("\n") == 1


def test_command_with_a_prompt_to_the_terminal(no_loading, pictures, capsys):
    options = ["--prompt", "what is it?", "--json", "-", "--num-beams", 2]
    code, out, err = call(capsys, pictures / "p1.png", *options)
    assert code == 0, err
    (row,) = [json.loads(line) for line in out.splitlines()]
    assert row["path"] == str(pictures / "p1.png") and row["caption"]


def test_command_without_pictures(tmp_path, capsys):
    code, out, err = call(capsys, tmp_path, tmp_path / "*.png")
    assert code == 1 and out == ""
    assert f"microvlm: no image at {tmp_path}\n" in err and "nothing to caption" in err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "/nowhere/at/all"], "nowhere"),
        (["more.png", "--html", "/nowhere/page.html", "again.png"], "there is no folder /nowhere."),  # in any order
        (["--html", "/nowhere/page.html"], "cannot write /nowhere/page.html: there is no folder /nowhere."),
    ],
)
def test_what_cannot_be_done_is_said_before_it_is_tried(pictures, capsys, options, message):
    code, out, err = call(capsys, pictures, "--json", pictures / "out.json", *options)
    assert code == 1 and out == "" and message in err
    assert not [name for name in names(pictures.iterdir()) if "out.json" in name]


@pytest.mark.parametrize(
    "output, message",
    [
        ("more", "cannot write more: it is not a regular file."),
        ("new/", "cannot write new/: it is not a regular file."),
        ("", "cannot write : it is not a regular file."),
        ("n" * 250, f"cannot write {'n' * 250}: File name too long."),
        ("more/../p1.png", "--html would be written over the input more/../p1.png."),
        ("more/../out.json", "--json and --html are the same file, more/../out.json."),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_loading(pictures, capsys, monkeypatch, output, message):
    monkeypatch.setattr("microvlm.commands.caption.load", None)
    monkeypatch.chdir(pictures)
    before = names(pictures.iterdir())
    code, out, err = call(capsys, "p1.png", "--json", "out.json", "--html", output)
    assert code == 1 and out == "" and err == f"microvlm: {message}\n"
    assert names(pictures.iterdir()) == before


def test_a_sheet_in_its_own_folder_is_made_again(checkpoint, pictures, capsys, monkeypatch):
    monkeypatch.chdir(pictures)
    for _ in range(2):
        code, *_ = call(capsys, ".", "--png", "sheet.png", "--model", checkpoint, "--max-new-tokens", "1")
        assert code == 1  # one of the pictures is broken
    with Image.open("sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 300


@pytest.mark.parametrize("device", ["cuda:99", "meta", "toaster"])
def test_a_device_that_is_not_there_is_said_in_a_line(pictures, capsys, device):
    code, _, err = call(capsys, pictures, "--device", device)
    assert code == 2 and f"Invalid value for '--device': cannot use {device!r}: " in err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--batch-size", "--max-new-tokens", "--num-beams"])
@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_numbers_are_checked(option, value, capsys):
    code, _, err = call(capsys, "a.png", f"{option}={value}")
    assert code == 2 and f"Invalid value for '{option}'" in err


def test_contact_sheet_has_a_limit(pictures, capsys, monkeypatch):
    monkeypatch.setattr(ContactSheet, "MAX_IMAGES", 5)
    code, _, err = call(capsys, pictures, "--png", pictures / "out.png")
    assert code == 1 and "a contact sheet holds 5 images, 11 were found: use --html." in err
    assert not (pictures / "out.png").exists()


def test_a_failure_leaves_the_old_file_and_nothing_else(no_loading, loaded, pictures, capsys, monkeypatch):
    (pictures / "out.json").write_text("old")

    def fail(**kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(loaded[0], "generate", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        call(capsys, pictures, "--json", pictures / "out.json", "--html", pictures / "out.html")
    assert (pictures / "out.json").read_text() == "old"
    assert [name for name in names(pictures.iterdir()) if "out." in name] == ["out.json"]


def test_interrupted(no_loading, loaded, pictures, capsys, monkeypatch):
    generate, calls = loaded[0].generate, []

    def interrupt(**kwargs):
        calls.append(kwargs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(**kwargs)

    monkeypatch.setattr(loaded[0], "generate", interrupt)
    options = ["--json", pictures / "out.json", "--html", pictures / "out.html", "--batch-size", 2]
    code, _, err = call(capsys, pictures, *options)
    assert code == 130 and "microvlm: interrupted after 5 of 11 images" in err
    assert len((pictures / "out.json").read_text().splitlines()) == 5
    assert (pictures / "out.html").read_text().endswith("</html>\n")


# --- its parts


def test_natural_order():
    files = ["p10.png", "p2.png", "P1.png", "a.png", "10.png", "9.png"]
    assert sorted(files, key=natural_key) == ["9.png", "10.png", "a.png", "P1.png", "p2.png", "p10.png"]


def test_finding_pictures(pictures, monkeypatch):
    everything = [f"p{i}.png" for i in range(1, 12)]
    paths, missing = find_images([pictures])
    assert names(paths) == everything and missing == []
    assert names(find_images([pictures], recursive=True)[0]) == [*everything, "deep.JPG"]
    assert names(find_images([pictures / "p?.png"])[0]) == everything[:9]
    assert names(find_images([f"{pictures}/**/*.JPG"])[0]) == ["deep.JPG"]
    assert names(find_images([f"{pictures}/mor*"])[0]) == ["deep.JPG"]
    assert names(find_images([pictures / "notes.txt"])[0]) == ["notes.txt"]  # named outright
    monkeypatch.chdir(pictures)
    os.symlink("p2.png", "link.png")
    paths, missing = find_images(["p5.png", "./p5.png", "p2.png", "link.png", ".", "gone", "x*", "http://a/b"])
    assert paths == ["p5.png", "p2.png", *(f"./{n}" for n in everything if n not in ("p5.png", "p2.png")), "http://a/b"]
    assert missing == ["gone", "x*"]
    os.rename("p1.png", "p[1].png")
    assert find_images(["p[1].png"])[0] == ["p[1].png"]


def captions(loaded, paths, **kwargs):
    result = list(caption(*loaded, paths, **({"max_new_tokens": 6, "do_sample": False} | kwargs)))
    assert [c.path for c in result] == list(paths)
    return [c.text for c in result]


@pytest.mark.parametrize("prompt", [None, "what is it?"])
def test_batched_captions_are_the_single_ones(loaded, pictures, prompt):
    paths = [str(pictures / f"p{i}.png") for i in range(1, 12)]
    single = captions(loaded, paths, batch_size=1, prompt=prompt)
    assert single[2] is None and len(set(single)) > 2  # the pictures matter
    for batch_size in (2, 4, 5, 100):
        assert captions(loaded, paths, batch_size=batch_size, prompt=prompt) == single
    assert captions(loaded, paths, num_beams=3, batch_size=4) == captions(loaded, paths, num_beams=3, batch_size=1)


def test_captions_are_what_the_model_says(loaded, pictures):
    model, processor = loaded
    path = str(pictures / "p1.png")
    inputs = processor(images=path, text="<|user|><image>what is it?<|assistant|>", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert captions(loaded, [path], prompt="what is it?") == [processor.decode(output[0]).strip()]
    output = model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=6, do_sample=False)
    said = output[0, model.default_prompt(1).shape[1] :]
    assert said.numel() == 6 and captions(loaded, [path]) == [processor.decode(said).strip()]
    assert captions(loaded, [path], prompt="<image> or <|pad|>?") != captions(loaded, [path], prompt="what is it?")


def test_only_one_batch_is_opened_at_a_time(loaded, pictures, monkeypatch):
    opened, real = [], open_image
    monkeypatch.setattr("microvlm.inference.open_image", lambda *a: opened.append(a) or real(*a))
    paths = [str(pictures / f"p{i % 2 + 1}.png") for i in range(1000)]
    results = caption(*loaded, paths, batch_size=4, max_new_tokens=1)
    assert len(list(islice(results, 5))) == 5 and len(opened) == 8


def test_the_processors_size_limit_holds(loaded, pictures, monkeypatch):
    monkeypatch.setattr(loaded[1].image_processor, "pixel_limit", 100)
    (result,) = caption(*loaded, [str(pictures / "p1.png")])
    assert result.text is None and "has 31 x 20 pixels, the limit is 100" in result.error


def test_a_prompt_is_needed_from_somewhere(loaded, monkeypatch):
    with pytest.raises(ValueError, match="Linear has no default prompt: give one"):
        caption(torch.nn.Linear(1, 1), loaded[1], [])
    monkeypatch.setattr(loaded[1], "chat_template", None)
    with pytest.raises(ValueError, match="chat template"):
        caption(*loaded, [], prompt="what is it?")


def test_nothing_breaks_out_of_the_page(tmp_path):
    bad = '<script>alert("x")</script>&'
    with atomic_file(tmp_path / "page.html", "w") as file:
        page = HtmlPage(file)
        page.add(Caption(f"{bad}.png", text=bad, image=picture(2000, 100)))
        page.add(Caption("b\udc80.png", error=bad))
        page.finish()
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and text.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;&amp;") == 4
    assert 'width="560" height="28"' in text and len(re.findall("<img ", text)) == 1


def test_any_file_name_and_caption_is_one_json_line(tmp_path):
    with atomic_file(tmp_path / "a.json", "w") as file:
        lines = JsonLines(file)
        lines.add(Caption("b\udc80\n.png", text='é "two"\nlines'))
    (tmp_path / "other").touch()
    assert (tmp_path / "a.json").stat().st_mode == (
        tmp_path / "other"
    ).stat().st_mode  # not private as a temporary file
    (line,) = (tmp_path / "a.json").read_text().splitlines()
    assert json.loads(line) == {"path": "b\udc80\n.png", "caption": 'é "two"\nlines'} and "é" in line


NASTY = "a\n\x1b[31m\x9b2J\u202eb.png"


def test_names_do_not_command_the_terminal(no_loading, pictures, tmp_path, capsys):
    shutil.copy(pictures / "p1.png", tmp_path / NASTY)
    (tmp_path / f"bad{NASTY}").write_bytes(b"text")
    good, bad, gone = (tmp_path / f"{start}{NASTY}" for start in ("", "bad", "gone"))
    for options in ([], ["--json", "-"]):
        code, out, err = call(capsys, good, bad, gone, "--max-new-tokens", 2, *options)
        lines = [*out.splitlines(), *err.splitlines()]
        assert code == 1 and len(lines) == (4 if options else 3), lines
        assert not set("\x1b\x9b\u202e\u2028") & set(out + err) and "a\\n\\u001b" in out.replace("\\u000a", "\\n")
        if options:
            assert {json.loads(line)["path"] for line in out.splitlines()} == {str(good), str(bad)}


def test_what_the_memory_says_does_not_command_the_terminal(capsys):
    show_answer(NASTY, Answer("\x1b]0;title\a"))
    assert capsys.readouterr().out == "a\\u000a\\u001b[31m\\u009b2J\\u202eb.png: \\u001b]0;title\\u0007\n"


def test_a_picture_that_does_not_fit_into_memory_ends_nothing(loaded, pictures, monkeypatch):
    def opened(path, *args):
        if path == "large.png":
            raise MemoryError
        return open_image(path, *args)

    monkeypatch.setattr("microvlm.inference.open_image", opened)
    large, good = caption(*loaded, ["large.png", str(pictures / "p1.png")], max_new_tokens=2)
    assert large.error == "large.png needs more memory than there is." and good.text


def test_long_captions_stay_in_their_cell(tmp_path):
    sheet = ContactSheet(tmp_path / "a.png", 3)
    for text in ("WORD " * 200, "W" * 5000, ""):
        sheet.add(Caption("name" * 100, text=text, image=picture(1000, 1)))
    sheet.finish()
    image = Image.open(tmp_path / "a.png").convert("L")
    gaps = [image.crop((x, 0, x + sheet.gap, image.height)) for x in (0, 252, 504, 756)]
    assert all(gap.getextrema() == (255, 255) for gap in gaps)
    assert image.crop((0, image.height - sheet.gap, image.width, image.height)).getextrema() == (255, 255)
    assert image.crop((12, 12 + sheet.cell, 12 + sheet.cell, image.height)).getextrema()[0] < 128  # there is text
    below = [image.crop((x, sheet.cell + 66, x + sheet.cell, image.height)).tobytes() for x in (12, 264, 516)]
    assert below[0] == below[1] == below[2]  # the file's name, whatever the caption
