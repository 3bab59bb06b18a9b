"""The whole engine on a GPU, with an 8B model's shapes and random weights, against what the device can do.

    PYTHONPATH=. python3 tests/device/bench.py --output benchmarks/gpu

Nothing is fetched. Decode is compared with reading the weights and the rows' pages once at the measured copy
bandwidth, prefill with the model's products at the measured rate of bfloat16, and, where torch and
transformers are installed, both with transformers. `--model tiny` runs on a CPU in a minute, to try it.

It has not been run on a GPU yet.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.bench.recorder import Recording
from jaxllm.bench.session import Session
from jaxllm.models.decoder import DecoderConfig
from pallas_kernels.bench import describe_machine
from pallas_kernels.timing import Effort, Limits, measure_limits

ROOT = Path(__file__).parents[2]
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
TINY = LLAMA_3_8B | {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
GOALS = {"decode": 0.70, "prefill": 0.55, "host gap": 0.05}
"""At least these fractions of the limit; of a step's time at most this without work for the device."""
PAGE = 16


@dataclass(frozen=True)
class Sizes:
    """What is run; `chunk` is the most tokens of a step, `steps` those of decode that are timed."""

    config: dict[str, Any]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompt: int
    chunk: int
    steps: int


SIZES = {
    "llama-3-8b": Sizes(LLAMA_3_8B, (1, 32, 128, 256), (1024, 8192), prompt=8192, chunk=8192, steps=64),
    "tiny": Sizes(TINY, (1, 4), (64, 128), prompt=256, chunk=64, steps=16),
}


@dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
        seconds: of a step of decode, or of a prompt; None where it was left out.
        fraction: of the limit: the least time at the measured rates over what it took.
        gap: share of the time for which the device had no work, at most.
        reason: why it was left out.
    """

    name: str
    phase: str
    seconds: float | None = None
    tokens_per_second: float = 0.0
    fraction: float = 0.0
    gap: float = 0.0
    reason: str = ""


def decode_bytes(model: DecoderConfig, weights: int, batch: int, context: float) -> float:
    """Bytes that a step of decode reads at least: every weight but the embedding's, and the rows' pages."""
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    layer = 2 * model.num_kv_heads * model.head_dim
    return weights - 2 * embedding + 2.0 * batch * context * layer * model.num_layers


def prefill_flops(model: DecoderConfig, parameters: int, tokens: int) -> float:
    """Of a prompt: two for each weight of a layer and token, and the causal half of attention.

    The embedding is looked up, and logits are of the last token only.
    """
    tables = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
    attention = 2.0 * tokens * tokens * model.num_heads * model.head_dim * model.num_layers
    return 2.0 * (parameters - tables) * tokens + attention


def prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random token ids, no two prompts the same."""
    rng = np.random.default_rng(seed)
    return rng.integers(3, vocabulary, size=(count, tokens)).tolist()


def measure_engine(folder: str, sizes: Sizes, limits: Limits, backend: str) -> Iterator[Figure]:
    """Decode for each batch and context, then prefill."""
    longest = max(max(sizes.contexts) + sizes.steps + 2 * PAGE, sizes.prompt + PAGE)
    options: dict[str, Any] = {
        "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16", "page_size": PAGE,
        "max_model_len": longest, "max_num_seqs": max(sizes.batches), "max_num_batched_tokens": sizes.chunk,
        "enable_prefix_caching": False, "attention_backend": backend,
    }  # fmt: skip
    with Session(folder, **options) as session:
        runner = session.parts.core.runner
        shapes = runner.lowering.params
        parameters = sum(int(np.prod(one.shape)) for one in shapes)
        print(f"attention: {session.parts.attention}, {runner.num_pages} pages", file=sys.stderr, flush=True)
        for context in sizes.contexts:
            for batch in sizes.batches:
                yield _decode(session, sizes, limits, batch, context, 2 * parameters)
        yield _prefill(session, sizes, limits, parameters)


