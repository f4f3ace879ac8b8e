"""Turn the harness's images and contexts into captions and log-likelihoods; needs no lmms-eval.

An empty context asks with the checkpoint's own prompt, as `microvlm evaluate` does. Any other goes through the chat
template; its images stand before the text, or at each `<image>` in it.
"""

import torch
from PIL import Image
from transformers import BatchEncoding

from ..data.rows import text_ids
from ..model import load, require, to_rgb

GREEDY = {"max_new_tokens": 32, "do_sample": False, "num_beams": 1}
SAMPLING = ("temperature", "top_p", "top_k")
KNOWN = {*GREEDY, *SAMPLING, "min_new_tokens"}


class Captioner:
    """Answer contexts with their images by a checkpoint, a folder or a Hub id."""

    def __init__(self, pretrained: str, revision: str | None = None, dtype: str = "float32", device: str | None = None):
        self.model, self.processor = load(pretrained, revision or "main", dtype, device or "cpu")

    def prompt(self, context: str, images: list[Image.Image]) -> list[int]:
        """Write the token ids of a context with its images."""
        token, number = self.processor.image_token, len(images)
        if not context.strip():
            require(number == 1, f"an empty context asks about one picture, got {number}.")
            return self.model.default_prompt(1)[0].tolist()
        # the text between the images; without placeholders all of it stands after them
        parts = context.split(token) if token in context else [""] * number + [context]
        require(len(parts) - 1 == number, f"a context has {len(parts) - 1} {token} for {number} pictures.")
        content = []
        for image, part in zip((None, *images), parts):
            content += [] if image is None else [{"type": "image", "image": image}]
            content += [{"type": "text", "text": part}] if part.strip() else []
        chat = [{"role": "user", "content": content}]
        return list(self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)[0])

    def inputs(self, contexts: list[str], images: list[list[Image.Image]]) -> BatchEncoding:
        """Make `input_ids` and `attention_mask` (B, T), padded on the left, and `pixel_values` of B contexts."""
        lines = [self.prompt(context, some) for context, some in zip(contexts, images, strict=True)]
        batch = self.processor.tokenizer.pad({"input_ids": lines}, padding_side="left", return_tensors="pt")
        if flat := [to_rgb(image) for some in images for image in some]:
            pixel_values = self.processor.image_processor(flat, return_tensors="pt")["pixel_values"]
            batch["pixel_values"] = pixel_values.to(self.model.dtype)
        return batch.to(self.model.device)

    @torch.inference_mode()
    def generate(self, contexts: list[str], images: list[list[Image.Image]], **options) -> list[str]:
        """Answer B contexts with their images.

        The options are the harness's; `until` ends an answer before any of its strings. Temperature, top-p and top-k
        count with `do_sample` alone.
        """
        # the arguments, as `generate` takes them
        ends = options.pop("until", None) or []
        settings = GREEDY | {name: value for name, value in options.items() if value is not None}
        unknown = ", ".join(sorted(settings.keys() - KNOWN))
        require(not unknown, f"generation arguments that MicroVLM does not take: {unknown}.")
        if not settings["do_sample"]:
            settings = {name: value for name, value in settings.items() if name not in SAMPLING}
        inputs = self.inputs(contexts, images)
        ids = self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
        # answers end before a stop string
        for end in filter(None, [ends] if isinstance(ends, str) else ends):
            texts = [text.split(end)[0].strip() for text in texts]
        return texts

    @torch.inference_mode()
    def loglikelihood(self, context: str, continuation: str, images: list[Image.Image]) -> tuple[float, bool]:
        """Compute a continuation's log-probability in nats, and whether it is the greedy one."""
        inputs, tokenizer = self.inputs([context], [images]), self.processor.tokenizer
        answer = [*text_ids(tokenizer, continuation.strip()), tokenizer.eos_token_id]
        answer = torch.tensor([answer], device=self.model.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = self.model(**inputs, logits_to_keep=answer.shape[1] + 1).logits[:, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1))
        return float(chosen.double().sum()), bool((logits.argmax(-1) == answer).all())
