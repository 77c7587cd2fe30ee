"""Low-rank factors fitted anew to the inputs that the compressed model really has, layer by layer, in closed form.

A layer that was factorized on the dense model's inputs X_d reads others, X, once those before it are factorized too. With
the dense weight W, and outputs that are partly those W would have and partly the dense model's (MPIFA, 2501.19090),
    T = (1 - l) X W^T + l X_d W^T        min ||T - X (u v)^T||^2 + e ||W - u v||^2
The best weight of any rank is W' = ((1 - l) W C + l W D + e W) (C + e I)^-1 with C = X^T X and D = X_d^T X, which is all
that has to be gathered; and what a weight M loses beyond it is tr((M - W') (C + e I) (M - W')^T), so that
    u = W' C' v^T (v C' v^T)^-1 with v fixed (SVD-LLM's update, over all batches)      v = u^+ W' with u fixed
"""
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite

import torch
from torch import Tensor, nn

from .calibrate import Enough, discover, look_at, token_rows
from .errors import ArgumentError, NumericsError, UnsupportedError
from .layers import dense_weight, origin_of
from .linalg import Root, balance, gram_root
from .listen import forward, listening, untouched
from .methods import whitened
from .pivot import low_rank_layers
from .stats import Stats
from .structures import LowRank, LowRankPivoted, structures

SOLVES = ("u", "uv", "svd")


@dataclass
class UpdatedLayer:
    """What became of one layer. Errors are those of its outputs on the compressed model's inputs, relative, beyond what the
    best dense weight has."""
    error_before: float
    error: float
    kept: bool  # whether the new factors are there: not where they are no better
    tokens: int
    events: list[str]
    reason: str = ""


@dataclass
class UpdateReport:
    """What update() did, by layer, in the order in which it did it."""
    layers: dict[str, UpdatedLayer]

    def to_json(self) -> dict:
        """Plain JSON."""
        return {"layers": {name: asdict(layer) for name, layer in self.layers.items()}}


@dataclass
class _Seen:
    """Sums over the tokens that one group of layers reads.   k features"""
    gram: Tensor  # [k, k], X^T X of the compressed model
    cross: Tensor | None  # [k, k], X_d^T X; None where the target has nothing of the dense model
    total: Tensor  # [k], the sum of X
    rows: int


@torch.no_grad()
def update(model: nn.Module, dense: nn.Module, batches: Iterable[Mapping[str, Tensor]], *,
           layers: Sequence[str] | None = None, solve: str = "uv", dense_share: float = 0.25, ridge: float = 1e-3,
           on_progress: Callable[[int, int, str], None] | None = None) -> UpdateReport:
    """Fits the low-rank layers of a factorized model to its own inputs over all batches, first to last, in place.

    dense: the model that it was made of. batches: each a dict for model(**batch); padding is left out. layers: name
    patterns. solve: "u" alone, "uv" for one step of each (MPIFA), "svd" for the best pair at once. dense_share: l, how much
    of the dense model's own outputs the target has. ridge: e, in parts of the mean diagonal of C, towards the dense weight.
    A layer whose v is another's too gets a new u alone. New factors stay only where they are better in the layer's dtype.

    Layers are taken one input after the other, with one pass of both models over the batches up to there for each: the later
    ones see what the earlier ones have become. on_progress(layers done, in all, name). Raises before any layer changes:
    ArgumentError for options or a dense model that do not fit, ShapeError for other sizes there. On the way, with the layers
    before already fitted: UnsupportedError when the two models read different tokens, NumericsError for inputs that are not
    finite."""
    _check_options(model, dense, solve, dense_share, ridge)
    found = low_rank_layers(model, (LowRank, LowRankPivoted), layers)
    origins = {name: origin_of(dense, name, layer) for name, layer in found.items()}
    batches = list(batches) if iter(batches) is batches else batches
    look_at(batches)
    users = Counter(id(layer.v) for _, layer in structures(model) if isinstance(layer, LowRank))
    report: dict[str, UpdatedLayer] = {}
    with untouched(model), untouched(dense), torch.no_grad():  # leaving inference mode turns gradients on
        groups, calls = discover(model, found, next(iter(batches)))
        reached = [group for group in groups if group.names[0] in calls]
        for group in sorted(reached, key=lambda one: calls.index(one.names[0])):
            leader, once = group.names[0], calls.count(group.names[0]) == 1
            seen = _gathered(model, dense if dense_share else None, leader, batches, once)
            for name in group.names:
                report[name] = _updated(found[name], origins[name], seen, solve=solve, dense_share=dense_share, ridge=ridge,
                                        is_shared=users[id(found[name].v)] > 1)
                if on_progress:
                    on_progress(len(report), len(found), name)
    for name in found.keys() - report.keys():
        report[name] = UpdatedLayer(0.0, 0.0, False, 0, [], "no batch reaches it")
    return UpdateReport(report)


