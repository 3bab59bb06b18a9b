"""vLLM's engine arguments, and what becomes of each here.

https://docs.vllm.ai/en/stable/api/vllm/engine/arg_utils.html
"""

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

from jaxllm.config import option_fields

RENAMED = {
    "block_size": "page_size",
    "download_dir": "cache_dir",
    "gpu_memory_utilization": "memory_utilization",
    "hf_token": "token",
    "kv_cache_memory_bytes": "kv_cache_memory",
    "master_addr": "coordinator_address",
    "master_port": "coordinator_port",
    "nnodes": "num_hosts",
    "node_rank": "host_rank",
    "num_gpu_blocks_override": "num_pages",
    "scheduling_policy": "policy",
    "use_tqdm_on_load": "progress",
}
"""vLLM's name to ours; arguments with the same name in both are not listed."""

DTYPES = {"half": "float16", "float": "float32"}
"""vLLM's other names of dtypes."""

_OFF = (None, False, 0, "", "auto", "none")
"""Values that ask for nothing."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_local_media_path": ((), "models here read text only"),
    "code_revision": ((), "no model code is loaded from repos"),
    "config_format": (("hf",), "configs are read in Hugging Face's format only"),
    "convert": ((), "models generate text only"),
    "cpu_offload_gb": ((), "weights stay in the device's memory; use more devices (tensor_parallel_size)"),
    "device": ((), "JAX chooses; start Python with JAX_PLATFORMS=cpu, cuda or tpu"),
    "disable_sliding_window": ((), "lower max_model_len to the window instead"),
    "enable_lora": ((), "merge the adapter into the weights"),
    "enable_prompt_embeds": ((), "pass text or token ids"),
    "guided_decoding_backend": (("guidance",), "there is one way to compile grammars"),
    "hf_overrides": (({},), "edit a copy of the model's config.json"),
    "kv_cache_dtype": ((), "the cache has the model's dtype"),
    "limit_mm_per_prompt": (({},), "models here read text only"),
    "logits_processors": (
        ([],),
        "register with jaxllm.register_logits_processor and name it in SamplingParams",
    ),
    "logprobs_mode": (("raw_logprobs",), "logprobs are those before any processing"),
    "mm_processor_kwargs": (({},), "models here read text only"),
    "model_loader_extra_config": (({},), "choose with load_format"),
    "model_impl": (("vllm",), "models are jaxllm's own; ModelRegistry takes others"),
    "num_lookahead_slots": ((), "every token is sampled by the model itself"),
    "override_generation_config": (({},), "pass SamplingParams"),
    "pooler_config": ((), "models generate text only"),
    "preemption_mode": (("recompute",), "preempted requests are computed again"),
    "quantization": (
        (),
        "choose a dtype; GGUF files are dequantized to it without this argument",
    ),
    "reasoning_parser": ((), "read the output's text"),
    "rope_scaling": (({},), "edit a copy of the model's config.json"),
    "rope_theta": ((), "edit a copy of the model's config.json"),
    "runner": (("generate",), "models generate text only"),
    "speculative_config": (({},), "every token is sampled by the model itself"),
    "structured_outputs_config": (
        ({}, {"backend": "auto"}, {"backend": "guidance"}),
        "there is one way to compile grammars; limit whitespace in each request's StructuredOutputsParams",
    ),
    "task": (("generate",), "models generate text only"),
    "tokenizer_mode": (("hf",), "tokenizers are those of the tokenizers library"),
    "tokenizer_revision": ((), "pass tokenizer= with a folder of that revision"),
}
"""Arguments without effect here: values that do not ask for it, besides `_OFF`; what to do instead."""

COMBINED = frozenset(("enable_expert_parallel", "eplb_config"))
"""Arguments that say what others mean, or that hold others."""

EPLB_CONFIG = {"num_redundant_experts": "num_redundant_experts", "step_interval": "eplb_step_interval"}
"""Entries of vLLM's `eplb_config` to our options."""

EPLB_MEANINGLESS = frozenset(
    (
        "communicator",
        "log_balancedness",
        "log_balancedness_interval",
        "policy",
        "use_async",
        "window_size",
    )
)
"""Its others: experts are placed in one way, by all tokens since they were placed last."""

