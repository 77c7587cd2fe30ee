"""Which rows of a weight share an output block: rows of one subspace, so that its low-rank blocks lose less.

Output block o and input block i lose the eigenvalues of G = W_oi^T W_oi past the r-th. With mu the r-th that is the sum of
min(lambda, mu) less r mu; the smooth mu tr(G R), R = (G + mu I)^-1, changes by a closed form (Sherman and Morrison) when a
row w joins or leaves:

    + mu^2 w R^2 w^T / (1 + w R w^T)        - mu^2 w R^2 w^T / (1 - w R w^T)

so that a row is judged without the pull it has on its own block: by its distance from the blocks' subspaces alone
(k-subspaces) every row is best off where it is. Rows of two blocks change places, those that gain most first, from the best
of three starts: each row where it is, runs of neighbours, and halves of halves by an eigenvector (spectral bisection).
"""
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

_STEPS = 60    # at most
_GAIN = 1e-4   # relative; it ends where a step brings less
_SHARE = 0.25  # of a block's rows that change places in the first step; half as many whenever a step brings nothing
_POWER = 30    # steps towards an eigenvector
_FLOOR = 1e-9  # of the mean eigenvalue: mu of a block whose rank is r or less
_TINY = torch.finfo(torch.float64).tiny


class _Groups(NamedTuple):
    owner: Tensor  # [n], the block of each row
    gram: Tensor  # [b_in, b_out, p, p]
    mu: Tensor  # [b_in, b_out]
    lost: float


def group_rows(weight: Tensor, blocks: tuple[int, int], rank: int, interleave: bool) -> Tensor:
    """rows [n] int64, a permutation: the blocks of weight[rows] lose less than those of weight, where that is found.

    weight [n, b_in p], in the metric in which the loss is measured. Deterministic."""
    (b_in, b_out), n = blocks, weight.shape[0]
    slots = torch.arange(n, device=weight.device)
    plain = slots % b_out if interleave else slots // -(-n // b_out)  # the block that computes the i-th output
    sizes = torch.bincount(plain, minlength=b_out)
    parts = weight.double() / weight.double().abs().amax().clamp_min(_TINY)
    parts = parts.view(n, b_in, -1).transpose(0, 1).contiguous()
    starts = plain, torch.repeat_interleave(sizes), _halved(parts, sizes, rank)
    best, share = min((_measured(parts, owner, sizes, rank) for owner in starts), key=lambda groups: groups.lost), _SHARE
    for _ in range(_STEPS if b_out > 1 else 0):
        found = _measured(parts, _exchanged(best.owner, _costs(parts, best), share), sizes, rank)
        if found.lost < best.lost:
            gain, best = 1 - found.lost / best.lost, found
            if gain < _GAIN:
                break
        elif share * int(sizes.max()) < 1 or not best.lost:
            break
        else:
            share /= 2
    rows = torch.empty_like(slots)
    rows[plain.argsort(stable=True)] = best.owner.argsort(stable=True)
    return rows


def _measured(parts: Tensor, owner: Tensor, sizes: Tensor, rank: int) -> _Groups:
    _, n, p = parts.shape
    members = pad_sequence(owner.argsort(stable=True).split(sizes.tolist()), batch_first=True, padding_value=n)  # [b_out, s]
    held = pad(parts, (0, 0, 0, 1))[:, members]  # [b_in, b_out, s, p]
    gram = held.mT @ held
    values = torch.linalg.eigvalsh(gram if p <= held.shape[2] else held @ held.mT).flip(-1).clamp_min(0)
    mu = values[..., rank - 1].clamp_min(_FLOOR * float(values.mean()) + _TINY)
    return _Groups(owner, gram, mu, float(values[..., rank:].sum()))


def _costs(parts: Tensor, groups: _Groups) -> Tensor:
    """What row i adds to block o, or does already.   [n, b_out]"""
    costs = []
    for o in range(groups.mu.shape[1]):
        mu = groups.mu[:, o, None]  # [b_in, 1]
        shifted = groups.gram[:, o] + mu[..., None] * torch.eye(parts.shape[2], dtype=parts.dtype, device=parts.device)
        moved = parts @ torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        once, twice = (moved * parts).sum(-1), moved.square().sum(-1)  # w R w^T, w R^2 w^T   [b_in, n]
        is_own = groups.owner == o
        costs.append((mu.square() * twice / torch.where(is_own, (1 - once).clamp_min(_FLOOR), 1 + once)).sum(0))
    return torch.stack(costs, dim=1)


def _exchanged(owner: Tensor, costs: Tensor, share: float) -> Tensor:
    """Owners after each pair of blocks has exchanged at most this share of its rows, each row at most once."""
    owner, gains = owner.clone(), costs.gather(1, owner[:, None]) - costs  # of row i in block o, not in its own
    b_out = costs.shape[1]
    for a, b in combinations(range(b_out), 2):
        ranked = []
        for here, there in ((a, b), (b, a)):
            members = (owner == here).nonzero()[:, 0]
            ranked.append(members[gains[members, there].argsort(descending=True, stable=True)])
        fewer = min(map(len, ranked))
        left, right = (rows[:min(fewer, max(1, int(share * fewer / (b_out - 1))))] for rows in ranked)
        count = int((gains[left, b] + gains[right, a] > 0).sum())  # the sums fall
        left, right = left[:count], right[:count]
        owner[left], owner[right] = b, a
        gains[left] = gains[right] = -torch.inf
    return owner


def _halved(parts: Tensor, sizes: Tensor, rank: int) -> Tensor:
    """Owners by halving: rows are alike by the squares of their whitened products, summed over the input blocks.

    Whitened, rows of independent subspaces are orthogonal. What all blocks together cannot hold counts as noise."""
    _, n, p = parts.shape
    values, vectors = torch.linalg.eigh(parts.mT @ parts)
    beyond = values.new_zeros(len(values), 1) if p <= rank * len(sizes) else values[:, p - rank * len(sizes) - 1, None]
    floor = _FLOOR * float(values.mean()) + _TINY
    white = parts @ (vectors * (values.clamp_min(0) + beyond.clamp_min(floor)).rsqrt()[:, None])
    white = white / torch.linalg.vector_norm(white, dim=(0, 2), keepdim=True).clamp_min(_TINY)
    owner = torch.zeros(n, dtype=torch.int64, device=parts.device)
    pending = [(0, len(sizes))]
    while pending:
        first, stop = pending.pop()
        if stop - first > 1:
            middle = (first + stop) // 2
            members = (owner == first).nonzero()[:, 0]
            if not len(members):  # whole blocks of padding
                continue
            order = members[_direction(white[:, members]).argsort(descending=True, stable=True)]
            owner[order[int(sizes[first:middle].sum()):]] = middle
            pending += [(first, middle), (middle, stop)]
    return owner


def _direction(rows: Tensor) -> Tensor:
    """The second eigenvector of D^-1 A, A_ij the summed squares of products of rows i and j, D the sums of A's rows: constant
    on every set of rows that is orthogonal to the others.   rows [b_in, n, p] -> [n]"""
    def applied(vector: Tensor) -> Tensor:
        return ((rows @ (rows.mT @ (vector[:, None] * rows))) * rows).sum((0, 2))

    vector = torch.linspace(-1, 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
    degree = applied(torch.ones_like(vector)).clamp_min(_TINY)
    for _ in range(_POWER):
        vector = vector - (degree * vector).sum() / degree.sum()
        vector = applied(vector / vector.abs().max().clamp_min(_TINY)) / degree
    return vector
