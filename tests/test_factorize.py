"""Replacing layers: the report says what the model holds, and what cannot work is refused before anything changes."""
import json
import math

import pytest
import torch
from torch import nn

import lowfat
from lowfat.errors import ArgumentError, IntegrityError, NumericsError, ShapeError
from lowfat.factorize import factorize, residuals
from lowfat.layers import dense_weight, factorizable
from lowfat.methods import METHODS
from lowfat.plan import Choice, Plan, plan
from lowfat.progress import tensors_digest
from lowfat.structures import LowRank


def digest(model):
    return tensors_digest(model.state_dict().items())


def tokens():
    return torch.arange(20).reshape(2, 10)


def stats_of(model):
    return lowfat.calibrate(model, [{"input_ids": torch.randint(0, 97, (4, 12))} for _ in range(8)])


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_with_what_the_report_describes(request, fixture, dtype):
    model = request.getfixturevalue(fixture).to(dtype)
    weights = {name: dense_weight(module).clone() for name, module in factorizable(model).items()}
    made = plan(model, method="svd", ratio=0.5)
    report = factorize(model, made)
    assert [layer.name for layer in report.layers] == list(weights)
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        assert layer.kept and isinstance(module, LowRank) and module.v.dtype == dtype
        assert layer.shape == module.shape() and layer.rank == made[layer.name].arguments["rank"]
        assert layer.parameters == module.v.numel() + module.u.numel()
        weight = weights[layer.name].double()
        error = (weight - module.u.double() @ module.v.double()).norm() / weight.norm()
        assert abs(layer.error - error) <= 2**-24 * (layer.rank + 2)  # fp32 sums of `rank` products against fp64
        assert module.training == model.training
    assert report.parameters == sum(layer.parameters for layer in report.layers)
    assert report.dense_parameters == sum(weight.numel() for weight in weights.values())
    assert report.ratio <= 0.5
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["ratio"] == report.ratio
    assert torch.isfinite(model(tokens()).logits).all()


def test_full_rank_keeps_the_function(tiny_llama):
    before = tiny_llama(tokens()).logits
    choices = {name: Choice("svd", {"rank": min(module.weight.shape)}, module.in_features, module.out_features)
               for name, module in factorizable(tiny_llama).items()}
    report = factorize(tiny_llama, Plan(choices, ratio=0.5, policy="per_matrix"))
    assert max(layer.error for layer in report.layers) < 2**-20  # a handful of fp32 roundings
    after = tiny_llama(tokens()).logits
    assert (after - before).norm() / before.norm() < 2**-20 * len(report.layers)


def test_output_error_is_measured_on_the_calibration_inputs(tiny_llama):
    stats = stats_of(tiny_llama)
    weights = {name: dense_weight(module).double() for name, module in factorizable(tiny_llama).items()}
    report = factorize(tiny_llama, plan(tiny_llama, method="whitened", ratio=0.5, stats=stats), stats)
    for layer in report.layers:
        module, gram = tiny_llama.get_submodule(layer.name), stats[layer.name].gram.double()
        parts = [torch.einsum("nk,kj,nj->", d, gram, d).sqrt() for d in
                 (weights[layer.name] - module.u.double() @ module.v.double(), weights[layer.name])]
        # cancellation: the difference is exact to roundoff of the whole, so the bound is absolute in units of the outputs
        assert abs(layer.output_error - parts[0] / parts[1]) < 2**-24 * gram.shape[0]


def test_residuals_of_degenerate_weights():
    zero = LowRank.of(torch.zeros(1, 4), torch.zeros(3, 1))
    assert residuals(torch.zeros(3, 4), zero, torch.eye(4)) == (0.0, 0.0)
    assert residuals(torch.ones(3, 4), zero, None) == (1.0, None)
    wrong = LowRank.of(torch.ones(1, 4), torch.ones(3, 1))
    assert residuals(torch.zeros(3, 4), wrong, None) == (math.inf, None)
    assert math.isnan(residuals(torch.ones(3, 4), LowRank.of(torch.full((1, 4), math.nan), torch.ones(3, 1)), None)[0])


@pytest.mark.parametrize("factor, reason", [(0.0, "no better than a weight of zeros: relative error 1"),
                                            (-1.0, "relative error 2"), (math.nan, "not finite"), (math.inf, "not finite")])
