"""Bugs planted in primitives and kernels, each of which must make a test executable fail. A kernel's author adds to the list
of the kernel's file."""
from . import (dictionary_backward, dictionary_forward, low_rank_backward, low_rank_chain, low_rank_decode,
               low_rank_small_batch, low_rank_sparse, monarch, primitives, sparse24_backward, sparse24_forward,
               sparse24_prefill, wavelet)

MUTANTS = [mutant for family in (primitives, low_rank_decode, low_rank_backward, low_rank_small_batch, low_rank_chain,
                                 monarch, sparse24_backward, sparse24_forward, sparse24_prefill, dictionary_backward,
                                 dictionary_forward, low_rank_sparse, wavelet)
           for mutant in family.MUTANTS]
