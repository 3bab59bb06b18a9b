"""Mapping tables, one file a family: which checkpoint tensors make which of the engine's parameters."""
