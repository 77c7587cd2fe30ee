"""Matrices and calibration inputs on which solvers are known to fail."""
import math

import torch

N, K = 12, 9  # out, in


def _kahan(size: int, angle: float = 1.2) -> torch.Tensor:
    s, c = math.sin(angle), math.cos(angle)
    return torch.diag(s ** torch.arange(size).float()) @ (torch.eye(size) - c * torch.ones(size, size).triu(1))


def weights() -> dict[str, torch.Tensor]:
    """Degenerate weights [n, k] in fp32, by name."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(N, K, generator=g)
    orthogonal = torch.linalg.qr(torch.randn(N, K, generator=g)).Q
    single = torch.zeros(N, K)
    single[3, 2] = -2.0
    gone = normal.clone()
    gone[:, [1, 4]] = 0
    gone[[0, 5]] = 0
    i = torch.arange(N)[:, None] + torch.arange(K)
    return {
        "zero": torch.zeros(N, K), "one nonzero": single, "rank 1": normal[:, :1] @ normal[:1],
        "duplicate rows": normal[[0] * 6 + [1] * 6], "zero rows and columns": gone, "identity": torch.eye(N, K),
        "orthogonal": orthogonal, "equal singular values": 3 * orthogonal,
        "powers of two": orthogonal * 2.0 ** -torch.arange(K),
        "hilbert": 1.0 / (i + 1), "kahan": _kahan(K), "row": normal[:1], "column": normal[:, :1], "single": normal[:1, :1],
        "tiny": normal * 1e-30, "huge": normal * 1e30, "mixed scales": normal * 10.0 ** torch.arange(-20, -20 + 5 * K, 5),
        "bf16": normal.bfloat16(), "fp16": normal.half(), "fp64": normal.double(), "wide": normal.T.contiguous(),
        "transposed view": normal.T,
    }


def inputs(k: int) -> dict[str, torch.Tensor]:
    """Degenerate calibration inputs [tokens, k] in fp32, by name."""
    g = torch.Generator().manual_seed(1)
    normal = torch.randn(40, k, generator=g)
    dead = normal.clone()
    dead[:, ::2] = 0
    massive = normal.clone()
    massive[:, 0] *= 1e6
    return {"normal": normal, "fewer tokens than features": normal[:max(1, k // 2)], "one token": normal[:1],
            "dead channels": dead, "massive channel": massive, "constant tokens": normal[:1].expand(40, k), "nothing but zeros": torch.zeros(5, k),
            "tiny": normal * 1e-15, "huge": normal * 1e15}


def planted(n, q, a, s, seed):
    """Rows of s of a incoherent atoms each, pushed apart until no two have a cosine much above 0.2, and these atoms.

    [n, q], [a, q], fp64"""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(a, q, generator=generator, dtype=torch.float64)
    for _ in range(200):
        atoms /= atoms.norm(dim=1, keepdim=True)
        products = (atoms @ atoms.mT).fill_diagonal_(0)
        atoms = atoms - 0.3 * (products * (products.abs() > 0.2)) @ atoms
    atoms /= atoms.norm(dim=1, keepdim=True)
    keep = torch.rand(n, a, generator=generator).argsort(1) < s
    return torch.randn(n, a, generator=generator, dtype=torch.float64) * keep @ atoms, atoms
