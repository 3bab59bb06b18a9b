"""Checkpoints of every format, under one set of names and shapes; stands alone and never imports jaxllm."""
