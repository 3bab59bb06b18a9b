"""What an engine is told when it is made: small frozen dataclasses, checked when they are made.

Each field carries its help text, and the command line's flags are made from these fields, so an option is
written once: here. `EngineConfig.create(model, **options)` takes every field of every part by its own name.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args, get_type_hints

DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "safetensors", "gguf", "orbax", "dummy"]
Policy = Literal["fcfs", "priority"]
ExpertExchange = Literal["auto", "sum", "all_to_all"]
ExecutorBackend = Literal["mp", "ray"]


def option(default: Any, help: str, *, flag: bool = True) -> Any:
    """A dataclass field with its help text; `flag=False` keeps it off the command line."""
    return field(default=default, metadata={"help": help, "flag": flag})


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {wanted}")


def _positive(name: str, value: object, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole and value >= 1, name, value, "a whole number of at least 1")  # pyright: ignore[reportOperatorIssue]


def _one_of(name: str, value: object, kind: Any) -> None:
    _require(value in get_args(kind), name, value, f"one of {', '.join(map(repr, get_args(kind)))}")


@dataclass(frozen=True)
class ModelConfig:
    """Which weights to load, and how."""

    model: str = field(metadata={"help": "a name, Hugging Face repo id, folder, or GGUF file", "flag": False})
    tokenizer: str | None = option(
        None, "repo id or folder of the tokenizer, where it is not the model's own"
    )
    revision: str | None = option(None, "branch, tag or commit of the Hugging Face repo")
    cache_dir: Path | None = option(None, "where downloads are kept (default: huggingface_hub's own folder)")
    token: str | None = option(None, "Hugging Face access token for gated repos")
    load_format: LoadFormat = option("auto", "what the weights are stored as; 'dummy' makes random ones")
    dtype: DType = option("auto", "weights and activations; 'auto' takes the checkpoint's own")
    max_model_len: int | None = option(
        None, "most tokens of one request, prompt and output (default: the model's)"
    )
    skip_tokenizer_init: bool = option(
        False, "go without a tokenizer: prompts are token ids, outputs have no text"
    )
    trust_remote_code: bool = option(False, "let transformers run the tokenizer code that a repo ships")
    seed: int = option(0, "seed for requests that give none, and for dummy weights")
    max_logprobs: int = option(
        20, "most logprobs a request may ask for at a position; -1: the whole vocabulary"
    )

    def __post_init__(self) -> None:
        _require(
            bool(self.model) and isinstance(self.model, str), "model", self.model, "a name, repo id or path"
        )
        _one_of("load_format", self.load_format, LoadFormat)
        _one_of("dtype", self.dtype, DType)
        _positive("max_model_len", self.max_model_len, optional=True)
        _require(self.max_logprobs >= -1, "max_logprobs", self.max_logprobs, "-1 or a count")


@dataclass(frozen=True)
class CacheConfig:
    """The pages that keys and values live in."""

    page_size: int = option(16, "tokens a page holds")
    memory_utilization: float | None = option(
        None,
        "share of each device's memory for weights, pages and temporaries (0.9; on CPU 1 GiB of pages)",
    )
    kv_cache_memory: int | None = option(
        None, "bytes for pages on each device, instead of memory_utilization"
    )
    num_pages: int | None = option(None, "number of pages, instead of a size in bytes")
    enable_prefix_caching: bool = option(
        True, "keep finished requests' pages for prompts that begin the same"
    )

    def __post_init__(self) -> None:
        power_of_two = (
            isinstance(self.page_size, int) and self.page_size >= 1 and self.page_size.bit_count() == 1
        )
        _require(power_of_two, "page_size", self.page_size, "a power of two")
        share = self.memory_utilization
        _require(share is None or 0 < share <= 1, "memory_utilization", share, "in (0, 1]")
        _positive("kv_cache_memory", self.kv_cache_memory, optional=True)
        _positive("num_pages", self.num_pages, optional=True)
        both = self.kv_cache_memory is not None and self.num_pages is not None
        _require(not both, "num_pages", self.num_pages, "left out when kv_cache_memory is given")


@dataclass(frozen=True)
class SchedulerConfig:
    """Who runs in a step, and with how many tokens."""

    max_num_seqs: int | None = option(None, "most requests in one step (default: 256, on CPU 64)")
    max_num_batched_tokens: int | None = option(None, "most tokens in one step (default: 2048, on CPU 512)")
    policy: Policy = option("fcfs", "who is served first: the first to arrive, or the lowest priority value")
    enable_chunked_prefill: bool = option(True, "spread a long prompt over several steps")
    async_scheduling: bool = option(True, "plan the next step while the device works on this one")

    def __post_init__(self) -> None:
        _positive("max_num_seqs", self.max_num_seqs, optional=True)
        _positive("max_num_batched_tokens", self.max_num_batched_tokens, optional=True)
        _one_of("policy", self.policy, Policy)


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out over devices: as many as the sizes' product."""

    tensor_parallel_size: int = option(1, "devices that share each layer's heads and columns")
    expert_parallel_size: int = option(
        1, "groups of such devices that share the experts; heads are cut over all of them"
    )
    expert_exchange: ExpertExchange = option(
        "auto",
        "how tokens meet the experts of several devices: all devices have all tokens and parts are summed, "
        "or each sends its share of the tokens; 'auto' sends on TPU",
    )
    enable_eplb: bool = option(
        False, "place experts on devices, some with copies, by how many tokens go to each"
    )
    num_redundant_experts: int = option(
        0, "copies of experts of each layer, on all devices together, with enable_eplb"
    )
    eplb_step_interval: int = option(
        3000, "steps after which enable_eplb places experts anew; 0: they stay spread as without load"
    )
    pipeline_parallel_size: int = option(
        1, "groups of those, each with a run of the layers and its pages; on several hosts, best one for each"
    )
    data_parallel_size: int = option(
        1, "replicas of the model, each on devices of its own, that share the requests"
    )
    data_parallel_experts: bool = option(
        False,
        "have data_parallel_size groups of devices in one engine instead of replicas: each has requests, "
        "pages and attention of its own, and the experts lie over the devices of all groups",
    )

    num_hosts: int = option(
        1, "hosts that run one engine together, with a process on each; 0: those that jax finds (TPU pods)"
    )
    host_rank: int = option(0, "number of this host; host 0 plans and serves, the others follow it")
    coordinator_address: str | None = option(
        None, "name or address of host 0, with or without a port, where the hosts meet"
    )
    coordinator_port: int = option(29501, "port there, where the address has none")
    distributed_executor_backend: ExecutorBackend = option(
        "mp", "who starts the other hosts' processes: you ('mp'), or Ray, on nodes of its cluster ('ray')"
    )
    ray_resources: Mapping[str, float] | None = option(
        None, 'what Ray reserves on each of the other hosts, such as {"TPU": 4} (default: one CPU)'
    )

    def __post_init__(self) -> None:
        _positive("tensor_parallel_size", self.tensor_parallel_size)
        _positive("expert_parallel_size", self.expert_parallel_size)
        _one_of("expert_exchange", self.expert_exchange, ExpertExchange)
        self._check_balancing()
        _positive("pipeline_parallel_size", self.pipeline_parallel_size)
        _positive("data_parallel_size", self.data_parallel_size)
        _require(self.num_hosts >= 0, "num_hosts", self.num_hosts, "0 or a count")
        most = max(self.num_hosts - 1, 0)
        _require(0 <= self.host_rank <= most, "host_rank", self.host_rank, f"0 to {most} (num_hosts - 1)")
        _require(0 < self.coordinator_port < 65536, "coordinator_port", self.coordinator_port, "1 to 65535")
        _one_of("distributed_executor_backend", self.distributed_executor_backend, ExecutorBackend)
        ray = self.distributed_executor_backend == "ray"
        _require(
            ray or self.ray_resources is None, "ray_resources", self.ray_resources, "left out without Ray"
        )
        _require(self.num_hosts > 0 or not ray, "num_hosts", 0, "a count with Ray, which starts the others")
        given = self.coordinator_address is not None or ray
        _require(
            given or self.num_hosts < 2, "coordinator_address", None, "given when num_hosts is more than one"
        )
        alone, data, pipeline = self.num_hosts == 1, self.data_parallel_size, self.pipeline_parallel_size
        _require(
            data > 1 or not self.data_parallel_experts,
            "data_parallel_experts",
            True,
            "left out with a data_parallel_size of 1; set that to the number of data groups",
        )
        _require(
            pipeline == 1 or not self.data_parallel_experts,
            "pipeline_parallel_size",
            pipeline,
            "1 with data_parallel_experts; use tensor_parallel_size",
        )
        _require(
            alone or data == 1,
            "data_parallel_size",
            data,
            "1 with several hosts; run an engine for each replica, behind Ray Serve or a proxy",
        )
        even = self.num_hosts == 0 or pipeline % self.num_hosts == 0 or self.num_hosts % pipeline == 0
        _require(
            alone or pipeline == 1 or even,
            "pipeline_parallel_size",
            pipeline,
            f"a multiple of num_hosts={self.num_hosts} or divide it, so that no stage has a part of a host",
        )
        _require(
            alone or pipeline == 1 or not self.enable_eplb,
            "enable_eplb",
            True,
            "left out with stages on several hosts; experts stay there",
        )

    def _check_balancing(self) -> None:
        copies, interval = self.num_redundant_experts, self.eplb_step_interval
        _require(copies >= 0, "num_redundant_experts", copies, "0 or a count")
        _require(self.enable_eplb or copies == 0, "num_redundant_experts", copies, "0 without enable_eplb")
        _require(interval >= 0, "eplb_step_interval", interval, "0 or a count of steps")

    @property
    def replica_size(self) -> int:
        """Devices of each replica."""
        return self.tensor_parallel_size * self.expert_parallel_size * self.pipeline_parallel_size

    @property
    def coordinator(self) -> tuple[str, int]:
        """Where the hosts meet: address and port."""
        address = self.coordinator_address or "127.0.0.1"
        host, separator, port = address.rpartition(":")
        if separator and port.isdecimal() and (":" not in host or host.endswith("]")):
            return host.strip("[]"), int(port)
        return address.strip("[]"), self.coordinator_port


