"""KFAC-SVD: the statistic against gradients taken one text at a time, the limits of shrinkage, and shared factors."""
import matrices
import pytest
import torch
from torch import nn

import lowfat
from lowfat.calibrate import calibrate
from lowfat.errors import ArgumentError
from lowfat.fisher import inner_tokens
from lowfat.layers import factorizable
from lowfat.methods import METHODS, check_arguments
from lowfat.stats import Calibration, Stats, merged

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps
factorize = METHODS["kfac"].factorize


def spread_gram(size, decades=1.0):
    x = torch.randn(4 * size, size, dtype=torch.float64) * torch.logspace(0, -decades, size, dtype=torch.float64)
    return x.mT @ x


def stats_of(n, k):
    return Stats(spread_gram(k), 4 * k, gram_out=spread_gram(n))


# --- what is gathered ---

def tokens(lengths, pad_left=False):
    """Texts of these lengths, padded, with a label for each token."""
    most = max(lengths)
    ids = torch.randint(1, 97, (len(lengths), most))
    mask = torch.stack([torch.arange(most) < length for length in lengths])
    mask = mask.flip(1) if pad_left else mask
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(mask, ids, -100)}


def gradients_of(model, layer, batch, row):
    """g [T, n] of the sum of one text's terms of the loss, at the layer's outputs, without padding around the text."""
    inside = batch["attention_mask"][row] != 0
    ids = batch["input_ids"][row:row + 1, inside]
    found = []
    handle = layer.register_forward_hook(lambda _, __, y: found.append(y) or y.retain_grad())
    labels = batch["labels"][row:row + 1]
    labels = labels[:, inside] if labels.dim() == 2 else labels
    with torch.enable_grad():
        loss = model(input_ids=ids, labels=labels).loss
        terms = ids.shape[1] - 1 if labels.dim() == 2 else 1
        (loss * terms).backward()
    handle.remove()
    return found[0].grad[0]


def kept(g, leave_out):
    """Of one text: the ends left out, the norms within a tenth and ten times their mean."""
    ends = len(g) // 8 if leave_out else 0
    g = g[ends:len(g) - ends]
    norms = g.norm(dim=1)
    g, norms = g[norms > 0], norms[norms > 0]
    return g * (norms.clamp(norms.mean() / 10, 10 * norms.mean()) / norms)[:, None]


@pytest.mark.parametrize("pad_left", [False, True])
def test_gradients_of_tokens_are_those_of_each_text_alone(pad_left, tiny_llama):
    """Two batches, padded; by hand: each text by itself, its ends cut off and its norms clipped."""
    model = tiny_llama.double()
    batches = [tokens([20, 9, 5]), tokens([17])] if not pad_left else [tokens([20, 20, 20])]
    stats = calibrate(model, batches, fisher="kronecker")
    for name, seen in stats.items():
        layer, exact = model.get_submodule(name), 0
        for batch in batches:
            for row in range(len(batch["input_ids"])):
                g = kept(gradients_of(model, layer, batch, row), leave_out=True)
                exact = exact + g.mT @ g
        assert seen.gram_out.shape == (layer.out_features,) * 2 and seen.gram_out.dtype == torch.float32
        # products and sums in fp32 over at most 51 tokens
        assert (seen.gram_out - exact).abs().max() <= 64 * EPS32 * exact.diagonal().max()


def test_one_label_for_a_text_leaves_no_token_out(tiny_bert):
    """[CLS] is the first token and has all of the gradient there: kills leaving out its end, which would give zeros."""
    model = tiny_bert.double()
    batch = tokens([16, 11]) | {"labels": torch.tensor([2, 0])}
    stats = calibrate(model, [batch], fisher="kronecker")
    for name, seen in stats.items():
        layer = model.get_submodule(name)
        parts = [kept(gradients_of(model, layer, batch, row), leave_out=False) for row in range(2)]
        exact = sum(g.mT @ g for g in parts)
        assert (seen.gram_out - exact).abs().max() <= 64 * EPS32 * exact.diagonal().max() and exact.any()


def test_norms_far_from_the_mean_are_clipped():
    from lowfat.fisher import FisherSums

    sums = FisherSums.of(nn.Linear(3, 4), gram_out=torch.float64)
    g = torch.nn.functional.normalize(torch.randn(1, 40, 4, dtype=torch.float64), dim=2)
    g[0, 3] *= 1000
    g[0, 7] *= 1e-6
    g[0, 9] = 0
    sums.arrived.append((torch.randn(1, 40, 3), g))
    sums.add(torch.ones(1), (1, 40), "layer")
    mean = g[0].norm(dim=1).sum() / 39
    limited = g[0].clone()
    limited[3] *= 10 * mean / 1000
    others = [i for i in range(40) if i not in (3, 9)]  # mean is about 26: all others are below a tenth of it
    limited[others] *= (mean / 10 / limited[others].norm(dim=1))[:, None]
    assert torch.allclose(sums.gram_out, limited.mT @ limited, rtol=1e-12)