def _decode(session: Session, sizes: Sizes, limits: Limits, batch: int, context: int, weights: int) -> Figure:
    name = f"decode {batch} x {context}"
    held = batch * -(-(context + sizes.steps) // PAGE)
    if held >= session.parts.core.runner.num_pages:
        pages = session.parts.core.runner.num_pages - 1
        return Figure(name, "decode", reason=f"needs {held} pages, the device's memory holds {pages}")
    ids = prompts(batch, context, session.vocab_size, seed=batch + context)
    run = session.generate(ids, sizes.steps)
    seconds, gap = _step_times(run.recording, batch)
    nbytes = decode_bytes(session.parts.model, weights, batch, context + sizes.steps / 2)
    least = nbytes / limits.copy
    return Figure(name, "decode", seconds, batch / seconds, least / seconds, gap)


def _step_times(recording: Recording, batch: int) -> tuple[float, float]:
    """Median seconds from one step of pure decode to the next, and the share of their gaps."""
    turns = [turn for turn in recording.turns if turn.num_rows == turn.num_tokens == batch]
    begins = [turn.begin for turn in turns]
    seconds = statistics.median(after - before for before, after in itertools.pairwise(begins))
    return seconds, statistics.mean(turn.gap for turn in turns[1:]) / seconds


def _prefill(session: Session, sizes: Sizes, limits: Limits, parameters: int) -> Figure:
    """The time to the first token of a prompt alone, the best of three."""
    times = []
    for seed in range(4):  # the first warms up
        run = session.generate(prompts(1, sizes.prompt, session.vocab_size, seed), 1)
        times += run.first_token_times
    seconds = min(times[1:])
    least = prefill_flops(session.parts.model, parameters, sizes.prompt) / limits.matmul
    return Figure(f"prefill {sizes.prompt}", "prefill", seconds, sizes.prompt / seconds, least / seconds)


def measure_transformers(folder: str, sizes: Sizes) -> list[dict[str, Any]]:
    """The same batches and prompt with transformers, in a process of its own; or why there is none."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return [{"name": "transformers", "reason": f"{package} is not installed"}]
    asked = {
        "batches": sizes.batches, "contexts": sizes.contexts, "prompt": sizes.prompt, "steps": sizes.steps
    }  # fmt: skip
    script = Path(__file__).with_name("transformers_peer.py")
    done = subprocess.run(
        [sys.executable, str(script), folder, json.dumps(asked)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        return [{"name": "transformers", "reason": f"ended with {done.returncode}; see its output"}]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def as_markdown(report: dict[str, Any]) -> str:
    """A table of the figures beside their goals."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    limits = report["limits"]
    lines = [
        f"{report['model']}, random weights in bfloat16. {machine}. Measured in the same run: copies "
        f"{limits['copy'] / 1e9:.1f} GB/s, products of bfloat16 {limits['matmul'] / 1e12:.2f} TFLOP/s.",
        "",
        "| | ms | tokens/s | of the limit | goal | gap, goal below 5% | transformers, tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    peers = {one["name"]: one for one in report["transformers"]}
    missing = peers.get("transformers", {}).get("reason", "")
    for one in report["figures"]:
        peer = peers.get(one["name"], {})
        beside = (
            f"{peer['tokens_per_second']:.0f}" if "tokens_per_second" in peer else peer.get("reason", "-")
        )
        if one["seconds"] is None:
            lines.append(f"| {one['name']} | left out: {one['reason']} | | | | | {beside} |")
            continue
        gap = f"{one['gap']:.1%}" if one["phase"] == "decode" else "-"
        lines.append(
            f"| {one['name']} | {one['seconds'] * 1e3:.2f} | {one['tokens_per_second']:.0f} | "
            f"{one['fraction']:.1%} | {GOALS[one['phase']]:.0%} | {gap} | {beside} |"
        )
    if missing:
        lines += ["", f"transformers is left out: {missing}."]
    return "\n".join(lines) + "\n"


def run(model: str, backend: str, *, peer: bool, effort: Effort) -> dict[str, Any]:
    """Everything, as what is written to the JSON file."""
    sizes = SIZES[model]
    small = {"nbytes": 2**22, "size": 128} if model == "tiny" else {}
    limits = measure_limits(effort, **small)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(sizes.config))
        figures = []
        for one in measure_engine(folder, sizes, limits, backend):
            print(one, file=sys.stderr, flush=True)
            figures.append(asdict(one))
        left_out = [{"name": "transformers", "reason": "not asked for"}]
        others = measure_transformers(folder, sizes) if peer else left_out
    return {
        "model": model, "machine": describe_machine(), "limits": asdict(limits), "goals": GOALS,
        "figures": figures, "transformers": others,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 where something was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(SIZES), default="llama-3-8b", help="whose shapes")
    parser.add_argument("--backend", default="auto", help="the attention kernel")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "gpu", help="folder to write to")
    given = parser.parse_args(arguments)
    if given.model != "tiny" and jax.default_backend() == "cpu":
        parser.error(f"{given.model} needs an accelerator, and jax finds none; --model tiny runs on a CPU")
    report = run(given.model, given.backend, peer=not given.no_transformers, effort=Effort())
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / f"engine-{given.model}.json").write_text(json.dumps(report, indent=1) + "\n")
    (given.output / f"engine-{given.model}.md").write_text(as_markdown(report))
    print(as_markdown(report))
    return int(all(one["seconds"] is None for one in report["figures"]))


if __name__ == "__main__":
    sys.exit(main())
