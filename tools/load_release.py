"""Use a release as a stranger does, without the network: caption, teach, forget, save and open again.

    python tools/load_release.py FOLDER

Prints JSON: the caption, the taught sentence, the version of transformers. Exits with one line that says what differs.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoProcessor, pipeline

PROMPT, FACT = "<|user|><image><|assistant|>", "This is Bimo the swan."
IMAGES = ("examples/chipmunk.png", "examples/swan.png")  # to caption, and to teach


def refuse_network(event: str, arguments: tuple) -> None:
    """Raise RuntimeError when something connects."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"the network was used while loading: {event} {arguments[-1]}")


def caption(model, processor, image: Path, **kwargs) -> str:
    inputs = processor(images=str(image), text=PROMPT, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False, **kwargs)
    return processor.batch_decode(out, skip_special_tokens=True)[0]


def expect(name: str, value, expected) -> None:
    if value != expected:
        sys.exit(f"{name}: {value!r}, expected {expected!r}")


def check_pipeline(folder: Path, image: Path, expected: str) -> None:
    pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    chat = [{"role": "user", "content": [{"type": "image", "path": str(image)}]}]
    answer = pipe(text=chat, max_new_tokens=32, do_sample=False, return_full_text=False)
    expect("the pipeline's caption", answer[0]["generated_text"], expected)


def check_memory(model, processor, image: Path) -> None:
    memory = model.write_memory(**processor(images=str(image), text="<image>" + FACT, return_tensors="pt"))
    expect("the taught fact", caption(model, processor, image, memory=memory), FACT)
    plain = caption(model, processor, image)
    expect("after forgetting it", caption(model, processor, image, memory=model.forget(memory, 0)), plain)


def check_saved_copy(model, processor, image: Path, expected: str) -> None:
    with tempfile.TemporaryDirectory() as copy:
        model.save_pretrained(copy)
        processor.save_pretrained(copy)
        again = AutoModel.from_pretrained(copy, trust_remote_code=True)
        tensors, copies = model.state_dict(), again.state_dict()
        expect("tensors of the saved copy", sorted(copies), sorted(tensors))
        expect("changed tensors", [name for name in tensors if not torch.equal(copies[name], tensors[name])], [])
        processor = AutoProcessor.from_pretrained(copy, trust_remote_code=True)
        expect("caption of the saved copy", caption(again, processor, image), expected)


def main() -> None:
    sys.addaudithook(refuse_network)
    folder = Path(sys.argv[1])
    known, taught = (folder / name for name in IMAGES)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    # a caption, then the ways to use the release
    text = caption(model, processor, known)
    if not text.strip():
        sys.exit(f"the caption of {known.name} is empty")
    check_pipeline(folder, known, text)
    check_memory(model, processor, taught)
    check_saved_copy(model, processor, known, text)
    print(json.dumps({"caption": text, "taught": FACT, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