@pytest.mark.parametrize("length, ends", [(7, 0), (8, 1), (15, 1), (16, 2)])
def test_an_eighth_of_the_text_is_left_out_at_each_end(length, ends):
    for pad_left in (False, True):
        batch = tokens([length, 30], pad_left)
        inner = inner_tokens(batch)
        inside = (batch["attention_mask"][0] != 0).nonzero()[:, 0]
        assert inner[0].nonzero()[:, 0].tolist() == inside[ends:length - ends].tolist()
    assert inner_tokens(batch | {"labels": torch.zeros(2)}).equal(batch["attention_mask"] != 0)
    assert inner_tokens({"x": torch.ones(5), "labels": torch.ones(5)}) is None


def test_only_where_it_is_asked_for(tiny_bert, tmp_path):
    batch = tokens([16, 11]) | {"labels": torch.tensor([2, 0])}
    assert all(seen.gram_out is None for seen in calibrate(tiny_bert, [batch]).values())
    stats = calibrate(tiny_bert, [batch], fisher="kronecker")
    stored = calibrate(tiny_bert, [batch], fisher="kronecker", out=tmp_path / "stats")
    assert stored.fingerprint() == stats.fingerprint()
    assert all(torch.equal(stored[name].gram_out, seen.gram_out) for name, seen in stats.items())
    needed = 4 * sum(sum(part.numel() for part in seen.tensors().values()) for seen in stats.values())
    with pytest.raises(ArgumentError, match="the statistics need"):  # the n^2 of each layer are counted
        calibrate(tiny_bert, [batch], fisher="kronecker", memory=needed // 2)


# --- what is solved ---

@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (11, 11)])
def test_shrunk_to_the_end_it_is_plain_svd_and_on_one_side_whitened(shape):
    n, k = shape
    weight, stats = torch.randn(shape, dtype=torch.float64), stats_of(n, k)
    plain = METHODS["svd"].factorize(weight, None, None, rank=4)[0].dense()
    both, events = factorize(weight, None, stats, rank=4, shrink_in=1, shrink_out=1)
    assert (both.dense() - plain).norm() <= (n + k) ** 2 * EPS * 1e3 * weight.norm() and events == []
    whitened = METHODS["whitened"].factorize(weight, None, stats, rank=4)[0].dense()
    one, _ = factorize(weight, None, stats, rank=4, shrink_in=0, shrink_out=1)  # the same damping of what is not mixed
    assert (one.dense() - whitened).norm() <= (n + k) ** 2 * EPS * 1e3 * weight.norm()


@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (11, 11)])
def test_it_is_the_svd_between_both_roots(shape):
    """L_g^-T SVD_r(L_g^T W L_x) L_x^-1 with both Cholesky factors, as the paper writes it."""
    (n, k), rank = shape, 4
    weight, stats = torch.randn(shape, dtype=torch.float64), stats_of(n, k)

    def lower(gram, share):
        mean = gram.diagonal().mean()
        return torch.linalg.cholesky((1 - share) * gram + share * mean * torch.eye(len(gram), dtype=gram.dtype))

    left, right = lower(stats.gram_out, 0.3), lower(stats.gram, 0.1)
    u, s, vt = torch.linalg.svd(left.mT @ weight @ right, full_matrices=False)
    middle = u[:, :rank] * s[:rank] @ vt[:rank]
    wanted = torch.linalg.solve(left.mT, middle) @ torch.linalg.inv(right)
    layer, _ = factorize(weight, None, stats, rank=rank)
    assert (layer.dense() - wanted).norm() <= (n + k) ** 2 * EPS * 1e3 * weight.norm()


def test_the_scale_of_inputs_and_gradients_does_not_matter():
    weight, stats = torch.randn(14, 9), stats_of(14, 9)
    scaled = Stats(stats.gram * 2.0**30, 1, gram_out=stats.gram_out * 2.0**-40)
    a, b = (factorize(weight, None, one, rank=3)[0] for one in (stats, scaled))
    assert torch.equal(a.u, b.u) and torch.equal(a.v, b.v)


def test_a_loud_input_and_a_heavy_output_are_reconstructed_better():
    """The orientation test: kills sides taken the wrong way round, on a square weight."""
    weight, gram = torch.randn(12, 12, dtype=torch.float64), torch.eye(12, dtype=torch.float64)
    loud = gram.clone()
    loud[3, 3] = 1e4
    even, inputs, outputs = ((weight - factorize(weight, None, Stats(into, 9, gram_out=out), rank=4, shrink_in=0.001,
                                                 shrink_out=0.001)[0].dense()).abs()
                             for into, out in ((gram, gram), (loud, gram), (gram, loud)))
    assert inputs[:, 3].norm() < even[:, 3].norm() / 10 and outputs[3].norm() < even[3].norm() / 10


