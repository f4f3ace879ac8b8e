"""Heat maps of the adapter, of words, and pictures of the memory, against a float64 reference made from the weights."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_ID, ROOT, VOCAB, microvlm, outspoken_model
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoProcessor

from microvlm.inference import image_query
from microvlm.model import load
from microvlm.visualize.attention import (
    WordAttention,
    eager_copy,
    pooling_attention,
    recall,
    split_words,
    stored_sentences,
    word_attention,
)
from microvlm.visualize.figures import (
    contrast_figure,
    memory_figure,
    overlay,
    overlay_signed,
    pooling_figure,
    sheet,
    word_figure,
)

MEMORY = {"num_slots": 8, "code_size": 32, "num_memory_tokens": 3, "max_content_tokens": 12}
CAPTIONS = [[17, 50, 23, 9, 61], [40, 7, 7]]


@pytest.fixture(scope="module")
def processor():
    """The shipped one: the tiny models' words are the first 128 of its vocabulary."""
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    processor.image_processor.size = {"height": 32, "width": 32}
    return processor


@pytest.fixture(scope="module")
def model():
    return outspoken_model("qwen2", use_memory=True, memory_config=MEMORY)


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def heads_of(x, count):
    return x.unflatten(-1, (count, -1)).transpose(-2, -3)  # (..., heads, T, head_dim)


def linear(x, module):
    return F.linear(x, module.weight.double(), None if module.bias is None else module.bias.double())


def reference_pooling(model, pixel_values):
    """The adapter's attention, (B, P, 4, 4), from its weights."""
    adapter = model.model.adapter
    patches = model.model.vision_tower(pixel_values, do_pooling=False).last_hidden_state[:, 1:].double()
    x = (patches - adapter.patch_mean.double()) / adapter.patch_std.double()
    x = linear(F.gelu(linear(x, adapter.fc1)), adapter.fc2)
    q = heads_of(linear(adapter.query_tokens.double(), adapter.q_proj), 4)
    k = heads_of(linear(x, adapter.k_proj), 4)
    scores = torch.einsum("hpd,bhnd->bhpn", q, k) / math.sqrt(8)
    return scores.softmax(-1).mean(1).unflatten(-1, (4, 4))


def rms_norm(x, module):
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight.double()


def turn(x, angles):
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def reference_attention(model, x):
    """Mean attention of a Qwen2 decoder over layers and heads for one sequence (T, D): (T, T)."""
    text, found, T = model.model.language_model, [], len(x)
    angles = torch.arange(T).double().unsqueeze(1) * text.rotary_emb.inv_freq.double()
    for layer in text.layers:
        part, normed = layer.self_attn, rms_norm(x, layer.input_layernorm)
        q, k = (turn(heads_of(linear(normed, p), n), angles) for p, n in ((part.q_proj, 4), (part.k_proj, 2)))
        v = heads_of(linear(normed, part.v_proj), 2)
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        scores = q @ k.mT / math.sqrt(8)
        attention = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
        x = x + linear((attention @ v).transpose(0, 1).flatten(1), part.o_proj)
        normed = rms_norm(x, layer.post_attention_layernorm)
        mlp = layer.mlp
        x = x + linear(F.silu(linear(normed, mlp.gate_proj)) * linear(normed, mlp.up_proj), mlp.down_proj)
        found.append(attention.mean(0))
    return torch.stack(found).mean(0)


@torch.no_grad()
def test_pooling_is_the_adapters_attention(model, pictures):
    maps = pooling_attention(model, pictures)
    assert maps.shape == (2, 5, 4, 4) and maps.dtype == torch.float32
    torch.testing.assert_close(maps.double(), reference_pooling(model, pictures), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 5))
    assert (maps[0] - maps[1]).abs().max() > 0.01  # it looks at the picture
    for row in range(2):
        torch.testing.assert_close(pooling_attention(model, pictures[row : row + 1])[0], maps[row])


@torch.no_grad()
def test_words_look_where_the_decoder_does(model, processor, pictures):
    found = word_attention(model, processor, pictures, CAPTIONS)
    prefix = model.get_image_features(pictures, return_dict=True).pooler_output
    pooling, prompt = reference_pooling(model, pictures), model.default_prompt(1)[0]
    for row, caption in enumerate(CAPTIONS):
        ids = torch.cat([prompt, torch.tensor(caption[:-1])])
        x = model.get_input_embeddings()(ids).double()
        of_picture = ids == IMAGE_ID
        x[of_picture] = prefix[row].double()
        attention = reference_attention(model, x)[len(prompt) - 1 :][:, of_picture]  # (tokens, P)
        words = split_words(processor.tokenizer, caption)
        attention = torch.stack([attention[places].mean(0) for _, places in words])
        maps = torch.einsum("wp,phv->whv", attention, pooling[row])
        assert found[row].words == [word for word, _ in words]
        torch.testing.assert_close(found[row].prefix.double(), attention, atol=1e-5, rtol=1e-3)
        expected = maps / maps.sum((1, 2), keepdim=True)
        torch.testing.assert_close(found[row].maps.double(), expected, atol=1e-5, rtol=1e-3)
        assert found[row].memory.abs().max() == 0


