"""Caption pictures with onnxruntime alone: no torch, no transformers.

pip install numpy onnxruntime pillow tokenizers
microvlm export . runs/onnx --onnx
python examples/caption_onnx.py runs/onnx examples/swan.png examples/drum.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


class Captioner:
    """The three graphs of an export, and greedy decoding with a cache.

    Args:
        folder: written by `microvlm export --onnx`.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        read = lambda name: json.loads((folder / name).read_text(encoding="utf-8"))  # noqa: E731
        self.config, self.generation = read("config.json"), read("generation_config.json")
        self.image_processor = read("processor_config.json")["image_processor"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vision_encoder, self.embed_tokens, self.decoder = (
            onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )

    def pixel_values(self, picture: Image.Image) -> np.ndarray:
        """(1, 3, height, width): upright, transparency on white, 16 bits scaled to 8, resized and normalised as the image processor does."""
        picture, size = ImageOps.exif_transpose(picture), self.image_processor["size"]
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture, np.float64) / 257).round().astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB").resize((size["width"], size["height"]), self.image_processor["resample"])
        x = np.asarray(picture, np.float32) * self.image_processor["rescale_factor"]
        x = (x - np.float32(self.image_processor["image_mean"])) / np.float32(self.image_processor["image_std"])
        return x.transpose(2, 0, 1)[None].astype(np.float32)

    def generate(self, pixel_values: np.ndarray, max_new_tokens: int = 32) -> list[int]:
        """Greedy token ids of one picture (1, 3, height, width) behind the default prompt, with the end token if it came."""
        image, P = self.config["image_token_id"], self.config["adapter_config"]["num_prefix_tokens"]
        prompt = [i for t in self.config["default_prompt_ids"] or [image] for i in ([t] * P if t == image else [t])]
        eos = self.generation["eos_token_id"]
        eos = eos if isinstance(eos, list) else [eos]
        ids = np.array([prompt], np.int64)  # (1, T)
        embeds = self.embed_tokens.run(None, {"input_ids": ids})[0]  # (1, T, D)
        embeds[ids == image] = self.vision_encoder.run(None, {"pixel_values": pixel_values})[0][0]
        cache = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self.decoder.get_inputs()
            if i.name.startswith("past_key_values.")
        }
        length, tokens = 0, []
        while True:
            new = embeds.shape[1]
            logits, *present = self.decoder.run(
                None,
                {
                    "inputs_embeds": embeds,
                    "attention_mask": np.ones((1, length + new), np.int64),
                    "position_ids": np.arange(length, length + new)[None],
                    **cache,
                },
            )
            length, cache = length + new, dict(zip(cache, present))
            scores = logits[0, -1]
            scores[self.generation.get("suppress_tokens") or []] = -np.inf
            tokens.append(int(scores.argmax()))
            if tokens[-1] in eos or len(tokens) == max_new_tokens:
                return tokens
            embeds = self.embed_tokens.run(None, {"input_ids": np.array([[tokens[-1]]])})[0]

    def caption(self, path: str | Path, max_new_tokens: int = 32) -> str:
        """Words about a picture file."""
        with Image.open(path) as picture:
            tokens = self.generate(self.pixel_values(picture), max_new_tokens)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Caption pictures with onnxruntime alone.")
    parser.add_argument("folder", help="written by microvlm export --onnx")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()
    captioner = Captioner(args.folder)
    for path in args.pictures:
        print(f"{path}: {captioner.caption(path, args.max_new_tokens)}")


if __name__ == "__main__":
    main()
