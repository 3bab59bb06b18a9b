"""The one table of what is compiled: models, steps, page dtypes, weights, targets."""

from dataclasses import dataclass
from typing import Literal

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
    value_dim: int | None = None
    """Pages hold keys alone, whose first so many dimensions are the values; None: both."""


LLAMA = Model("Llama-3-8B", 32, 8, 128)
QWEN = Model("Qwen3-32B, one of 4", 16, 2, 128)
QWEN_WHOLE = Model("Qwen3-32B", 64, 8, 128)
GEMMA_27B = Model("Gemma-3-27B, window 1024", 32, 16, 128, 1024)
GEMMA_1B = Model("Gemma-3-1B, window 512", 4, 1, 256, 512)
DEEPSEEK = Model("DeepSeek-V3, latent", 128, 1, 576, value_dim=512)

MODELS = (LLAMA, QWEN, GEMMA_27B, GEMMA_1B)
CUT = (LLAMA, QWEN_WHOLE, GEMMA_27B)
"""Over four chips."""

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
            eight_bit = MODELS
            if target in TPUS[1:] and step == "mixed":  # the slowest to compile, and the same code as for v5e
                eight_bit = (LLAMA,)
            cases += [Case(kernel, target, model, step, "bfloat16") for model in MODELS]
            cases += [Case(kernel, target, model, step, "int8") for model in eight_bit]
            cases += [Case(kernel, target, model, step, "bfloat16", 4) for model in CUT]
        cases.append(Case(kernel, target, LLAMA, "decode", "float8_e4m3fn"))
    # of the fallback one slow program for TPU: XLA compiles it for 10 s, our kernel in one
    cases.append(Case("xla", "v5e:2x2", LLAMA, "decode", "bfloat16"))
    # pages of keys alone, which the kernels refuse
    cases.append(Case("xla", "v5e:2x2", DEEPSEEK, "decode", "bfloat16"))
    for step in STEPS:
        cases += [Case("xla", "h100:4", LLAMA, step, "bfloat16", devices) for devices in (1, 4)]
        cases.append(Case("xla", "h100:4", LLAMA, step, "int8"))
        cases.append(Case("xla", "h100:4", DEEPSEEK, step, "bfloat16"))
    return cases


@dataclass(frozen=True)
class Product:
    """One program: a product with a matrix of Llama-3-8B or with the experts of a model.

    Attributes:
        scale_rows: inputs that share a scale; 0: all do. Of experts' weights nothing.
        experts: how many there are; 0: the weight is a quantized one.
        devices: that the weight's outputs are divided over.
    """

    op: Literal["quant_matmul", "grouped_matmul"]
    target: str
    tokens: int
    inputs: int
    outputs: int
    kind: str = "bfloat16"
    scale_rows: int = 0
    zero: bool = False
    activation: Literal["none", "int8", "fp8"] = "none"
    experts: int = 0
    devices: int = 1

    @property
    def backend(self) -> str:
        """The kernel for the target."""
        return "tpu" if self.target in TPUS else "gpu"

    @property
    def shape(self) -> str:
        """In words."""
        experts = f"{self.experts} x " if self.experts else ""
        scales = f", a scale for {self.scale_rows}" if self.scale_rows else ""
        extra = (", zeros" if self.zero else "") + (
            f", {self.activation} tokens" * (self.activation != "none")
        )
        return f"{self.tokens} tokens, {experts}[{self.inputs}, {self.outputs}], {self.kind}{scales}{extra}"

    def __str__(self) -> str:
        name = f"{self.op}-{self.target}-{self.shape}-{self.devices}"
        return name.replace(", ", "-").replace(" ", "_")


WEIGHTS = (("int8", 0), ("int4", 128), ("fp8", 128))


def product_cases() -> list[Product]:
    """All of them: few and many tokens."""
    cases = []
    for target in TPUS + GPUS:
        for tokens in (16, 2048):
            sizes = (tokens, 4096, 14336)
            cases += [Product("quant_matmul", target, *sizes, kind, rows) for kind, rows in WEIGHTS]
        cases.append(Product("quant_matmul", target, 16, 4096, 14336, "int4", 32, zero=True))
        cases.append(Product("quant_matmul", target, 128, 14336, 4096, "fp8", 128, activation="fp8"))
        cases.append(Product("quant_matmul", target, 16, 4096, 14336, "int8", devices=4))
    for target in TPUS:
        cases += [
            Product("grouped_matmul", target, tokens, 4096, 14336, experts=8) for tokens in (32, 4096)
        ]  # Mixtral 8x7B
        cases.append(Product("grouped_matmul", target, 256, 2048, 768, experts=128))  # Qwen3-30B-A3B
    for target in GPUS:
        cases += [Product("grouped_matmul", target, tokens, 4096, 14336, experts=8) for tokens in (32, 4096)]
        cases.append(Product("grouped_matmul", target, 512, 4096, 1536, experts=128))  # Qwen3-30B-A3B
        cases.append(Product("grouped_matmul", target, 1024, 2880, 1440, experts=128))  # gpt-oss, one of 4
        cases.append(Product("grouped_matmul", target, 1024, 720, 2880, experts=128))
    return cases
