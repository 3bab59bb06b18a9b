"""`jaxllm convert`: any checkpoint to one that restores quickly, and straight into shards."""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

from jaxllm.cli.flags import add_flags, given
from jaxllm.config import CompileConfig, ModelConfig

READING = ("tokenizer", "skip_tokenizer_init", "revision", "cache_dir", "token", "dtype", "trust_remote_code")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags: those options of the engine that say how a checkpoint is read."""
    parser.add_argument("source", metavar="SRC", help="a name, Hugging Face repo id, folder, or GGUF file")
    parser.add_argument("destination", metavar="DST", type=Path, help="the folder to make")
    add_flags(parser, ModelConfig, [f for f in dataclasses.fields(ModelConfig) if f.name in READING])
    add_flags(parser, CompileConfig, [f for f in dataclasses.fields(CompileConfig) if f.name == "progress"])


def run(arguments: argparse.Namespace) -> int:
    """Writes the checkpoint and prints its folder."""
    options = ModelConfig(model=arguments.source, **given(arguments, dataclasses.fields(ModelConfig)))
    progress = getattr(arguments, "progress", CompileConfig.progress)

    import jax.numpy as jnp

    from converters.checkpoint import open_checkpoint
    from converters.tokenizer import load_tokenizer
    from jaxllm.models.converting import convert

    reading = {"revision": options.revision, "cache_dir": options.cache_dir, "token": options.token}
    with contextlib.closing(open_checkpoint(arguments.source, **reading)) as checkpoint:
        tokenizer = None
        if not options.skip_tokenizer_init:
            of = options.tokenizer or checkpoint.path
            tokenizer = load_tokenizer(of, **reading, trust_remote_code=options.trust_remote_code)
        dtype = None if options.dtype == "auto" else jnp.dtype(options.dtype)
        folder = convert(
            checkpoint, arguments.destination, tokenizer=tokenizer, dtype=dtype, progress=progress
        )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{size / 1e6:,.0f} MB; load it with jaxllm generate {folder}", file=sys.stderr)
    print(folder)
    return 0
