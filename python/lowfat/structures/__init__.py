"""Linear layers whose weight is stored as factors: one file per factor format."""
from .low_rank import LowRank, LowRankGroup
from .monarch import Monarch
from .structure import Structure

STRUCTURES = {c.__name__: c for c in (LowRank, Monarch)}

__all__ = ["STRUCTURES", "LowRank", "LowRankGroup", "Monarch", "Structure"]