def test_contrast_is_what_a_word_has_beyond_the_mean(model, processor, pictures, monkeypatch):
    every_token = lambda tokenizer, ids: [(str(i), [place]) for place, i in enumerate(ids)]  # noqa: E731
    monkeypatch.setattr("microvlm.visualize.attention.split_words", every_token)
    found = word_attention(model, processor, pictures[:1], CAPTIONS[:1])[0]
    maps, contrast = found.maps.double(), found.contrast()
    assert len(found.words) > 2 and contrast.shape == maps.shape
    for word in range(len(maps)):
        others = sum(maps[i] for i in range(len(maps)) if i != word)
        expected = maps[word] * (len(maps) - 1) / len(maps) - others / len(maps)
        torch.testing.assert_close(contrast[word].double(), expected, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(contrast.mean(0), torch.zeros(4, 4), atol=1e-7, rtol=0)
    torch.testing.assert_close(contrast.sum((1, 2)), torch.zeros(len(maps)), atol=1e-6, rtol=0)
    assert contrast.abs().max() > 1e-3  # words differ
    assert word_attention(model, processor, pictures[:1], [[17]])[0].contrast().abs().max() == 0  # one is its own mean
    assert word_attention(model, processor, pictures[:1], [[]])[0].contrast().shape == (0, 4, 4)


def test_words_sum_to_one_alone_as_in_a_batch(model, processor, pictures):
    before = model.model.language_model.config._attn_implementation
    found = word_attention(model, processor, pictures)
    assert model.model.language_model.config._attn_implementation == before != "eager"
    for row in range(2):
        assert found[row].words and len(found[row].words) == len(found[row].maps)
        torch.testing.assert_close(found[row].maps.sum((1, 2)), torch.ones(len(found[row].words)))
        alone = word_attention(model, processor, pictures[row : row + 1])[0]
        assert alone.words == found[row].words
        torch.testing.assert_close(alone.maps, found[row].maps, atol=1e-5, rtol=1e-4)


def test_the_model_stays_as_it_is_meanwhile(model, processor, pictures):
    """Another thread may caption with it: only a copy of the language model returns its attention."""
    text, seen = model.model.language_model, []
    state = lambda: (text.config._attn_implementation, model.config.text_config._attn_implementation)  # noqa: E731
    before = state()
    hook = model.lm_head.register_forward_pre_hook(lambda *_: seen.append(state()))
    try:
        word_attention(model, processor, pictures, CAPTIONS)
    finally:
        hook.remove()
    assert seen == [before] and "eager" not in before
    twin = eager_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert twin.model.vision_tower is model.model.vision_tower and twin.model.language_model is not text
    assert twin.config.text_config is twin.model.language_model.config and state() == before


def test_a_copy_shares_what_kernels_have_laid_out():
    nano = load(ROOT)[0]
    layers = (copy.model.language_model.layers[0].mlp.up_proj for copy in (nano, eager_copy(nano)))
    assert next(layers)._matrix is next(layers)._matrix


def test_a_caption_without_words(model, processor, pictures):
    empty = word_attention(model, processor, pictures, [[], CAPTIONS[0]])
    assert empty[0].words == [] and empty[0].maps.shape == (0, 4, 4) and len(empty[1].words)
    assert word_attention(model, processor, pictures[:1], [[]])[0].words == []


def fact(model, picture, words):
    ids = torch.tensor([[*[IMAGE_ID] * 5, *words]])
    return {"input_ids": ids, "pixel_values": picture}


def test_a_word_tells_what_it_took_from_the_memory(model, processor, pictures):
    memory = model.write_memory(**fact(model, pictures[:1], [20, 30, 40]))
    off = model.model.config.memory_config.scope_threshold
    try:
        for threshold, speaks in ((0.0, True), (1.0, False)):
            model.model.config.memory_config.scope_threshold = threshold
            found = word_attention(model, processor, pictures[:1], CAPTIONS[:1], memory)[0]
            assert bool((found.memory > 0).all()) == speaks == bool((found.memory > 0).any())
            assert bool((found.prefix.sum(1) + found.memory <= 1.001).all())
            torch.testing.assert_close(found.maps.sum((1, 2)), torch.ones(len(found.words)))
    finally:
        model.model.config.memory_config.scope_threshold = off


def test_recall_is_what_the_memory_says(model, processor, pictures):
    memory = model.write_memory(**fact(model, pictures[:1], [20, 30, 40]))
    memory = model.write_memory(memory, **fact(model, pictures[1:], [50, 60]))
    assert stored_sentences(memory, processor) == [processor.decode(x).strip() for x in ([20, 30, 40], [50, 60])]
    image = model.get_image_features(pictures[:1], return_dict=True)
    prompt = model.default_prompt(1)
    said = recall(model, processor, memory, prompt, image)
    with torch.no_grad():
        key = model.model.memory.image_keys(image.last_hidden_state, 1)
        address = F.normalize(model.model.memory.address(key), dim=-1)[0]
    torch.testing.assert_close(said.cosines, memory.addresses[0] @ address)
    scope = model(input_ids=prompt, pixel_values=pictures[:1], memory=memory).scope_probability
    assert said.probability == pytest.approx(float(scope.detach()), abs=1e-5)
    assert said.speaks == (said.probability >= said.threshold)
    memory = model.forget(memory, 0)
    assert len(recall(model, processor, memory, prompt, image).items) == 1
    words = recall(model, processor, memory, torch.tensor([[50, 60]]))  # asked in words
    assert float(words.cosines[0]) == pytest.approx(1, abs=0.3) and len(words.shares) == 1
    empty = recall(model, processor, model.new_memory(), prompt, image)
    assert empty.items == [] and not empty.speaks and empty.cosines.shape == (0,)


@pytest.mark.parametrize("place", [(0, 0), (1, 3), (3, 2)])
def test_heat_is_where_the_map_is(place):
    picture, delta = Image.new("RGB", (80, 40), "gray"), torch.zeros(4, 4)
    delta[place] = 1
    shown = overlay(picture, delta)
    assert shown.size == (80, 40) and shown.mode == "RGB"
    pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).view(40, 80, 3).float()
    yellow = pixels[..., 0] + pixels[..., 1] - pixels[..., 2]
    hottest = divmod(int(yellow.argmax()), 80)
    assert (hottest[0] // 10, hottest[1] // 20) == place
    far = (3 - place[0]) * 10 + 5, (3 - place[1]) * 20 + 10
    assert pixels[far].max() - pixels[far].min() <= 1  # grey: nothing looks there


def test_a_flat_map_is_cold():
    flat = overlay(Image.new("RGB", (8, 8), "white"), torch.full((2, 2), 0.25))
    assert len(flat.getcolors()) == 1 and len(set(flat.getpixel((0, 0)))) == 1


def test_signs_have_colours_and_one_scale():
    picture, map = Image.new("RGB", (40, 40), (100, 100, 100)), torch.zeros(4, 4)
    map[0, 0], map[3, 3] = 0.5, -0.25
    shown = overlay_signed(picture, map, 0.5)
    more, less, nothing = (shown.getpixel(place) for place in ((0, 0), (39, 39), (0, 39)))
    assert nothing == (85, 85, 85) and more[0] > 200 > 100 > more[2] and less[2] > nothing[2] > less[0]
    assert more[0] - nothing[0] > 1.5 * (less[2] - nothing[2])  # half as far from 0
    assert overlay_signed(picture, map, 1.0).getpixel((0, 0))[0] < more[0]
    assert overlay_signed(picture, torch.zeros(4, 4), 0.0).getcolors() == [(1600, (85, 85, 85))]


def test_words_are_joined_from_tokens(processor):
    ids = processor.tokenizer("This is Kesora the robot.", add_special_tokens=False)["input_ids"]
    words = split_words(processor.tokenizer, ids)
    assert [word for word, _ in words] == ["This", "is", "Kesora", "the", "robot."]
    assert [place for _, places in words for place in places] == list(range(len(ids)))
    assert len(words[2][1]) > 1  # a name it never saw
    assert split_words(processor.tokenizer, []) == []


def test_figures(model, processor, pictures, monkeypatch):
    picture = Image.effect_noise((300, 200), 40).convert("RGB")
    found = word_attention(model, processor, pictures[:1], CAPTIONS[:1])[0]
    assert pooling_figure(picture, pooling_attention(model, pictures)[0]).width > 800
    assert word_figure(picture, found).width > 300
    assert contrast_figure(picture, found).size == word_figure(picture, found).size
    nothing = WordAttention([], torch.zeros(0, 4, 4), torch.zeros(0, 5), torch.zeros(0))
    assert contrast_figure(picture, nothing).size == word_figure(picture, nothing).size
    memory = model.write_memory(**fact(model, pictures[:1], [20, 30, 40]))
    images = [
        memory_figure(model, processor, memory),
        memory_figure(model, processor, memory, picture),
        memory_figure(model, processor, model.new_memory(), picture),
    ]
    assert len({image.tobytes() for image in images}) == 3
    with pytest.raises(ValueError, match="2 rows"):
        memory_figure(model, processor, model.new_memory(2))
    monkeypatch.setattr(
        "microvlm.visualize.figures.stored_sentences", lambda *_: [r"It costs $\frac{$ or $5."]
    )  # no formula
    memory_figure(model, processor, memory)
    assert sheet([(picture, "one")], 5).width < 200


@pytest.mark.parametrize("facts", [0, 1, 24, 25, 32])
def test_names_of_a_full_memory_do_not_overlap(model, processor, monkeypatch, facts):
    """Where there are too many some are named, at their places; of the query's items the most alike are shown."""
    memory, seen, save = model.new_memory(), [], Figure.savefig
    with torch.no_grad():
        addresses = torch.randn(1, facts, memory.addresses.shape[2], generator=torch.Generator().manual_seed(0))
        contents = torch.zeros(1, facts, memory.contents.shape[2])
        ids = torch.full((1, facts, memory.token_ids.shape[2]), -1)
        ids[..., :3] = torch.arange(9, 9 + facts)[None, :, None] % VOCAB
        memory = memory.write(addresses, contents, token_ids=ids) if facts else memory
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (seen.append(self), save(self, *args, **kw))[1])
    picture = Image.effect_noise((300, 200), 40).convert("RGB")
    memory_figure(model, processor, memory, picture)
    slots, at, alike, query = seen[0].axes[:4]
    asked = image_query(model, processor, picture)
    cosines = recall(model, processor, memory, asked.input_ids, asked.image).cosines
    boxes = [label.get_window_extent() for label in alike.get_xticklabels()]
    assert facts < 2 or all(one.x1 + 2 <= two.x0 for one, two in zip(boxes, boxes[1:]))
    for axes in (at, alike, query):
        labels = axes.get_yticklabels()
        boxes = [label.get_window_extent() for label in labels]
        assert all(one.y0 >= two.y1 - 1 for one, two in zip(boxes, boxes[1:]))
        numbers = [int(label.get_text().split()[0]) for label in labels]
        assert len(numbers) <= 24 and (facts > 24 or numbers == list(range(facts)))
        if axes is query:
            assert sorted(numbers) == numbers and set(numbers) == set(cosines.topk(min(24, facts)).indices.tolist())
            bars = [bar.get_width() for bar in axes.containers[0]] if facts else []
            assert bars == pytest.approx(cosines[numbers].tolist(), abs=1e-6)
        else:
            assert [place for place in axes.get_yticks()] == numbers


