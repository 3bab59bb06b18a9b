"""Modules that are run as programs under the names that vLLM's have."""
