"""Which of the engine's options a plan depends on."""

PLANNED = (
    "revision", "cache_dir", "token", "dtype", "max_model_len", "max_logprobs", "page_size",
    "memory_utilization", "kv_cache_memory", "num_pages", "max_num_seqs", "max_num_batched_tokens",
    "tensor_parallel_size", "expert_parallel_size", "pipeline_parallel_size", "expert_exchange",
    "enable_eplb", "num_redundant_experts", "attention_backend", "progress",
)  # fmt: skip
