"""lowfat: LOW-rank and FActorized Transformers. Importing it imports torch and nothing else of size."""
from ._native import build_info, kernels
from .adapt import AdaptReport, adapt, load_adapter, merge_adapters, save_adapter, unadapt, unmerge_adapters
from .blocks import Blocks, group_blocks, ungroup_blocks
from .calibrate import Calibration, calibrate
from .checkpoint import export_dense, load, save
from .comparison import compare
from .correct import CorrectionReport, correct, quantize
from .evaluate import evaluate
from .factorize import Report, factorize
from .ops import low_rank
from .optimizers import PerLayer, parameter_groups
from .pivot import PivotReport, pivot
from .plan import Choice, Plan, plan
from .pretrain import PretrainReport, pretrain
from .recovery import (block_movement, finetune, isp, learned_ranks, lpaf, meta_distill, mixed_rank, staged,
                       straight_through, theseus)
from .replace import ReplaceReport, replace
from .reproduce import reproduce
from .stats import Stats
from .structures import (Dictionary, LowRank, LowRankGroup, LowRankPivoted, LowRankSparse, Monarch, Quantized, Sparse24,
                         Submatrix, Sum, Wavelet)
from .update import UpdateReport, update

__all__ = ["AdaptReport", "Blocks", "Calibration", "Choice", "CorrectionReport", "Dictionary", "LowRank", "LowRankGroup",
           "LowRankPivoted", "LowRankSparse", "Monarch", "PerLayer", "PivotReport", "Plan", "PretrainReport", "Quantized",
           "ReplaceReport", "Report", "Sparse24", "Stats", "Submatrix", "Sum", "UpdateReport", "Wavelet", "adapt",
           "block_movement", "build_info", "calibrate", "compare", "correct", "evaluate", "export_dense", "factorize",
           "finetune", "group_blocks", "isp", "kernels", "learned_ranks", "load", "load_adapter", "low_rank", "lpaf",
           "merge_adapters", "meta_distill", "mixed_rank", "parameter_groups", "pivot", "plan", "pretrain", "quantize",
           "replace", "reproduce", "save", "save_adapter", "staged", "straight_through", "theseus", "unadapt",
           "ungroup_blocks", "unmerge_adapters", "update"]
