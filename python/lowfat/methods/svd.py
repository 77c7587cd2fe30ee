"""Truncated SVD: the closest matrix of rank r in the Frobenius norm (Eckart and Young 1936).   What = U_r S_r V_r^T"""
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg import require_finite, smaller_gram, spectrum, tails, truncated_svd
from ..structures import LowRank

if TYPE_CHECKING:
    from ..stats import Stats


@torch.no_grad()
def factorize(weight: Tensor, bias: Tensor | None, stats: "Stats | None" = None, *, rank: int) -> tuple[LowRank, list[str]]:
    """The layer in the weight's dtype, each singular value split evenly between u and v.   weight [n, k]   bias [n]"""
    u, s, vt, solved = truncated_svd(weight, rank)
    root = s.sqrt()
    return LowRank.of(vt.mul_(root[:, None]).to(weight.dtype), u.mul_(root).to(weight.dtype), bias), solved.events


@torch.no_grad()
def losses(weight: Tensor, stats: "Stats | None" = None) -> Tensor:
    """||W - What||_F^2 for every rank: the squared singular values that are cut off.   [min(n, k) + 1], fp64"""
    require_finite(weight, "weight")
    return tails(spectrum(lambda: smaller_gram(weight)))
