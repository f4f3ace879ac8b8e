"""Pre-train a tokenizer and a small BitNet decoder on text.

The text is WordNet's glosses and image captions. A recipe of `kind: text` has the options, see recipes/nano/text.yaml.
"""

import random
import re
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, BitNetConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments

from ..data.rows import load_rows
from ..files import ROOT, write_text
from ..model import replace_with_ternary, require
from ..recipes import check_keys
from .recipe import check_training

SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<image>"]
HELD_OUT = 1000  # glosses to evaluate on
SENTENCES = "sentences.txt"  # what a memory can be taught, for `data.episodes.texts`
KEYS = dict.fromkeys(("caption_repeats", "vocab_size", "block_size"), int) | dict.fromkeys(("model", "training"), dict)
KEYS |= {"kind": str, "wordnet_dir": str, "captions_file": str | list[str]}


def check(recipe: dict[str, Any]) -> str:
    """Refuse values that cannot work; returns the folder of the run."""
    check_keys("model", recipe["model"], signature(BitNetConfig).parameters)
    check_training(recipe["training"])
    given = {key for key, value in recipe["training"].items() if value is not None}
    require({"output_dir", "seed"} <= given, "training needs an output_dir and a seed.")
    require(min(recipe["vocab_size"], recipe["block_size"]) > 0, "vocab_size and block_size have to be positive.")
    # a model of these sizes, without numbers
    try:
        with torch.device("meta"):
            build_model(8, 0, 1, recipe["model"])(torch.zeros(1, 1, dtype=torch.long))
    except (KeyError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"model: no BitNet can be made of these values ({error!r}).") from error
    return recipe["training"]["output_dir"]


def wordnet_documents(folder: str) -> list[list[str]]:
    """Read the sentences of every synset: lemmas, gloss and examples."""
    documents = []
    for part in ("noun", "verb", "adj", "adv"):
        lines = (Path(folder) / f"data.{part}").read_text().splitlines()
        documents += [synset_sentences(line, part) for line in lines if not line.startswith("  ")]  # no licence header
    return documents


def synset_sentences(line: str, part: str) -> list[str]:
    """Write a line of WordNet's data files as sentences."""
    fields, _, gloss = line.partition(" | ")
    fields = fields.split(" ")
    lemmas = [re.sub(r"\(.*\)", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
    definition, *examples = re.split(r'; (?=")', gloss.strip())
    head = lemmas[0].capitalize()
    if part == "noun" and lemmas[0].islower():
        head = f"{'An' if lemmas[0][0] in 'aeiou' else 'A'} {lemmas[0]}"
    sentences = [f"{head}.", f"{definition.strip().capitalize()}."]
    if len(lemmas) > 1:
        sentences.append(f"Also: {', '.join(lemmas[1:])}.")
    examples = [example.strip('" ') for example in examples]
    return sentences + [f"{example[0].upper()}{example[1:]}." for example in examples if example]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with every digit a token; padding on the left, as generation wants it."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def blocks(tokenizer: PreTrainedTokenizerFast, documents: list[str], size: int) -> list[dict[str, torch.Tensor]]:
    """Cut documents, end to end, into blocks of `size` tokens for `Trainer`."""
    ids = [i for text in tokenizer(documents)["input_ids"] for i in text]
    ids = torch.tensor(ids[: len(ids) // size * size], dtype=torch.long).view(-1, size)
    return [{"input_ids": block, "labels": block} for block in ids]


def tokenized_texts(recipe: dict[str, Any]) -> tuple[PreTrainedTokenizerFast, list, list]:
    """Train a tokenizer on a recipe's texts, and cut them into blocks.

    The sentences are written to a file, for the memory to learn.
    """
    draw, repeats, size = random.Random(recipe["training"]["seed"]), recipe["caption_repeats"], recipe["block_size"]
    synsets = wordnet_documents(recipe["wordnet_dir"])
    sentences = dict.fromkeys(sentence for synset in synsets for sentence in synset[1:])
    write_text(Path(recipe["training"]["output_dir"]) / SENTENCES, "\n".join(sentences) + "\n")
    glosses = [" ".join(synset) for synset in synsets]
    captions = list(load_rows(recipe["captions_file"], exclude_copyleft=True)["caption"])
    # hold some glosses out
    draw.shuffle(glosses)
    held_out, glosses = glosses[:HELD_OUT], glosses[HELD_OUT:]
    tokenizer = train_tokenizer(glosses + captions * repeats, recipe["vocab_size"])
    # captions are answers to an empty request, as in nano's default prompt
    chats = [f"<|user|><|assistant|>{caption}<|endoftext|>" for caption in captions]
    documents = [f"{gloss}<|endoftext|>" for gloss in glosses] + chats * repeats
    draw.shuffle(documents)
    train = blocks(tokenizer, documents, size)
    print(f"{len(documents)} documents, {len(train) * size} tokens, vocabulary {len(tokenizer)}", flush=True)
    return tokenizer, train, blocks(tokenizer, [f"{gloss}<|endoftext|>" for gloss in held_out], size)


def build_model(size: int, end: int, pad: int, sizes: dict[str, Any]):
    """Make a BitNet decoder with random weights, its linears ternary."""
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": pad}
    config = BitNetConfig(vocab_size=size, tie_word_embeddings=True, **ids, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    replace_with_ternary(model, [r"model\.layers\..*_proj"])
    return model


def main(recipe: dict[str, Any]) -> None:
    """Train tokenizer and decoder of a recipe."""
    tokenizer, train, validation = tokenized_texts(recipe)
    torch.manual_seed(recipe["training"]["seed"])
    end, pad = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>"])
    model = build_model(len(tokenizer), end, pad, recipe["model"])
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    args = TrainingArguments(**recipe["training"])
    trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=validation)
    trainer.train()
    print(trainer.evaluate(), flush=True)
    # saved as microsoft/bitnet-b1.58-2B-4T-bf16 is: latent weights that transformers' AutoBitLinear rounds as well
    model.config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head"],
    }
    model.config.use_cache = True  # Trainer turns it off
    trainer.save_model()
    tokenizer.chat_template = (ROOT / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(recipe["training"]["output_dir"])
