"""Caption images with onnxruntime only: no torch, no transformers.

pip install numpy onnxruntime pillow tokenizers
microvlm export onnx . runs/onnx
python examples/caption_onnx.py runs/onnx examples/swan.png examples/drum.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


class Captioner:
    """Three graphs of a folder that `microvlm export onnx` wrote, and greedy decoding with a cache."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.config, self.generation = (read_json(folder / f"{name}.json") for name in ("config", "generation_config"))
        self.image_processor = read_json(folder / "processor_config.json")["image_processor"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vision_encoder, self.embed_tokens, self.decoder = (
            onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )

    def pixel_values(self, image: Image.Image) -> np.ndarray:
        """Prepare an image like the image processor: (1, 3, height, width)."""
        image, size = ImageOps.exif_transpose(image), self.image_processor["size"]
        # 16 bits to 8, transparency on white
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, np.float64) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        # resize, scale, normalise
        image = image.convert("RGB").resize((size["width"], size["height"]), self.image_processor["resample"])
        x = np.asarray(image, np.float32) * self.image_processor["rescale_factor"]
        x = (x - np.float32(self.image_processor["image_mean"])) / np.float32(self.image_processor["image_std"])
        return x.transpose(2, 0, 1)[None].astype(np.float32)

    def generate(self, pixel_values: np.ndarray, max_new_tokens: int = 32) -> list[int]:
        """Generate greedily after the default prompt; returns token ids, also the end token."""
        # the prompt, with P placeholders for the image
        token, P = self.config["image_token_id"], self.config["adapter_config"]["num_prefix_tokens"]
        prompt = [i for t in self.config["default_prompt_ids"] or [token] for i in [t] * (P if t == token else 1)]
        ids = np.array([prompt], np.int64)  # (1, T)
        embeds = self.embed_tokens.run(None, {"input_ids": ids})[0]  # (1, T, D)
        embeds[ids == token] = self.vision_encoder.run(None, {"pixel_values": pixel_values})[0][0]
        # an empty cache
        names = [i for i in self.decoder.get_inputs() if i.name.startswith("past_key_values.")]
        cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in names}
        eos = self.generation["eos_token_id"]
        eos = eos if isinstance(eos, list) else [eos]
        length, tokens = 0, []
        while True:
            # one pass over the new positions
            new = embeds.shape[1]
            place = np.arange(length, length + new)[None]
            inputs = {"attention_mask": np.ones((1, length + new), np.int64), "position_ids": place}
            logits, *present = self.decoder.run(None, {"inputs_embeds": embeds, **inputs, **cache})
            length, cache = length + new, dict(zip(cache, present))
            # the likeliest token that may be generated
            scores = logits[0, -1]
            scores[self.generation.get("suppress_tokens") or []] = -np.inf
            tokens.append(int(scores.argmax()))
            if tokens[-1] in eos or len(tokens) == max_new_tokens:
                return tokens
            embeds = self.embed_tokens.run(None, {"input_ids": np.array([[tokens[-1]]])})[0]

    def caption(self, path: str | Path, max_new_tokens: int = 32) -> str:
        """Caption an image file."""
        with Image.open(path) as image:
            tokens = self.generate(self.pixel_values(image), max_new_tokens)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Caption images with onnxruntime only.")
    parser.add_argument("folder", help="written by microvlm export onnx")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()
    captioner = Captioner(args.folder)
    for path in args.images:
        print(f"{path}: {captioner.caption(path, args.max_new_tokens)}")


if __name__ == "__main__":
    main()
