"""Chips that programs can be compiled for without having them, and what is known about them."""

from pallas_kernels.targets.chips import CHIPS, Chip
from pallas_kernels.targets.target import Target

__all__ = ["CHIPS", "Chip", "Target"]