def interrupted(*_):
    raise KeyboardInterrupt


def test_command_line(tmp_path, capsys, monkeypatch):
    """On the shipped model and example pictures."""
    model, processor = load(ROOT)
    monkeypatch.setattr("microvlm.visualize.run.load", lambda *args: (model, processor))  # once for all calls
    swan, out = str(ROOT / "examples/swan.png"), tmp_path / "out"
    inputs = processor(images=[Image.open(swan)], text=["<image>This is Bimo the swan."], return_tensors="pt")
    memory = model.write_memory(**inputs.to(model.device, model.dtype))
    facts = str(tmp_path / "facts.safetensors")
    memory.save(facts)
    calls = {
        "swan_pooling.png": ["pooling", swan],
        "swan_words.png": ["words", swan, "--memory", facts],
        "swan_contrast.png": ["words", swan, "--contrast", "--memory", facts],
        "swan_memory.png": ["memory", swan, "--memory", facts],
        "memory.png": ["memory", "--memory", facts],
    }
    for name, call in calls.items():
        assert microvlm("visualize", *call, "--out", out) == 0
        assert capsys.readouterr().out.split() == [str(out / name)]
        with Image.open(out / name) as image:
            assert image.format == "PNG" and image.width > 300
    assert sorted(os.listdir(out)) == sorted(calls)

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    assert microvlm("visualize", "words", broken, swan, "--out", out) == 1  # the other one is done
    said = capsys.readouterr()
    assert "broken.png is not an image" in said.err and "swan_words.png" in said.out
    assert microvlm("visualize", "words", tmp_path / "none.png", "--out", out) == 1
    assert microvlm("visualize", "memory", "--memory", swan, "--out", out) == 1
    assert "refused" in capsys.readouterr().err
    assert microvlm("visualize", "pooling", "--out", out, swan) == 0  # options anywhere
    with monkeypatch.context() as patch:
        patch.setattr("microvlm.visualize.run.draw", interrupted)
        assert microvlm("visualize", "words", swan, "--out", out) == 130
    assert capsys.readouterr().err == "microvlm: interrupted\n"
    for wrong in (["memory"], ["words"], ["pooling", swan, "--memory", facts], ["pooling", swan, "--contrast"]):
        assert microvlm("visualize", *wrong, "--out", out) == 2
