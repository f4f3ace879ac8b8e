"""Exported files compute what the model does: GGUF in transformers' reader and in llama.cpp, ONNX in onnxruntime."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGE_ID, ROOT, TEXT, microvlm, text_section, tiny_model
from microvlm.modeling_microvlm import MicroVLMForConditionalGeneration
from microvlm.processing_microvlm import MicroVLMImageProcessor, MicroVLMProcessor
from microvlm.quantization_microvlm import TernaryLinear, fake_ternary
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from toy_data import CAPTIONS, SPECIAL_TOKENS, toy_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from microvlm import quantization_microvlm as quantization
from microvlm.export.gguf import (
    PRE_TOKENIZERS,
    check_architecture,
    export_gguf,
    gguf_tensors,
    ternary_parts,
    tokenizer_kind,
)
from microvlm.export.onnx import export_onnx, verify_onnx
from microvlm.pack import pack

VOCAB = 330  # bytes, special tokens, some merges, and rows that no token has
TERNARY = {"ternary_modules": [r"language_model\.layers\..*_proj"], "activation_bits": None}
TEXTS = [
    "a red square",
    "(red) 12345 a",
    "two 12345 BARS,\n\n  black's!?",
    "<|user|>a blue circle<|assistant|>",
    "naïve 漢字 ĠĊ",
]
SPLITS = {"qwen2": "qwen2", "llama": "smollm", "bitnet": "gpt-2"}


def byte_level_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that cuts text in one of the known ways."""
    regex, digits, ignore_merges = PRE_TOKENIZERS[kind]
    parts = [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    parts += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    parts += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)]
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    # trained on uncut text: merges across digits, words and punctuation show where the text is cut
    backend.train_from_iterator([*CAPTIONS, *["12345", "(red", "5 a"] * 20], trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        extra_special_tokens=SPECIAL_TOKENS[2:],
        padding_side="left",
        chat_template="{{ messages[0].content }}",
    )


def export_section(text: str, **kwargs) -> dict:
    """Of a decoder that released llama.cpp computes."""
    act = {"hidden_act": "silu"} if text == "bitnet" else {}
    return text_section(text, **{"vocab_size": VOCAB} | act | kwargs)