def _check_options(model: nn.Module, dense: nn.Module, solve: str, dense_share: float, ridge: float) -> None:
    if solve not in SOLVES:
        raise ArgumentError(f"solve must be one of {', '.join(SOLVES)}; found {solve!r}")
    if not _is_number(dense_share) or not 0 <= dense_share <= 1:
        raise ArgumentError(f"dense_share must be a number from 0 to 1; found {dense_share!r}")
    if not _is_number(ridge) or not ridge >= 0 or not isfinite(ridge):
        raise ArgumentError(f"ridge must be a number, at least 0; found {ridge!r}")
    if dense is model:
        raise ArgumentError("dense is the model itself; it must be the one that the model was made of")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _gathered(model: nn.Module, dense: nn.Module | None, name: str, batches: Iterable[Mapping], once: bool) -> _Seen:
    layer = model.get_submodule(name)
    k, device = layer.in_features, layer.v.device
    seen = _Seen(*(torch.zeros(*shape, dtype=torch.float64, device=device) for shape in ((k, k), (k, k), (k,))), 0)
    for batch in batches:
        ours = _inputs(model, name, batch, once).to(device)
        wide = torch.promote_types(ours.dtype, torch.float32)  # products in it; the sums over batches in fp64
        ours = ours.to(wide)
        seen.gram += ours.mT @ ours
        seen.total += ours.sum(0, dtype=torch.float64)
        seen.rows += len(ours)
        if dense is not None:
            theirs = _inputs(dense, name, batch, once).to(device, wide)
            if theirs.shape != ours.shape:
                raise UnsupportedError(f"{name} reads {list(ours.shape)} in the model and {list(theirs.shape)} in the dense "
                                       "one; both must read the same tokens")
            seen.cross += theirs.mT @ ours
    if not (seen.gram.isfinite().all() and seen.cross.isfinite().all()):
        raise NumericsError(f"{name}: its inputs hold NaN or infinity, or overflow when squared")
    return seen if dense is not None else _Seen(seen.gram, None, seen.total, seen.rows)


def _inputs(model: nn.Module, name: str, batch: Mapping, once: bool) -> Tensor:
    """What the layer reads in one pass, of all its calls where there are several.   [tokens, k]"""
    found: list[Tensor] = []

    def before(_: str, x: Tensor) -> None:
        found.append(token_rows(name, x.detach(), batch.get("attention_mask")))
        if once:
            raise Enough

    with listening({name: model.get_submodule(name)}, before):
        try:
            forward(model, batch, labels=False)
        except Enough:
            pass
    if not found:
        raise UnsupportedError(f"{name} is reached by the first batch and not by every other")
    return torch.cat(found)


def _updated(layer: LowRank | LowRankPivoted, origin: nn.Module, seen: _Seen, *, solve: str, dense_share: float,
             ridge: float, is_shared: bool) -> UpdatedLayer:
    mean = float(seen.gram.diagonal().mean())
    if not mean:
        return UpdatedLayer(0.0, 0.0, False, seen.rows, [], "its inputs are zero")
    device = layer.v.device
    weight = dense_weight(origin).to(device, torch.float64)
    root = gram_root(seen.gram, "cholesky", ridge * mean)
    wanted = weight @ (seen.gram if seen.cross is None else torch.lerp(seen.gram, seen.cross, dense_share))
    if origin.bias is not None:  # of the target, where training has moved the model's
        moved = origin.bias.to(device, torch.float64) - layer.bias.to(torch.float64)
        wanted += torch.outer(moved, seen.total)
    best = root.solved(root.whitened(wanted.add_(weight, alpha=ridge * mean)))

    whole = root.applied(best).norm().clamp_min(torch.finfo(torch.float64).tiny)

    def error(candidate: LowRank | LowRankPivoted) -> float:
        v, u = (factor.double() for factor in _factors(candidate))
        return float(root.applied(u @ v - best).norm() / whole)

    before = error(layer)
    try:
        made, events = _solved(layer, best, root, "u" if is_shared else solve, seen.rows, is_shared)
    except NumericsError as failed:  # pivots that do not exist, for one
        return UpdatedLayer(before, before, False, seen.rows, root.events, str(failed))
    after = error(made)
    is_better = after < before  # not where there is NaN
    if is_better:
        for key, tensor in made.state_dict().items():
            if key != "bias" and not (is_shared and key == "v"):
                getattr(layer, key).copy_(tensor)
    return UpdatedLayer(before, after if is_better else before, is_better, seen.rows, root.events + events,
                        "" if is_better else "the factors are as good already")


def _solved(layer: LowRank | LowRankPivoted, best: Tensor, root: Root, solve: str, rows: int,
            is_shared: bool) -> tuple[LowRank | LowRankPivoted, list[str]]:
    """(new factors in the layer's dtype, without a bias; events)"""
    events: list[str] = []
    if solve == "svd":
        fitted, events = whitened.factorize(best, None, Stats(_gram_of(root), rows), rank=layer.rank)
        v, u = fitted.v, fitted.u
    else:
        v, u = (factor.double() for factor in _factors(layer))
        seen = root.applied(v)  # [r, k], with which v C' v^T is a product with itself
        inner = gram_root(seen @ seen.mT, "cholesky")
        u = inner.solved(inner.whitened(root.applied(best) @ seen.mT))
        if solve == "uv":
            outer = gram_root(u.mT @ u, "cholesky")
            v = outer.solved(outer.whitened(best.mT @ u)).mT
            events += outer.events
        events += inner.events
    if is_shared:
        return LowRank.of(layer.v, u.to(layer.v.dtype)), events
    u, v = balance(u, v)
    if isinstance(layer, LowRankPivoted):
        return LowRankPivoted.from_factors(v, u).to(layer.v.dtype), events
    return LowRank.of(v.to(layer.v.dtype), u.to(layer.v.dtype)), events


def _gram_of(root: Root) -> Tensor:
    whole = root.vectors if root.scale is None else root.vectors * root.scale
    return whole @ whole.mT


def _factors(layer: LowRank | LowRankPivoted) -> tuple[Tensor, Tensor]:
    """(v [r, k], u [n, r])"""
    return layer.factors() if isinstance(layer, LowRankPivoted) else (layer.v, layer.u)
