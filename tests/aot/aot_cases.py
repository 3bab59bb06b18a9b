"""The one table of what is compiled: models, steps, page dtypes, targets."""

from dataclasses import dataclass

TPUS = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")
GPUS = ("h100:4",)
NUM_PAGES = 16384
"""Of 16 tokens: a pool of hundreds of megabytes, beside which everything else is small."""
PAGE_SIZE = 16
ROWS = 128
MAX_MODEL_LEN = 8192


@dataclass(frozen=True)
class Model:
    """Attention of a model, all devices together."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None = None


LLAMA = Model("Llama-3-8B", 32, 8, 128)
QWEN = Model("Qwen3-32B, one of 4", 16, 2, 128)
QWEN_WHOLE = Model("Qwen3-32B", 64, 8, 128)
GEMMA_27B = Model("Gemma-3-27B, window 1024", 32, 16, 128, 1024)
GEMMA_1B = Model("Gemma-3-1B, window 512", 4, 1, 256, 512)

STEPS = {"decode": 128, "mixed": 2048}
"""Tokens of a step."""


@dataclass(frozen=True)
class Case:
    """One program: attention of one layer."""

    backend: str
    target: str
    model: Model
    step: str
    pages: str
    devices: int = 1

    @property
    def tokens(self) -> int:
        """Of the step, padding included."""
        return STEPS[self.step]

    @property
    def shape(self) -> str:
        """In words."""
        return f"{self.model.name}, {self.step}, {self.tokens} tokens"

    def __str__(self) -> str:
        name = f"{self.backend}-{self.target}-{self.model.name}-{self.step}-{self.pages}-{self.devices}"
        return name.replace(", ", "-").replace(" ", "_")


def attention_cases() -> list[Case]:
    """All of them."""
    cases = []
    for target in TPUS + GPUS:
        kernel = "tpu" if target in TPUS else "gpu"
        for step in STEPS:
            alone = [(LLAMA, "int8"), (LLAMA, "float8_e4m3fn"), (GEMMA_1B, "int8")]
            alone += [(model, "bfloat16") for model in (LLAMA, QWEN, GEMMA_27B, GEMMA_1B)]
            cases += [Case(kernel, target, model, step, pages) for model, pages in alone]
            cut = [(model, "bfloat16") for model in (LLAMA, QWEN_WHOLE, GEMMA_27B)] + [(LLAMA, "int8")]
            cases += [Case(kernel, target, model, step, pages, 4) for model, pages in cut]
    # of the fallback one slow program for TPU: XLA compiles it for 10 s, our kernel in one
    cases.append(Case("xla", "v5e:2x2", LLAMA, "decode", "bfloat16"))
    for step in STEPS:
        cases += [Case("xla", "h100:4", LLAMA, step, "bfloat16", devices) for devices in (1, 4)]
        cases.append(Case("xla", "h100:4", LLAMA, step, "int8"))
    return cases