@pytest.mark.parametrize("x", matrices.inputs(9))
@pytest.mark.parametrize("n", [12, 5])
def test_degenerate_statistics_never_give_nan(x, n):
    x, weight = matrices.inputs(9)[x], torch.randn(n, 9)
    for stats in (Stats(x.mT @ x, len(x), gram_out=torch.eye(n)), Stats(torch.eye(9), 9, gram_out=torch.zeros(n, n))):
        layer, events = factorize(weight, None, stats, rank=3)
        assert layer.dense().isfinite().all() and METHODS["kfac"].losses(weight, stats).isfinite().all()
        nothing = "no gradient" if not stats.gram_out.any() else "no input energy" if not stats.gram.any() else None
        assert events == ([f"{nothing} in the calibration: all alike"] if nothing else [])


# --- refusals ---

def test_missing_or_foreign_statistics_are_refused(tiny_bert):
    weight = torch.randn(5, 7)
    for stats in (None, Stats(torch.eye(7), 7)):
        with pytest.raises(ArgumentError, match='kfac needs the Gram matrices.*fisher="kronecker"'):
            factorize(weight, None, stats, rank=2)
    with pytest.raises(ArgumentError, match=r"\[7, 7\] of inputs and \[7, 7\] of gradients; the weight is .* \[5, 7\]"):
        factorize(weight, None, Stats(torch.eye(7), 7, gram_out=torch.eye(7)), rank=2)
    for value in (-0.1, 1.5, "much", True, float("nan")):
        with pytest.raises(ArgumentError, match="kfac: shrink_in and shrink_out must be numbers from 0 to 1; found"):
            check_arguments("kfac", {"shrink_in": value})
    # before any layer changes: labels were there, the gradients' products were not
    stats = calibrate(tiny_bert, [tokens([9]) | {"labels": torch.tensor([1])}])
    made = lowfat.plan(tiny_bert, method="svd", ratio=0.5)
    for name, choice in made.items():
        made[name] = lowfat.Choice("kfac", choice.arguments, choice.in_features, choice.out_features)
    with pytest.raises(ArgumentError, match="kfac needs the Gram matrices"):
        lowfat.factorize(tiny_bert, made, stats)
    assert all(type(module) is nn.Linear for module in factorizable(tiny_bert).values())


# --- in a model ---

def test_a_model_is_factorized_within_its_budget_and_comes_back(tiny_llama, tmp_path):
    batches = [tokens([20, 14, 9]) for _ in range(3)]
    stats = calibrate(tiny_llama, batches, fisher="kronecker")
    dense = sum(module.weight.numel() for module in factorizable(tiny_llama).values())
    for policy in ("per_matrix", "allocated"):
        made = lowfat.plan(tiny_llama, method="kfac", ratio=0.5, policy=policy, stats=stats, arguments={"shrink_out": 0.5})
        assert made.totals()["parameters"] <= dense / 2
    report = lowfat.factorize(tiny_llama, made, stats)
    assert report.ratio <= 0.5 and all(layer.events == [] for layer in report.layers)
    lowfat.save(tiny_llama, tmp_path / "kfac")
    loaded = lowfat.load(tmp_path / "kfac")
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, tiny_llama(input_ids=ids).logits)


def test_layers_that_share_a_factor_are_one_problem():
    """The gradients of each layer weigh its own rows: no other pair of u with one v loses less in the sum over layers."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(10, n, dtype=torch.float64)) for n in (12, 7, 9))
    stats = Calibration({name: Stats(spread_gram(10), 40, gram_out=spread_gram(module.out_features) * 10.0**number)
                         for number, (name, module) in enumerate(factorizable(model).items())})
    weights = [layer[0].weight.detach().clone() for layer in model.blocks]
    names = tuple(factorizable(model))
    both = merged(list(stats.values()))
    assert both.gram_out.shape == (28, 28) and not both.gram_out[:12, 12:].any()
    made = lowfat.plan(model, method="kfac", ratio=0.6, stats=stats, share=[list(names)])
    lowfat.factorize(model, made, stats)
    layers = [layer[0] for layer in model.blocks]
    assert all(layer.v is layers[0].v for layer in layers)
    mean = both.gram_out.diagonal().mean()
    inner = 0.9 * both.gram + 0.1 * both.gram.diagonal().mean() * torch.eye(10, dtype=torch.float64)

    def lost(v, us):
        total = 0
        for weight, u, one in zip(weights, us, stats.values()):
            outer = 0.7 * one.gram_out + 0.3 * mean * torch.eye(len(weight), dtype=torch.float64)
            rest = weight - u @ v
            total += ((outer @ rest) * (rest @ inner)).sum()
        return total

    best = lost(layers[0].v, [layer.u for layer in layers])
    for scale in torch.logspace(-3, 0, 50).tolist():
        moved = layers[0].v + scale * torch.randn_like(layers[0].v)
        solved = [torch.linalg.solve(moved @ inner @ moved.mT, moved @ inner @ weight.mT).mT for weight in weights]
        assert lost(moved, solved) >= best
