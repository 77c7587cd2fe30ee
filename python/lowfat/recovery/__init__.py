"""Training that wins quality back: one file per strategy."""
from .finetune import finetune
from .staged import staged
from .straight_through import straight_through
