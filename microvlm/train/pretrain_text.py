"""Pre-train a tokenizer and a small BitNet decoder on text."""

import argparse
import random
import re
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, BitNetConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments

from ..data.rows import load_rows
from ..model import replace_with_ternary

SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<image>"]
ROOT = Path(__file__).resolve().parents[2]


def article(noun: str) -> str:
    return f"{'An' if noun[0].lower() in 'aeiou' else 'A'} {noun}"


def wordnet_documents(folder: str) -> list[str]:
    """One text per synset: its lemmas, gloss and examples, in a few shapes of sentence."""
    documents = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (Path(folder) / f"data.{part}").read_text().splitlines():
            if line.startswith("  "):  # the licence header
                continue
            fields, _, gloss = line.partition(" | ")
            fields = fields.split(" ")
            lemmas = [re.sub(r"\(.*\)", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            definition, *examples = re.split(r'; (?=")', gloss.strip())
            head = article(lemmas[0]) if part == "noun" and lemmas[0].islower() else lemmas[0].capitalize()
            text = f"{head}. {definition.strip().capitalize()}."
            if len(lemmas) > 1:
                text += f" Also: {', '.join(lemmas[1:])}."
            for example in examples:
                example = example.strip('" ')
                if example:
                    text += f" {example[0].upper()}{example[1:]}."
            documents.append(text)
    return documents


def caption_documents(path: str) -> list[str]:
    return list(load_rows(path, exclude_copyleft=True)["caption"])


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; padding on the left, as generation wants it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
        additional_special_tokens=["<|user|>", "<|assistant|>", "<image>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[str], block: int) -> torch.Tensor:
    """All documents end to end in blocks (N, block)."""
    ids = [i for text in tokenizer(documents)["input_ids"] for i in text]
    count = len(ids) // block
    return torch.tensor(ids[: count * block], dtype=torch.long).view(count, block)


class Blocks(torch.utils.data.Dataset):
    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file, see recipes/nano_text.yaml")
    recipe = yaml.safe_load(Path(parser.parse_args(arguments).recipe).read_text())
    rng = random.Random(recipe["training"]["seed"])

    glosses, captions = wordnet_documents(recipe["wordnet_dir"]), caption_documents(recipe["captions_file"])
    rng.shuffle(glosses)
    held_out, glosses = glosses[:1000], glosses[1000:]
    tokenizer = train_tokenizer(glosses + captions * recipe["caption_repeats"], recipe["vocab_size"])
    chats = [f"<|user|><|assistant|>{c}<|endoftext|>" for c in captions]
    documents = [f"{g}<|endoftext|>" for g in glosses] + chats * recipe["caption_repeats"]
    rng.shuffle(documents)
    train = pack(tokenizer, documents, recipe["block_size"])
    validation = pack(tokenizer, [f"{g}<|endoftext|>" for g in held_out], recipe["block_size"])
    print(f"{len(documents)} documents, {train.numel()} tokens, vocabulary {len(tokenizer)}", flush=True)

    special = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    config = BitNetConfig(
        vocab_size=len(tokenizer),
        bos_token_id=special["<|endoftext|>"],
        eos_token_id=special["<|endoftext|>"],
        pad_token_id=special["<|pad|>"],
        tie_word_embeddings=True,
        **recipe["model"],
    )
    torch.manual_seed(recipe["training"]["seed"])
    model = AutoModelForCausalLM.from_config(config)
    replace_with_ternary(model, [r"model\.layers\..*_proj"])
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**recipe["training"]),
        train_dataset=Blocks(train),
        eval_dataset=Blocks(validation),
    )
    trainer.train()
    print(trainer.evaluate(), flush=True)
    # saved in the layout of microsoft/bitnet-b1.58-2B-4T-bf16: latent weights that transformers' AutoBitLinear rounds as well
    config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head"],
    }
    model.config.use_cache = True  # Trainer turns it off
    trainer.save_model()
    tokenizer.chat_template = (ROOT / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(recipe["training"]["output_dir"])
