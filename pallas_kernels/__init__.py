"""Kernels that stand alone: one op a folder, several backends each, a registry for one's own."""
