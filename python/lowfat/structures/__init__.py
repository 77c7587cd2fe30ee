"""Linear layers whose weight is stored as factors: one file per factor format."""
from .low_rank import LowRank, LowRankGroup
from .structure import Structure

STRUCTURES = {c.__name__: c for c in (LowRank,)}

__all__ = ["STRUCTURES", "LowRank", "LowRankGroup", "Structure"]
