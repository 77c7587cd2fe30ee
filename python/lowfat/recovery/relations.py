"""How points lie to one another, whatever the dimension they live in: distances and angles, and how two sets differ in them."""
import torch
from torch import Tensor
from torch.nn.functional import pad, smooth_l1_loss

_TINY = 1e-6  # a distance that counts as this much at least, so that points that coincide have a direction


def near(states: Tensor, window: int) -> Tensor:
    """Every token's neighbours from `window` before to `window` after it, zeros beyond the ends.

    [b, t, d] -> [b, t, 2 window + 1, d]"""
    return pad(states, (0, 0, window, window)).unfold(1, 2 * window + 1, 1).mT


def related(points: Tensor, others: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(distances over their mean, cosines of the angles between two others) of those that count, seen from each point.

    points [m, n, d]   others [m, n or 1, a, d]   counts [m, n, a]"""
    ways = others - points[:, :, None]
    lengths = ways.square().sum(-1).clamp(min=_TINY**2).sqrt()
    directions = ways / lengths[..., None]
    same = torch.eye(counts.shape[-1], dtype=torch.bool, device=counts.device)
    two = counts[..., :, None] & counts[..., None, :] & ~same
    distances = lengths[counts]
    return distances / distances.mean(), (directions @ directions.mT)[two]


def difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], triples: float) -> Tensor:
    """Texts of one token have no relation, those of two no angle."""
    return sum(weight * smooth_l1_loss(mine, other, reduction="sum") / max(mine.numel(), 1)
               for mine, other, weight in zip(ours, theirs, (1.0, triples)) if weight)
