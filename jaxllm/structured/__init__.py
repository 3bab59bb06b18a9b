"""Outputs that are held to a JSON schema, a regular expression or a grammar."""

from jaxllm.structured.params import StructuredOutputsParams

__all__ = ["StructuredOutputsParams"]
