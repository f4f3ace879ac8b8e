"""From the harness's pictures and contexts to captions and log-likelihoods; needs no lmms-eval.

An empty context asks with the checkpoint's own prompt, as `microvlm evaluate` does; any other goes through the chat template, its pictures
before the text, or where `<image>` stands in the text.
"""

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from microvlm.data.rows import text_ids
from microvlm.model import to_rgb

GREEDY = {"max_new_tokens": 32, "do_sample": False, "num_beams": 1}
SAMPLING = ("temperature", "top_p", "top_k")
LENGTHS = ("max_new_tokens", "min_new_tokens")


class Captioner:
    """A checkpoint that answers a list of pictures.

    Args:
        pretrained: folder or Hub id.
        revision: on the Hub.
        dtype: of the weights in memory.
        device: default: the CPU.
    """

    def __init__(self, pretrained: str, revision: str | None = None, dtype: str = "float32", device: str | None = None):
        self.processor = AutoProcessor.from_pretrained(pretrained, revision=revision, trust_remote_code=True)
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained, revision=revision, trust_remote_code=True, dtype=getattr(torch, dtype)
        )
        self.model = self.model.to(device or "cpu").eval()

    def inputs(self, contexts: list[str], pictures: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        """Prompts with their pictures as `input_ids`, `attention_mask` (B, T), padded on the left, and `pixel_values`.

        Raises:
            ValueError: an empty context with another number of pictures than one, or another number of `<image>` than of pictures.
        """
        tokenizer, lines = self.processor.tokenizer, []
        for context, images in zip(contexts, pictures, strict=True):
            if context.strip():
                parts = context.split(self.processor.image_token)
                parts = parts if len(parts) > 1 else [*[""] * len(images), context]
                if len(parts) - 1 != len(images):
                    raise ValueError(
                        f"a context has {len(parts) - 1} {self.processor.image_token} for {len(images)} pictures."
                    )
                content = []
                for place, part in enumerate(parts):
                    content += [{"type": "image"}] if place else []
                    content += [{"type": "text", "text": part}] if part.strip() else []
                chat = [{"role": "user", "content": content}]
                text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
                text = self.processor(images=[images] if images else None, text=[text])
                lines.append(list(text["input_ids"][0]))
            elif len(images) == 1:
                lines.append(self.model.default_prompt(1)[0].tolist())
            else:
                raise ValueError(f"an empty context asks about one picture, got {len(images)}.")
        batch = tokenizer.pad({"input_ids": lines}, padding_side="left", return_tensors="pt")
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if flat := [to_rgb(image) for images in pictures for image in images]:
            pixel_values = self.processor.image_processor(flat, return_tensors="pt")["pixel_values"]
            batch["pixel_values"] = pixel_values.to(self.model.dtype)
        return {name: x.to(self.model.device) for name, x in batch.items()}

    @torch.inference_mode()
    def generate(self, contexts: list[str], pictures: list[list[Image.Image]], **options) -> list[str]:
        """Answers to B contexts with their pictures.

        Args:
            options: the harness's generation arguments; `until` ends an answer before any of its strings. Temperature, top-p and top-k
                count with `do_sample` alone.

        Raises:
            ValueError: an argument that is not known.
        """
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        settings = GREEDY | {k: v for k, v in options.items() if v is not None}
        if not settings["do_sample"]:
            settings = {k: v for k, v in settings.items() if k not in SAMPLING}
        if unknown := sorted(settings.keys() - {*GREEDY, *SAMPLING, *LENGTHS}):
            raise ValueError(f"generation arguments that MicroVLM does not take: {', '.join(unknown)}.")
        inputs = self.inputs(contexts, pictures)
        out = self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.processor.batch_decode(out, skip_special_tokens=True)]
        for end in until:
            texts = [text.split(end)[0].strip() if end else text for text in texts]
        return texts

    @torch.inference_mode()
    def loglikelihood(self, context: str, continuation: str, images: list[Image.Image]) -> tuple[float, bool]:
        """Log-probability, nats, of a continuation and its end token, and whether greedy decoding would give it."""
        inputs = self.inputs([context], [images])
        tokenizer = self.processor.tokenizer
        answer = [*text_ids(tokenizer, continuation.strip()), tokenizer.eos_token_id]
        answer = torch.tensor([answer], device=self.model.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = self.model(**inputs, logits_to_keep=answer.shape[1] + 1).logits[:, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1))
        return float(chosen.double().sum()), bool((logits.argmax(-1) == answer).all())
