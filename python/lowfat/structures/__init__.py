"""Linear layers whose weight is stored as factors: one file per factor format."""
from .dictionary import Dictionary
from .low_rank import LowRank, LowRankGroup
from .low_rank_pivoted import LowRankPivoted
from .low_rank_sparse import LowRankSparse
from .monarch import Monarch
from .quantized import Quantized
from .sparse24 import Sparse24
from .structure import Structure, keep_indices_local, share, structures
from .submatrix import Submatrix
from .sum import PARTS, Sum
from .wavelet import Wavelet

STRUCTURES = PARTS | {"LowRankPivoted": LowRankPivoted, "Submatrix": Submatrix, "Sum": Sum, "Wavelet": Wavelet}

__all__ = ["Dictionary", "LowRank", "LowRankGroup", "LowRankPivoted", "LowRankSparse", "Monarch", "Quantized", "STRUCTURES",
           "Sparse24", "Structure", "Submatrix", "Sum", "Wavelet", "keep_indices_local", "share", "structures"]