def test_useless_factors_leave_the_layer_dense(monkeypatch, tiny_bert, factor, reason):
    before, made = digest(tiny_bert), plan(tiny_bert, method="svd", ratio=0.5)
    right = METHODS["svd"]

    def broken(weight, bias, stats, *, rank):
        return LowRank.of(torch.eye(rank, weight.shape[1]), factor * weight[:, :rank], bias), ["tried"]

    monkeypatch.setitem(METHODS, "svd", right._replace(factorize=broken))
    if factor == -1.0:  # full rank, the weight with its sign turned
        made = {name: Choice("svd", {"rank": min(c.in_features, c.out_features)}, c.in_features, c.out_features)
                for name, c in made.items() if c.in_features <= c.out_features}
    report = factorize(tiny_bert, made)
    assert digest(tiny_bert) == before
    for layer in report.layers:
        assert not layer.kept and layer.structure is None and reason in layer.reason and layer.events == ["tried"]
        assert layer.parameters == layer.dense_parameters
    assert report.ratio == 1


def test_a_choice_to_stay_dense_keeps_its_reason(tiny_bert):
    made = plan(tiny_bert, method="svd", ratio=0.5)
    name, other = list(made)[:2]
    made[name] = Choice(None, {}, 32, 32, "asked for")
    report = factorize(tiny_bert, made)
    assert report.layers[0].reason == "asked for" and isinstance(tiny_bert.get_submodule(name), nn.Linear)
    assert isinstance(tiny_bert.get_submodule(other), LowRank)


def test_a_zero_layer_is_exact(tiny_bert):
    name = next(iter(factorizable(tiny_bert)))
    with torch.no_grad():
        tiny_bert.get_submodule(name).weight.zero_()
    report = factorize(tiny_bert, plan(tiny_bert, method="svd", ratio=0.5))
    assert report.layers[0].kept and report.layers[0].error == 0


def test_a_shared_module_is_factorized_once(tiny_bert):
    first, second = (f"bert.encoder.layer.{index}.intermediate.dense" for index in (0, 1))
    tiny_bert.bert.encoder.layer[1].intermediate.dense = tiny_bert.get_submodule(first)
    report = factorize(tiny_bert, plan(tiny_bert, method="svd", ratio=0.5))
    assert tiny_bert.get_submodule(first) is tiny_bert.get_submodule(second)
    names = [layer.name for layer in report.layers]
    assert names.count(first) == 1 and second not in names


def test_frozen_weights_give_frozen_factors(tiny_bert):
    frozen, free = list(factorizable(tiny_bert))[:2]
    tiny_bert.get_submodule(frozen).requires_grad_(False)
    factorize(tiny_bert, plan(tiny_bert, method="svd", ratio=0.5))
    assert not any(p.requires_grad for p in tiny_bert.get_submodule(frozen).parameters())
    assert all(p.requires_grad for p in tiny_bert.get_submodule(free).parameters())


LAST = "bert.encoder.layer.1.output.dense"


def first_choice(*values):
    """A change of the plan's first choice, whose layer is 32 to 32."""
    return lambda made, model: made.update({next(iter(made)): Choice(*values)})


def last_weight(value):
    return lambda made, model: model.get_submodule(LAST).weight.data[3, 5].fill_(value)


