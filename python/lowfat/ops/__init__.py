"""Tensors in, tensors out: one file per op, with its schema, reference and gradient."""
from .dictionary import check_support as check_dictionary_support
from .dictionary import dictionary
from .dwt import dwt, idwt
from .low_rank import low_rank
from .low_rank_backward_into import low_rank_backward_into
from .low_rank_group import low_rank_group
from .low_rank_pivoted import check_pivots, low_rank_pivoted
from .low_rank_sparse import check_support as check_sparse_support
from .low_rank_sparse import low_rank_sparse
from .low_rank_swiglu import low_rank_swiglu
from .monarch import monarch
from .sparse24 import check_mask, sparse24
from .wavelet import wavelet

__all__ = ["check_dictionary_support", "check_mask", "check_pivots", "check_sparse_support", "dictionary", "dwt", "idwt",
           "low_rank", "low_rank_backward_into", "low_rank_group", "low_rank_pivoted", "low_rank_sparse", "low_rank_swiglu",
           "monarch", "sparse24", "wavelet"]
