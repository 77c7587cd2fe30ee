"""The judges of a result: gates G1-G3 for what a bench timed and a test computed, and G4 for whole numbers.

Everything is compared with fp64 of the already rounded inputs, and with the error that torch's own chain makes in the tested
dtype, so that no tolerance is chosen by hand. A chain is y = x F1 F2 ... + bias, sums accumulated in fp32."""
from dataclasses import dataclass
from math import pi, sqrt

import torch
from torch import Tensor

ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24, torch.float64: 2**-53}


@dataclass
class Chain:
    """What G3 needs to know: the fp64 result, the scale of each rounded intermediate and of the sums, their length."""
    y64: Tensor
    mids: list[Tensor]  # sqrt(h^2 W^2) for every stored intermediate h and the factor W that it enters
    magnitude: Tensor  # |x| |F1| ... |Fp| + |bias|
    length: int
    roundings: int  # of the intermediate with the fewest elements, or of the result


def chain(first: Tensor, *factors: Tensor, bias: Tensor | None = None) -> Chain:
    """The chain first @ F1 @ F2 ... + bias in fp64."""
    y, magnitude, mids, length = first.double(), first.double().abs(), [], 0
    roundings = []
    for i, factor in enumerate(factors):
        factor = factor.double()
        if i > 0:
            mids = [(mid.square() @ factor.square()).sqrt() for mid in mids]  # an earlier rounding spreads like noise
            mids.append((y.square() @ factor.square()).sqrt())
        length += factor.shape[0]
        y, magnitude = y @ factor, magnitude @ factor.abs()
        roundings.append(y.numel())
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    return Chain(y, mids, magnitude, length, min(roundings))


ACTIVATIONS = {"none": lambda z: z, "relu": lambda z: z.clamp(min=0), "gelu": lambda z: z * torch.special.ndtr(z),
               "gelu_tanh": lambda z: z / 2 * (1 + torch.tanh(sqrt(2 / pi) * (z + 0.044715 * z**3))),
               "silu": lambda z: z * torch.sigmoid(z)}
SLOPES = {"none": 1.0, "relu": 1.0, "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1}  # the steepest that each gets


def finished(z: Chain, activation: str, residual: Tensor | None = None) -> Chain:
    """The activation of a chain, plus the residual, where both that and the chain itself may have been stored."""
    y, slope = ACTIVATIONS[activation](z.y64), SLOPES[activation]
    mids, magnitude = [slope * mid for mid in (*z.mids, z.y64.abs())], slope * z.magnitude
    if residual is not None:
        mids, magnitude, y = [*mids, y.abs()], magnitude + residual.double().abs(), y + residual.double()
    return Chain(y, mids, magnitude, z.length + 2, z.roundings)


def product_of(gate: Chain, up: Chain) -> Chain:
    """silu(gate) * up, where gate, its silu and up may each have been stored."""
    y, slope = ACTIVATIONS["silu"](gate.y64), SLOPES["silu"] * up.y64.abs()
    silu = y.abs()
    mids = [slope * mid for mid in (*gate.mids, gate.y64.abs())] + [silu * mid for mid in (*up.mids, up.y64.abs())]
    return Chain(y * up.y64, [*mids, silu * up.y64.abs()],
                 slope * gate.magnitude + silu * up.magnitude, gate.length + up.length, min(gate.roundings, up.roundings))


def norm_gate(y: Tensor, framework: Tensor, y64: Tensor, factor: float = 1.25) -> bool:
    """G1: the norm of the error, against the framework's own. Says nothing below 8,192 elements."""
    if y.numel() < 8192:
        return True
    return bool((y.double() - y64).norm() <= factor * (framework.double() - y64).norm())


def max_gate(y: Tensor, framework: Tensor, y64: Tensor) -> bool:
    """G2: the largest error, against twice the framework's own and the rounding of the output dtype."""
    rounded = y64.to(y.dtype).float()
    slack = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().double().max()
    return bool((y.double() - y64).abs().max() <= 2 * (framework.double() - y64).abs().max() + slack)


def element_gate(y: Tensor, known: Chain, mid: torch.dtype | None = None, accumulator: torch.dtype = torch.float32) -> bool:
    """G3: every element against its own bound. mid: the dtype intermediates are stored in, the result's if not given."""
    if y.dtype == torch.float64:
        accumulator = torch.float64
    u_out, u_mid, u_acc = ROUNDOFF[y.dtype], ROUNDOFF[mid or y.dtype], ROUNDOFF[accumulator]
    bound = u_out * known.y64.abs() + 6 * sqrt(known.length) * u_acc * known.magnitude
    bound += torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps  # the smallest subnormal
    for scale in known.mids:
        bound += 6 * u_mid * scale
    return bool(((y.double() - known.y64).abs() <= bound).all())  # False where y is NaN


def exact_gate(y: Tensor, y64: Tensor) -> bool:
    """G4: bit-equal, on whole numbers."""
    return torch.equal(y.double(), y64)


def failed_gates(y: Tensor, framework: Tensor, known: Chain, mid: torch.dtype | None = None) -> list[str]:
    """The gates among G1-G3 that this result does not pass; `mistrusted` where the data could not have shown an error."""
    if y.shape != known.y64.shape:
        return [f"shape {list(y.shape)} for {list(known.y64.shape)}"]
    if y.numel() == 0:
        return []
    passed = {"G3": element_gate(y, known, mid), "mistrusted": (known.y64 == 0).double().mean() <= 0.3}
    # G1 and G2 compare with the framework's luck. In fp64 that is noise, as y64 is no better than y; and a middle of a few
    # numbers may by chance be all but exact there, which made right fp32 results with r = 1, m = 1 fail G2.
    if y.dtype != torch.float64 and known.roundings >= 32:
        passed |= {"G1": norm_gate(y, framework, known.y64), "G2": max_gate(y, framework, known.y64)}
    return [name for name, ok in passed.items() if not ok]