class AttentionBackend(Protocol):
    """What the engine needs to see of a `pallas_kernels.paged_attention.Backend`."""

    @property
    def name(self) -> str: ...

    @property
    def attend(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class CompileConfig:
    """How the step's programs are compiled."""

    compilation_cache: bool = option(True, "keep compiled programs on disk for the next start")
    compilation_cache_dir: Path | None = option(None, "where (default: a folder of the user's own cache)")
    keep_executables: bool = option(
        True, "keep programs whole in the compilation cache, so that the next start need not even trace them"
    )
    compile_in_background: bool = option(
        True, "serve as soon as a few programs can run every request, and compile the others meanwhile"
    )
    enforce_eager: bool = option(
        False, "compile nothing ahead: a request waits while a program that it needs first is compiled"
    )
    attention_backend: str | AttentionBackend | Callable[..., Any] = option(
        "auto",
        "name of a registered paged-attention kernel; 'auto' takes the first that serves the model "
        "(in Python also a pallas_kernels.paged_attention.Backend, or a function)",
    )
    matmul_backend: str = option(
        "auto",
        "what multiplies with weights: 'xla', or the name of a registered kernel for packed weights; 'auto' "
        "packs them on CPU where it can be done, and takes 'xla' elsewhere",
    )
    expert_metrics: bool = option(
        False, "count the tokens that go to each expert of each layer, for models that have experts"
    )
    progress: bool = option(True, "show progress bars while loading and compiling")

    def __post_init__(self) -> None:
        kernel = self.attention_backend
        is_kernel = isinstance(kernel, str) or callable(kernel) or callable(getattr(kernel, "attend", None))
        _require(
            is_kernel, "attention_backend", kernel, "a name, a Backend of paged attention, or a function"
        )


@dataclass(frozen=True)
class EngineConfig:
    """All that an engine is told, in parts."""

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    compile: CompileConfig = CompileConfig()

    @classmethod
    def create(cls, model: str, **options: Any) -> Self:
        """Makes a config from flat options, each a field of one of the parts.

        Raises:
            TypeError: an option that no part has; the message offers the nearest names.
            ValueError: a value out of range; the message names the option.
        """
        names = {f.name: part.name for part, f in option_fields()}
        values: dict[str, dict[str, Any]] = {part: {} for part in names.values()}
        for name, value in options.items():
            if name not in names or name == "model":
                near = difflib.get_close_matches(name, names, n=3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise TypeError(f"unknown option {name!r}{hint}")
            values[names[name]][name] = value
        values["model"]["model"] = model
        parts = get_type_hints(cls)
        return cls(**{part: parts[part](**given) for part, given in values.items()})


def option_fields() -> list[tuple[dataclasses.Field[Any], dataclasses.Field[Any]]]:
    """Every option as (the part's field in EngineConfig, the option's field in that part)."""
    parts = get_type_hints(EngineConfig)
    return [
        (part, f) for part in dataclasses.fields(EngineConfig) for f in dataclasses.fields(parts[part.name])
    ]
