"""Tensors in, tensors out: one file per op, with its schema, reference and gradient."""
from .low_rank import low_rank

__all__ = ["low_rank"]