def checkpoint(folder: Path, text: str, qat: dict | None = None, **kwargs) -> Path:
    """A tiny checkpoint and tokenizer of a family; norms and biases are not those of a fresh model."""
    model = tiny_model(
        text, text_config=export_section(text, **kwargs), qat_config=qat or {}, default_prompt_ids=[2, IMAGE_ID, 3]
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.model.language_model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    model.save_pretrained(folder)
    image_processor = MicroVLMImageProcessor(size={"height": 32, "width": 32})
    tokenizer = byte_level_tokenizer(SPLITS[text])
    MicroVLMProcessor(
        image_processor, tokenizer, chat_template=tokenizer.chat_template, num_image_tokens=5
    ).save_pretrained(folder)
    return folder


def load(folder: Path):
    return MicroVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def greedy(model, ids: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """n tokens after a text, the end token among them, and the logits (T, V) of the text."""
    suppressed = model.generation_config.suppress_tokens or []
    tokens = list(ids)
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
    for _ in range(n):
        scores = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        scores[suppressed] = -torch.inf
        tokens.append(int(scores.argmax()))
    return tokens[len(ids) :], logits.numpy()


def read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors, dequantised, and key-values of a GGUF file."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape[::-1]])
        for t in reader.tensors
    }
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


# ---------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize(
    "text,kwargs",
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("llama", {}),
    ],
)
def test_transformers_reads_the_gguf_and_computes_the_same(tmp_path, text, kwargs):
    pytest.importorskip("gguf")
    source = checkpoint(tmp_path / "source", text, **kwargs)
    export_gguf(str(source), tmp_path / "out.gguf", "f32")
    model = load(source)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids
    with torch.inference_mode():
        torch.testing.assert_close(other(ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert theirs.get_vocab().items() >= tokenizer.get_vocab().items()


@pytest.mark.parametrize("act,architecture", [("silu", None), ("relu2", None), ("relu2", "bitnet")])
def test_key_values_say_what_the_config_says(tmp_path, act, architecture):
    pytest.importorskip("gguf")
    source = checkpoint(tmp_path / "source", "bitnet", TERNARY, hidden_act=act, rms_norm_eps=3e-5)
    name = architecture or ("bitnet" if act == "silu" else "bitnet-b1.58")
    _, fields = read(export_gguf(str(source), tmp_path / "out.gguf", architecture=architecture))
    expected = {
        "general.architecture": name,
        f"{name}.hidden_activation": act,
        f"{name}.context_length": 256,
        f"{name}.embedding_length": 32,
        f"{name}.feed_forward_length": 64,
        f"{name}.block_count": 2,
        f"{name}.attention.head_count": 4,
        f"{name}.attention.head_count_kv": 2,
        f"{name}.attention.layer_norm_rms_epsilon": pytest.approx(3e-5),
        f"{name}.rope.dimension_count": 8,
        f"{name}.rope.freq_base": load(source).config.text_config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.suppress_tokens": [IMAGE_ID],
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["tokenizer.ggml.tokens"][:5] == SPECIAL_TOKENS
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB - 1}]" and len(fields["tokenizer.ggml.tokens"]) == VOCAB
    assert fields["tokenizer.ggml.token_type"][:6] == [3] * 5 + [1] and fields["tokenizer.ggml.token_type"][-1] == 5


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "tq2_0", "tq1_0"])
def test_ternary_layers_are_exact_in_every_type(tmp_path, dtype, capsys):
    pytest.importorskip("gguf")
    source = checkpoint(tmp_path / "source", "bitnet", TERNARY, hidden_size=256, intermediate_size=320)
    tensors, _ = read(export_gguf(str(source), tmp_path / "out.gguf", dtype))
    layers = load(source).model.language_model.layers
    for i, layer in enumerate(layers):
        for name, module in (("attn_k", layer.self_attn.k_proj), ("ffn_down", layer.mlp.down_proj)):
            values = tensors[f"blk.{i}.{name}.weight"]
            assert set(np.unique(values)) == {-1, 0, 1}
            expected = fake_ternary(module.weight).detach().numpy()
            np.testing.assert_array_equal(values * tensors[f"blk.{i}.{name}.scale"], expected)
        sub_norm = layer.mlp.ffn_sub_norm.weight.detach().numpy()
        np.testing.assert_array_equal(tensors[f"blk.{i}.ffn_sub_norm.weight"], sub_norm)
    printed = capsys.readouterr().out
    fallback = (
        f"2 tensors are f16 instead of {dtype} (rows of 320, not divisible by 256), such as blk.0.ffn_down.weight"
    )
    assert (fallback in printed) == dtype.startswith("tq")


def test_weights_ternary_as_stored_are_split_too(tmp_path):
    pytest.importorskip("gguf")
    layer = TernaryLinear(64, 8, bias=False, ternary_weights=False)
    with torch.no_grad():
        layer.weight.copy_(fake_ternary(torch.randn(8, 64)))
    values, scale = ternary_parts(layer, ("tensor",))
    torch.testing.assert_close(values * scale, layer.weight.detach(), rtol=1e-6, atol=0)
    with torch.no_grad():
        layer.weight[0, 0] = 0.3 * scale
    with pytest.raises(ValueError, match="more than three values"):
        ternary_parts(layer, ("tensor",))


def test_q8_0_is_within_its_rounding_and_says_where_it_is_not(tmp_path, capsys):
    pytest.importorskip("gguf")
    source = checkpoint(tmp_path / "source", "llama", intermediate_size=48)
    tensors, _ = read(export_gguf(str(source), tmp_path / "out.gguf", "q8_0"))
    weight = load(source).model.language_model.embed_tokens.weight.detach().numpy()
    error = np.abs(tensors["token_embd.weight"] - weight).max()
    assert 0 < error < 0.01 * np.abs(weight).max()
    assert "2 tensors are f16 instead of q8_0 (rows of 48, not divisible by 32)" in capsys.readouterr().out


