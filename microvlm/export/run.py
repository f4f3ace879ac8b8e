"""Export a checkpoint from the command line."""

import argparse

from transformers.utils import logging

from .gguf import GGUF_TYPES, export_gguf
from .onnx import export_onnx


def main(arguments: list[str] | None = None) -> None:
    """Parse, export, and end with a one-line message when something given is wrong."""
    parser = argparse.ArgumentParser(description="Export a MicroVLM checkpoint as GGUF or ONNX.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id")
    parser.add_argument("out", metavar="OUT", help="file ending in .gguf; with --onnx a folder")
    parser.add_argument("--type", help=f"of the matrices in GGUF: {', '.join(GGUF_TYPES)}; default: f16")
    parser.add_argument("--architecture", help="in GGUF: what the file says it is, for a llama.cpp of your own")
    parser.add_argument("--onnx", action="store_true", help="write ONNX graphs instead of GGUF")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub CHECKPOINT")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if args.onnx:
            if args.type:
                raise ValueError("--type is of GGUF; ONNX graphs are float32.")
            export_onnx(args.checkpoint, args.out, args.revision, args.force)
        else:
            export_gguf(args.checkpoint, args.out, args.type or "f16", args.revision, args.force, args.architecture)
    except ValueError as error:
        raise SystemExit(f"microvlm export: {error}") from error
    except ModuleNotFoundError as error:
        raise SystemExit(f"microvlm export: needs the package {error.name}: pip install -e '.[export]'") from error