MEANINGLESS = frozenset(
    (
        "compilation_config",
        "cuda_graph_sizes",
        "disable_async_output_proc",
        "disable_cascade_attn",
        "disable_custom_all_reduce",
        "disable_log_requests",
        "disable_log_stats",
        "enable_log_requests",
        "enable_sleep_mode",
        "eplb_log_balancedness",
        "eplb_window_size",
        "max_parallel_loading_workers",
        "max_seq_len_to_capture",
        "num_scheduler_steps",
        "optimization_level",
        "prefix_caching_hash_algo",
        "ray_workers_use_nsight",
        "served_model_name",
        "swap_space",
        "tokenizer_pool_size",
        "tokenizer_pool_type",
        "use_v2_block_manager",
        "worker_cls",
        "worker_use_ray",
    )
)
"""Arguments that tune what does not exist here: CUDA graphs, workers, swapping, vLLM's own logs."""


def translate(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turns vLLM's engine arguments into options of `EngineConfig.create`.

    Options of our own pass through; None stands for the default, as in vLLM. Arguments that mean nothing
    here are accepted, with one warning that names them all.

    Raises:
        NotImplementedError: an argument that asks for what is not available; the message says what to do
            instead.
        TypeError: an argument that neither vLLM nor jaxllm has.
    """
    own = {field.name for _, field in option_fields()} - {"model"}
    translated: dict[str, Any] = {}
    meaningless = []
    for name, value in options.items():
        if name in COMBINED:
            continue  # with others, below
        if name in RENAMED or name in own:
            if value is not None:
                translated[RENAMED.get(name, name)] = _value(name, value)
        elif name in REFUSED:
            _refuse(name, value)
        elif name in MEANINGLESS:
            meaningless.append(name)
        else:
            near = difflib.get_close_matches(name, [*own, *RENAMED, *REFUSED, *COMBINED, *MEANINGLESS], n=3)
            raise TypeError(
                f"unknown argument {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
            )
    meaningless += _read_eplb_config(translated, options.get("eplb_config"))
    _lay_out_experts(translated, bool(options.get("enable_expert_parallel")))
    if meaningless:
        names = ", ".join(sorted(meaningless))
        warnings.warn(f"without meaning on JAX, and ignored: {names}", UserWarning, stacklevel=3)
    return {name: value for name, value in translated.items() if value is not None}


def _read_eplb_config(translated: dict[str, Any], config: Any) -> list[str]:
    """Adds what `eplb_config` holds, a mapping or vLLM's object; returns what means nothing here."""
    if isinstance(config, str):  # as the command line has it, where it is no JSON
        raise NotImplementedError(f"eplb_config={config!r}: must be a JSON object")
    entries = {} if config is None else config if isinstance(config, Mapping) else vars(config)
    if unknown := sorted(entries.keys() - EPLB_CONFIG.keys() - EPLB_MEANINGLESS):
        raise NotImplementedError(
            f"eplb_config: {unknown[0]!r} is not supported; give {' or '.join(EPLB_CONFIG)}"
        )
    translated |= {name: entries[theirs] for theirs, name in EPLB_CONFIG.items() if theirs in entries}
    return [f"eplb_config.{name}" for name in entries if name in EPLB_MEANINGLESS]


def _lay_out_experts(translated: dict[str, Any], enabled: bool) -> None:
    """In vLLM the devices of tensor parallelism share the experts, whole ones, if expert parallelism is on.

    Here heads and columns are cut over the devices of both sizes, so the second one alone is the same. With
    data parallelism the devices of all ranks share the experts.
    """
    if enabled and translated.get("data_parallel_size", 1) > 1:
        translated.setdefault("data_parallel_experts", True)
    if enabled and "tensor_parallel_size" in translated and "expert_parallel_size" not in translated:
        translated["expert_parallel_size"] = translated.pop("tensor_parallel_size")


def _value(name: str, value: Any) -> Any:
    if name == "hf_token" and value is True:
        return None  # the token of `hf auth login`, which is what no token means here
    if name == "distributed_executor_backend" and value == "uni":
        return None  # one process, which is what it is on one host
    if name == "dtype":
        plain = str(value).removeprefix("torch.")
        return DTYPES.get(plain, plain)
    return value


def _refuse(name: str, value: Any) -> None:
    accepted, advice = REFUSED[name]
    if not any(value == off for off in (*_OFF, *accepted)):
        raise NotImplementedError(f"{name}={value!r}: not supported; {advice}")