def test_a_damaged_file_does_not_appear(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    source = checkpoint(tmp_path / "source", "qwen2")
    right = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda data, qtype: right(data[..., ::-1].copy(), qtype))
    with pytest.raises(ValueError, match="verification: token_embd.weight in the file is"):
        export_gguf(str(source), tmp_path / "out.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_known_ways_of_cutting_text(kind):
    assert tokenizer_kind(byte_level_tokenizer(kind)) == kind


def test_command_line(tmp_path, capsys):
    pytest.importorskip("gguf")
    source = checkpoint(tmp_path / "source", "qwen2")
    out = tmp_path / "out.gguf"
    assert microvlm("export", "gguf", source, out, "--type", "q9") == 2
    assert "'q9' is not one of" in capsys.readouterr().err
    assert microvlm("export", "gguf", source, out, "--type", "f32") == 0 and out.read_bytes()[:4] == b"GGUF"
    assert microvlm("export", "onnx", source, out) == 1
    assert capsys.readouterr().err == f"microvlm: OUT {out} ends in .gguf, expected a folder.\n"


def test_refusals(tmp_path):
    pytest.importorskip("gguf")
    out = tmp_path / "out.gguf"
    for message, call in (
        (f"OUT {tmp_path / 'out'} is no file name that ends in .gguf", ("x", tmp_path / "out", "f16")),
        ("'x' is neither a folder on this machine nor a Hub id", ("x", out, "f16")),
    ):
        with pytest.raises(ValueError) as error:
            export_gguf(*map(str, call))
        assert message in str(error.value)

    toy = toy_checkpoint(tmp_path / "toy")
    with pytest.raises(ValueError, match="the tokenizer is BPE after Metaspace, expected byte-level BPE"):
        export_gguf(str(toy), out)
    config = toy / "config.json"
    written = config.read_text()
    config.write_text(written.replace('"text_config"', '"other_config"'))
    with pytest.raises(ValueError, match="has no text_config, so no language model to export"):
        export_gguf(str(toy), out)
    config.write_text(written.replace('"model_type": "microvlm"', '"model_type": "llava"'))
    with pytest.raises(ValueError, match="is of model_type 'llava', expected 'microvlm'"):
        export_gguf(str(toy), out)

    source = checkpoint(tmp_path / "plain", "qwen2")
    with pytest.raises(ValueError, match="--type tq2_0 needs ternary layers, the checkpoint has none"):
        export_gguf(str(source), out, "tq2_0")
    out.write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists: choose another name, or replace it with --force"):
        export_gguf(str(source), out)
    assert out.read_bytes() == b"mine"
    export_gguf(str(source), out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"
    with pytest.raises(ValueError, match="ends in .gguf, expected a folder"):
        export_onnx(str(source), out)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    other = shutil.copytree(source, tmp_path / "other")
    for folder, message in ((source, "would overwrite"), (ROOT, "would overwrite"), (other, "has no onnx, so")):
        with pytest.raises(ValueError, match=message):
            export_onnx(str(source), folder, force=True)
    (other / "onnx").mkdir()  # as on the Hub: graphs beside weights
    with pytest.raises(ValueError, match="holds model.safetensors, which no export wrote: choose another folder"):
        export_onnx(str(source), other, force=True)
    for folder in (source, other):
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_packed_checkpoint_is_unpacked_first(tmp_path):
    pytest.importorskip("gguf")
    source = checkpoint(tmp_path / "source", "bitnet", TERNARY)
    model = load(source)
    modules = {r"model\.language_model\.layers\..*_proj": {"format": "ternary"}}
    modules[r"model\.language_model\.embed_tokens"] = {"format": "int8", "group_size": "row"}
    pack(model, quantization.PackedConfig(modules))
    shutil.copytree(source, tmp_path / "packed")
    model.save_pretrained(tmp_path / "packed")
    plain, _ = read(export_gguf(str(source), tmp_path / "plain.gguf", "f32"))
    tensors, _ = read(export_gguf(str(tmp_path / "packed"), tmp_path / "packed.gguf", "f32"))
    assert tensors.keys() == plain.keys()
    for name, tensor in tensors.items():
        coarse = name == "token_embd.weight"
        np.testing.assert_allclose(
            tensor, plain[name], rtol=1e-6, atol=np.abs(plain[name]).max() / 100 if coarse else 0
        )


def test_scales_that_a_graph_does_not_have_are_refused():
    rows = TERNARY | {"group_size": "row"}
    model = tiny_model("bitnet", qat_config=rows)
    with pytest.raises(ValueError, match="this GGUF has scales of a tensor, qat_config.group_size is 'row'"):
        gguf_tensors(model)
    model = tiny_model("qwen2", qat_config=rows)
    tensors = {tensor.name: tensor.data for tensor in gguf_tensors(model)}
    layer = model.model.language_model.layers[0].mlp.down_proj
    np.testing.assert_array_equal(tensors["blk.0.ffn_down.weight"], layer.rounded_weight().detach())
    model = tiny_model("qwen2", qat_config=TERNARY | {"group_size": 8})
    with pytest.raises(ValueError, match="scales of a tensor or row, qat_config.group_size is 8"):
        gguf_tensors(model)


def test_graphs_that_llama_cpp_does_not_have_are_refused():
    for text, kwargs, message in (
        ("bitnet", {"tie_word_embeddings": False}, "tied embeddings only"),
        ("bitnet", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu or relu2 of bitnet"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu of llama"),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding windows"),
    ):
        model = tiny_model(text, text_config=export_section(text, **kwargs))
        with pytest.raises(ValueError, match=message):
            check_architecture(model, model.config.text_config)
    for kind in ("mistral", "phi3", "lfm2", "gemma3_text", "qwen3_5_text"):
        model = tiny_model("qwen2", text_config=text_section(kind if kind in TEXT else "qwen2", model_type=kind))
        with pytest.raises(ValueError, match=f"'{kind}' has no GGUF architecture here, expected one of"):
            check_architecture(model, model.config.text_config)


# ---------------------------------------------------------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory):
    """A tiny Qwen2 checkpoint and its graphs."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    source = checkpoint(folder / "source", "qwen2")
    return source, export_onnx(str(source), folder / "out")


def test_graphs_have_the_names_that_tools_expect(onnx_folder):
    import onnxruntime

    _, out = onnx_folder
    names = {}
    for path in (out / "onnx").glob("*.onnx"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names[path.name] = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
    cached = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert names == {
        "vision_encoder.onnx": (["pixel_values"], ["image_features"]),
        "embed_tokens.onnx": (["input_ids"], ["inputs_embeds"]),
        "decoder_model_merged.onnx": (
            ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{c}" for c in cached)],
            ["logits", *(f"present.{c}" for c in cached)],
        ),
    }


@pytest.mark.parametrize("batch,new,past", [(1, 1, 0), (1, 5, 0), (3, 1, 6), (2, 4, 1)])
def test_decoder_of_any_size_gives_the_same_logits(onnx_folder, batch, new, past):
    import onnxruntime

    source, out = onnx_folder
    model = load(source)
    ids = torch.randint(5, VOCAB, (batch, past + new), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if past > 1:
        mask[0, :2] = 0  # left padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, past:].numpy()
    embed, decoder = (
        onnxruntime.InferenceSession(out / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("embed_tokens", "decoder_model_merged")
    )
    cache = {i.name: np.zeros((batch, 2, 0, 8), np.float32) for i in decoder.get_inputs()[3:]}
    for part in filter(lambda s: s.stop > s.start, (slice(0, past), slice(past, past + new))):
        logits, *present = decoder.run(
            None,
            {
                "inputs_embeds": embed.run(None, {"input_ids": ids[:, part].numpy()})[0],
                "attention_mask": mask[:, : part.stop].numpy(),
                "position_ids": positions[:, part].numpy(),
                **cache,
            },
        )
        cache = dict(zip(cache, present))
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_another_model_does_not_pass_verification(onnx_folder):
    source, out = onnx_folder
    model = load(source)
    verify_onnx(model, out)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="verification: logits of the prompt of onnxruntime differ by"):
        verify_onnx(model, out)


def test_nano_captions_with_onnxruntime_alone(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from caption_onnx import Captioner

    out = export_onnx(str(ROOT), tmp_path / "out")  # its logits are compared with the model's on the way
    captioner = Captioner(out)
    model, processor = load(ROOT), MicroVLMProcessor.from_pretrained(ROOT, trust_remote_code=True)
    pictures = sorted((ROOT / "examples").glob("*.png"))
    captions, ties = set(), 0
    for path in pictures:
        pixel_values = processor.image_processor(Image.open(path), return_tensors="pt").pixel_values
        start = model.default_prompt(1).shape[1]
        expected = model.generate(
            pixel_values=pixel_values,
            max_new_tokens=32,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        words, said = expected.sequences[0, start:].tolist(), captioner.generate(pixel_values.numpy())
        if said != words:
            # only where the model itself hardly prefers its word: its kernels round the hidden states to 8 bits
            first = next(i for i, (word, other) in enumerate(zip(words, said)) if word != other)
            logits = expected.logits[first][0]
            assert logits[words[first]] - logits[said[first]] < 0.025 * logits.abs().max(), path
            ties += 1
        captions.add(captioner.caption(path))
    assert ties <= len(pictures) / 3
    assert len(captions) > len(pictures) / 2  # and not one sentence for every picture


# ----------------------------------------------------------------------------------------------------------- llama.cpp


class Llama:
    """llama.cpp with a float32 cache, one thread and no sampler."""

    def __init__(self, path: Path):
        llama_cpp = pytest.importorskip("llama_cpp")
        self.llm = llama_cpp.Llama(
            str(path), n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, type_k=0, type_v=0, verbose=False
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.llm.close()

    def tokenize(self, text: str) -> list[int]:
        return self.llm.tokenize(text.encode(), add_bos=False, special=True)

    def greedy(self, ids: list[int], n: int, suppressed: list[int]) -> tuple[list[int], np.ndarray]:
        """See `greedy` above."""
        self.llm.reset()
        self.llm.eval(ids)
        logits, tokens = self.llm.scores[: len(ids)].copy(), []
        for _ in range(n):
            scores = self.llm.scores[self.llm.n_tokens - 1].copy()
            scores[suppressed] = -np.inf
            tokens.append(int(scores.argmax()))
            self.llm.eval(tokens[-1:])
        return tokens, logits


def compare(path: Path, model, tokenizer, texts: list[str], n: int, tolerance: float) -> None:
    """Ids of texts, logits to `tolerance` of the largest, and n greedy tokens."""
    with Llama(path) as llama:
        for text in texts:
            ids = tokenizer(text).input_ids
            assert llama.tokenize(text) == ids
            expected, expected_logits = greedy(model, ids, n)
            tokens, logits = llama.greedy(ids, n, model.generation_config.suppress_tokens or [])
            np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=tolerance * np.abs(expected_logits).max())
            assert tokens == expected


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "text,qat,kwargs",
    [
        ("qwen2", None, {}),
        ("qwen2", TERNARY, {"tie_word_embeddings": False}),
        ("llama", None, {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("llama", None, {"rope_parameters": LLAMA3}),
        ("llama", None, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("llama", None, {"attention_bias": True, "mlp_bias": True}),
        ("bitnet", None, {}),
        ("bitnet", TERNARY, {}),
    ],
)
def test_llama_cpp_computes_the_same(tmp_path, text, qat, kwargs):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    source = checkpoint(tmp_path / "source", text, qat, **kwargs)
    out = export_gguf(str(source), tmp_path / "out.gguf", "f32")
    compare(out, load(source), PreTrainedTokenizerFast.from_pretrained(source), TEXTS, 24, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "tq2_0"])
def test_nano_in_llama_cpp(tmp_path, dtype):
    """Released llama.cpp applies SiLU in BitNet's feed-forward; LLAMA_CPP_RELU2=1: this one is changed
    (docs/export.md)."""
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    with pytest.raises(
        ValueError, match="Failed to load model"
    ):  # released ones have no graph with squared ReLU, and say so
        compare(export_gguf(str(ROOT), tmp_path / "refused.gguf", dtype), None, None, [""], 0, 0)
    out = export_gguf(str(ROOT), tmp_path / "nano.gguf", dtype, architecture="bitnet")
    model = load(ROOT)
    changed = os.environ.get("LLAMA_CPP_RELU2") == "1"
    for layer in model.model.language_model.layers:
        layer.mlp.act_fn = layer.mlp.act_fn if changed else torch.nn.SiLU()
    for module in model.modules():
        if isinstance(module, TernaryLinear) and dtype == "f32":
            module.activation_bits = None  # llama.cpp rounds activations in front of ternary types only
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT)
    # q8_K rounds rows of 256 as the model does, and ffn_down's rows of 512 in two halves
    texts = ["<|user|>What is a swan?<|assistant|>", "a large bird that", "someone who 12 345"]
    compare(out, model, tokenizer, texts, 16 if dtype == "f32" else 0, 1e-4 if dtype == "f32" else 5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype,tolerance", [("f32", 1e-4), ("f16", 1e-2)])
def test_smollm2_in_llama_cpp(tmp_path, dtype, tolerance):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    source = os.environ.get("MICROVLM_V_135M", str(ROOT / "runs" / "microvlm-v-135m"))
    if not os.path.exists(source):
        pytest.skip("compose runs/v-135m/start first (docs/training.md), or name it in MICROVLM_V_135M")
    out = export_gguf(source, tmp_path / "out.gguf", dtype)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    texts = ["The capital of France is", "<|im_start|>user\nName 3 colours.<|im_end|>\n<|im_start|>assistant\n"]
    compare(out, load(source), tokenizer, texts, 12, tolerance)
