"""What each layer sees on real inputs: the Gram matrix of its input, and with labels the empirical Fisher information."""
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Stats:
    """What one layer saw during calibration.   k features in, n out"""
    gram: Tensor  # [k, k] fp32, sum over rows of x x^T
    rows: int  # tokens that were counted, padding left out
    fisher_in: Tensor | None = None  # [k] fp32, mean squared gradient of a sample, summed over the outputs
    fisher_out: Tensor | None = None  # [n] fp32, the same summed over the inputs
    fisher: Tensor | None = None  # [n, k] fp32, the same element by element
    samples: int = 0  # that the Fisher information is the mean of
