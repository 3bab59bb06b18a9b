"""The one table of what is compiled: models, steps, page dtypes, targets."""

from dataclasses import dataclass

TPUS = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")
GPUS = ("h100:4",)
NUM_PAGES = 8192
"""Of 32 tokens: a pool of hundreds of megabytes, beside which everything else is small."""
PAGE_SIZE = 32
"""The least that the TPU kernel takes with 8 bits."""
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
        models, eight_bit = (LLAMA, QWEN, GEMMA_27B, GEMMA_1B), (LLAMA,)
        cut = (LLAMA, QWEN_WHOLE, GEMMA_27B)
        if target in TPUS[1:]:  # one compiler for all TPUs: of the others what differs in size only
            models, cut = (LLAMA, GEMMA_1B), (LLAMA,)
        if target in GPUS:  # of Gemma-3-1B's head_dim 256 the kernel says that it does not serve it
            models = (LLAMA, QWEN, GEMMA_27B)
        for step in STEPS:
            cases += [Case(kernel, target, model, step, "bfloat16") for model in models]
            cases += [Case(kernel, target, model, step, "int8") for model in eight_bit]
            cases += [Case(kernel, target, model, step, "bfloat16", 4) for model in cut]
        cases.append(Case(kernel, target, LLAMA, "decode", "float8_e4m3fn"))
    # of the fallback one slow program for TPU: XLA compiles it for 10 s, our kernel in one
    cases.append(Case("xla", "v5e:2x2", LLAMA, "decode", "bfloat16"))
    for step in STEPS:
        cases += [Case("xla", "h100:4", LLAMA, step, "bfloat16", devices) for devices in (1, 4)]
        cases.append(Case("xla", "h100:4", LLAMA, step, "int8"))
    return cases