BAD = {  # what is done to plan and model -> (class, message)
    "no layers": (lambda made, model: made.clear(), ArgumentError, "plan: no layers"),
    "unknown name": (lambda made, model: made.update(nowhere=made.popitem()[1]), ArgumentError, "nowhere is not in"),
    "not linear": (lambda made, model: made.update({"bert.embeddings": made.popitem()[1]}), ArgumentError, "BertEmbedd"),
    "sizes": (first_choice("svd", {"rank": 2}, 99, 32), ShapeError, "99 inputs"),
    "method": (first_choice("magic", {"rank": 2}, 32, 32), ArgumentError, "magic"),
    "argument": (first_choice("svd", {"rank": 2, "x": 1}, 32, 32), ArgumentError, "'x'"),
    "rank": (first_choice("svd", {"rank": 33}, 32, 32), ShapeError, "rank 33"),
    "no rank": (first_choice("svd", {}, 32, 32), ShapeError, "rank None"),
    "no stats": (first_choice("whitened", {"rank": 2}, 32, 32), ArgumentError, "stats"),
    "NaN": (last_weight(math.nan), NumericsError, LAST),
    "infinity": (last_weight(-math.inf), NumericsError, LAST),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_changes(tiny_bert, case):
    change, error, message = BAD[case]
    made = plan(tiny_bert, method="svd", ratio=0.5)
    change(made, tiny_bert)
    before = digest(tiny_bert)
    with pytest.raises(error, match=message):
        factorize(tiny_bert, made)
    assert digest(tiny_bert) == before and not hasattr(tiny_bert.config, "quantization_config")


def test_fisher_without_labels_is_refused(tiny_bert):
    stats = stats_of(tiny_bert)
    made = {name: Choice("fwsvd", choice.arguments, choice.in_features, choice.out_features)
            for name, choice in plan(tiny_bert, method="svd", ratio=0.5).items()}
    before = digest(tiny_bert)
    with pytest.raises(ArgumentError, match="no Fisher information"):
        factorize(tiny_bert, made, stats)
    assert digest(tiny_bert) == before


def test_an_error_of_a_method_names_the_layer(monkeypatch, tiny_bert):
    def broken(weight, bias, stats, *, rank):
        raise NumericsError("no solver converged")

    monkeypatch.setitem(METHODS, "svd", METHODS["svd"]._replace(factorize=broken))
    made = plan(tiny_bert, method="svd", ratio=0.5)
    with pytest.raises(NumericsError, match=f"{next(iter(made))}: no solver converged"):
        factorize(tiny_bert, made)


def factorized(model, folder=None, method="svd", ratio=0.5):
    stats = stats_of(model) if method == "whitened" else None
    steps = []
    report = factorize(model, plan(model, method=method, ratio=ratio, stats=stats), stats, resume=folder,
                       on_progress=lambda *step: steps.append(step))
    return report, steps


@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_stored_layers_give_the_same_bits(tmp_path, tiny_bert, monkeypatch, method):
    import copy
    plain, again = copy.deepcopy(tiny_bert), copy.deepcopy(tiny_bert)
    torch.manual_seed(1)
    factorized(plain, method=method)
    torch.manual_seed(1)
    report, steps = factorized(tiny_bert, tmp_path / "layers", method)
    assert digest(tiny_bert) == digest(plain)
    assert steps == [(index, 12, layer.name) for index, layer in enumerate(report.layers, 1)]
    monkeypatch.setitem(METHODS, method, METHODS[method]._replace(factorize=None))  # nothing is computed again
    torch.manual_seed(1)
    resumed, _ = factorized(again, tmp_path / "layers", method)
    assert digest(again) == digest(plain) and resumed == report
    assert all(p.is_contiguous() and p.data_ptr() % 64 == 0 for layer in report.layers
               for p in again.get_submodule(layer.name).parameters())  # own memory, not a view of the removed file


def test_layers_of_another_job_are_refused(tmp_path, tiny_bert):
    import copy
    other = copy.deepcopy(tiny_bert)
    factorized(copy.deepcopy(tiny_bert), tmp_path / "layers")
    with pytest.raises(ArgumentError, match=r"arguments.rank was \d+, is now \d+.*more\)"):
        factorized(copy.deepcopy(tiny_bert), tmp_path / "layers", ratio=0.25)
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.bias[0] += 1
    with pytest.raises(ArgumentError, match="weights was"):
        factorized(other, tmp_path / "layers")


def test_a_damaged_layer_is_refused(tmp_path, tiny_bert):
    import copy
    factorized(copy.deepcopy(tiny_bert), tmp_path / "layers")
    path = tmp_path / "layers" / "layer-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="layer-00003"):
        factorized(tiny_bert, tmp_path / "layers")


def test_a_model_that_only_looks_like_hugging_faces_is_factorized(tmp_path):
    model = torch.nn.Module()
    model.config, model.blocks = {"hidden": 32}, torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(32, 32))])
    report = factorize(model, plan(model, method="svd", ratio=0.5))
    assert report.layers[0].kept and type(model.blocks[0][0]).__name__ == "LowRank"


def test_what_was_left_alone_is_reported(tiny_bert):
    choices = plan(tiny_bert, method="svd", ratio=0.5, layers=["*.query"])
    report = factorize(tiny_bert, choices)
    assert report.skipped["classifier"] == "outside the blocks"
    assert report.skipped["bert.encoder.layer.0.attention.self.key"] == "not in the plan"
    assert not set(report.skipped) & set(choices) and report.to_json()["skipped"] == report.skipped
