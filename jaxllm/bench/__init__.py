"""Measurements of the engine: what `jaxllm bench` runs."""
