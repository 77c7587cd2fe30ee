"""Training that wins quality back: one file per strategy."""
from .block_movement import block_movement
from .finetune import finetune
from .isp import isp
from .learned_ranks import learned_ranks
from .lpaf import lpaf
from .meta_distill import meta_distill
from .mixed_rank import mixed_rank, theseus
from .staged import staged
from .straight_through import straight_through
