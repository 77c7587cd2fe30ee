"""Layers that share a dictionary or the v of low rank: one problem of all of them, one parameter, one place in the file."""
import copy
import json

import matrices
import pytest
import torch
from torch import nn

import lowfat
from lowfat import checkpoint
from lowfat.calibrate import calibrate
from lowfat.errors import ArgumentError, DeviceError, DtypeError, FormatError, IndexRangeError, IntegrityError, ShapeError
from lowfat.factorize import factorize
from lowfat.layers import dense_weight, factorizable, replace
from lowfat.methods import METHODS
from lowfat.plan import POLICIES, Choice, Plan, plan
from lowfat.progress import tensors_digest
from lowfat.spectra import spectra
from lowfat.stats import Calibration, Stats, merged
from lowfat.structures import Dictionary
from lowfat.tensor_file import read_tensors
from lowfat.validate import WEIGHTS
from tiny_text import classifier, rows, tokenizer

EPS = torch.finfo(torch.float64).eps
DICTIONARIES = ("cospadi", "compot", "rocket")
SHARING = ("svd", "whitened", *DICTIONARIES)
every_method = pytest.mark.parametrize("method", SHARING)


def linears(*layers):
    """A model of these layers, each in a block of its own: blocks.0.0, blocks.1.0, ..."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(layer) for layer in layers)
    return model.eval()


def linear(n, k, weight=None, bias=True):
    layer = nn.Linear(k, n, bias=bias, dtype=torch.float64)
    if weight is not None:
        layer.weight.data = weight
    return layer


def seen(model, rows=200):
    """Each layer's own inputs, of different covariance and number."""
    found = {}
    for number, (name, module) in enumerate(factorizable(model).items()):
        k = module.in_features
        x = torch.randn(rows + number, k, dtype=torch.float64)
        x = x @ (torch.eye(k) + 0.5 * torch.randn(k, k)).double()
        found[name] = Stats(x.mT @ x, len(x))
    return Calibration(found)


def tokens():
    return torch.arange(20).reshape(2, 10)


def calibrated(model):
    return calibrate(model, [{"input_ids": torch.randint(0, 97, (4, 12))} for _ in range(8)])


def digest(model):
    return tensors_digest(model.state_dict().items())


def output(model):
    with torch.no_grad():
        return model(tokens()).logits


def first_factor(layer):
    return getattr(layer, layer.first)


def choices(model, method, rank, group=True, **arguments):
    names = tuple(factorizable(model))
    return Plan({name: Choice(method, {**arguments, "rank": rank}, module.in_features, module.out_features,
                              group=names if group else ()) for name, module in factorizable(model).items()},
                ratio=0.5, policy="per_matrix")


# --- what is solved ---

@pytest.mark.parametrize("method, arguments", [("whitened", {}), ("svd", {}),
                                               *((name, {"density": 1.0}) for name in DICTIONARIES)])
@torch.no_grad()
def test_all_atoms_kept_is_the_truncated_svd_of_the_joined_problem(method, arguments):
    """W L = U S V^T of the weights one below the other, L L^T the sum of the Gram matrices; What = U_r S_r V_r^T L^-1."""
    k = 12
    model = linears(*(linear(n, k) for n in (10, 14, 9)))
    stats = seen(model)
    weights = [dense_weight(module).clone() for module in factorizable(model).values()]
    gram = sum(one.gram for one in stats.values()) if method != "svd" else torch.eye(k, dtype=torch.float64)
    damping = 1e-6 * gram.diagonal().mean() if method != "svd" else 0
    root = torch.linalg.cholesky(gram + damping * torch.eye(k))
    u, s, vt = torch.linalg.svd(torch.cat(weights) @ root, full_matrices=False)
    for rank in (1, 5, 8):
        made = copy.deepcopy(model)
        report = factorize(made, choices(made, method, rank, **arguments), stats)
        wanted = (u[:, :rank] * s[:rank]) @ torch.linalg.solve_triangular(root, vt[:rank], upper=False, left=False)
        found = torch.cat([layer[0].dense() for layer in made.blocks])
        condition = float(torch.linalg.cond(gram))
        assert (found - wanted).norm() <= (len(wanted) + k)**2 * EPS * condition * torch.cat(weights).norm()
        assert all(first_factor(layer[0]) is first_factor(made.blocks[0][0]) for layer in made.blocks)
        for weight, layer, one, its in zip(weights, made.blocks, report.layers, stats.values()):
            rest = weight - layer[0].dense()
            error = torch.einsum("nk,kj,nj->", rest, its.gram, rest) / torch.einsum("nk,kj,nj->", weight, its.gram, weight)
            assert one.output_error == pytest.approx(float(error.sqrt()), rel=1e-9)  # over the layer's own inputs
            assert one.error == pytest.approx(float(rest.norm() / weight.norm()), rel=1e-9)


@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_a_planted_dictionary_of_several_layers_is_found_again(seed):
    """Each layer has codes of its own over one D; neither the inputs nor the rows of the layers are alike."""
    torch.manual_seed(seed)
    weight, _ = matrices.planted(240, 20, 12, 2, seed)
    model = linears(*(linear(len(part), 20, part.clone()) for part in weight.split([100, 60, 80])))
    stats = seen(model)
    report = factorize(model, choices(model, "cospadi", 12, density=2 / 12), stats)
    assert all(layer.error < 1e-8 and layer.output_error < 1e-8 for layer in report.layers)
    assert all(layer[0].nonzeros == 2 and layer[0].d is model.blocks[0][0].d for layer in model.blocks)


@every_method
def test_a_group_of_one_is_no_group(tiny_bert, method):
    stats = calibrated(tiny_bert)
    due = plan(tiny_bert, method=method, ratio=0.5, policy="allocated", stats=stats)
    alone = [[name] for name in due]
    dense, reports = [copy.deepcopy(tiny_bert) for _ in range(4)], []
    same = {name: Choice(**{**vars(choice), "group": (name,)}) for name, choice in due.items()}
    for share in (1, alone, alone[3:5]):
        assert plan(tiny_bert, method=method, ratio=0.5, policy="allocated", stats=stats, share=share) == due
    for model, made in zip(dense, (due, same)):
        reports.append(factorize(model, made, stats))
    assert digest(dense[0]) == digest(dense[1])
    without = [{**vars(layer), "seconds": 0} for layer in reports[0].layers]
    assert without == [{**vars(layer), "seconds": 0} for layer in reports[1].layers]


def test_statistics_add_up():
    grams = [torch.full((3, 3), value) for value in (1.0, 2.0, 4.0)]
    found = merged([Stats(gram, rows) for gram, rows in zip(grams, (5, 6, 7))])
    assert torch.equal(found.gram, torch.full((3, 3), 7.0)) and found.rows == 18 and torch.equal(grams[0], torch.ones(3, 3))
    alone = Stats(grams[0], 5, fisher_in=torch.ones(3))
    assert merged([alone]) is alone
    with pytest.raises(ArgumentError, match=r"Gram matrices of \[3, 3\] and \[1, 1\] do not add up"):
        merged([alone, Stats(torch.ones(1, 1), 5)])


@every_method
def test_statistics_from_a_folder_give_the_same_bits(tiny_bert, tmp_path, method):
    stats = calibrated(tiny_bert)
    stats.save(tmp_path / "stats")
    models = [tiny_bert, copy.deepcopy(tiny_bert)]
    for model, known in zip(models, (stats, Calibration.load(tmp_path / "stats"))):
        factorize(model, plan(model, method=method, ratio=0.5, policy="knapsack", stats=known, share=2), known)
    assert digest(models[0]) == digest(models[1])


# --- which layers share ---

def test_a_number_takes_neighbours_of_a_kind():
    model = linears(*(linear(n, 12) for n in (8, 8, 9, 8, 8, 8, 8)))
    made = plan(model, method="svd", ratio=0.5, share=3)
    groups = [tuple(f"blocks.{number}.0" for number in group) for group in ((0, 1, 3), (4, 5, 6))]
    assert [made[f"blocks.{number}.0"].group for number in range(7)] == [
        groups[0], groups[0], (), groups[0], groups[1], groups[1], groups[1]]
    made = plan(model, method="svd", ratio=0.5, share=4)  # two are left
    assert made["blocks.6.0"].group == ("blocks.5.0", "blocks.6.0") and len(made["blocks.4.0"].group) == 4


def test_later_numbers_of_a_name_are_part_of_its_kind():
    """An expert shares with that of its number in the next block, not with its neighbour."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(linear(8, 12), linear(8, 12)) for _ in range(2))
    made = plan(model, method="svd", ratio=0.5, share=4)
    for name, choice in made.items():
        assert choice.group == (f"blocks.0.{name[-1]}", f"blocks.1.{name[-1]}")


def test_numbers_before_that_of_the_block_are_part_of_a_kind():
    """As sentence-transformers names them, and models in stages, whose sizes differ from one stage to the next."""
    from lowfat.sharing import grouped

    names = [f"0.auto_model.layer.{block}.up" for block in range(4)]
    assert [list(group) for group in grouped({name: nn.Linear(4, 6) for name in names}, 2, "svd")] == [names[:2], names[2:]]
    stages = {f"layers.{stage}.blocks.{block}.up": nn.Linear(4 << stage, 8) for stage in (0, 1) for block in (0, 1)}
    assert [list(group) for group in grouped(stages, 2, "svd")] == [list(stages)[:2], list(stages)[2:]]
    with pytest.raises(ArgumentError, match="share is 2: no two layers have the same sizes"):
        grouped({"layers.0.up": nn.Linear(4, 6), "layers.1.up": nn.Linear(4, 8)}, 2, "svd")


def test_kinds_are_names_without_the_number_of_the_block(tiny_bert):
    made = plan(tiny_bert, method="svd", ratio=0.5, share=2)
    names = list(factorizable(tiny_bert))
    assert list(made) == names
    for name, choice in made.items():
        assert choice.group == (name.replace("layer.1", "layer.0"), name.replace("layer.0", "layer.1"))
    listed = plan(tiny_bert, method="svd", ratio=0.5, share=[[names[8], names[1]], names[2:4]])  # in the model's order
    assert listed[names[1]].group == listed[names[8]].group == (names[1], names[8])
    assert listed[names[2]].group == (names[2], names[3]) and listed[names[0]].group == ()


@pytest.mark.parametrize("policy", POLICIES)
@every_method
def test_every_policy_keeps_to_the_ratio_and_gives_a_group_one_rank(tiny_llama, method, policy):
    stats = calibrated(tiny_llama)
    for ratio in (0.3, 0.6):
        made = plan(tiny_llama, method=method, ratio=ratio, policy=policy, stats=stats, share=2)
        assert made.totals()["ratio"] <= ratio
        for choice in made.values():
            assert all(made[other].arguments == choice.arguments for other in choice.group)
        assert any(choice.group for choice in made.values())


def test_the_rank_of_low_rank_stays_below_its_smallest_layer():
    """A budget that would let 3 x 6 outputs of 40 inputs have a rank of 9: a layer of 6 outputs has at most 6."""
    model = linears(*(linear(6, 40) for _ in range(3)))
    made = plan(model, method="svd", ratio=0.8, share=3)
    assert {choice.arguments["rank"] for choice in made.values()} == {6}
    stats, other = seen(model), copy.deepcopy(model)
    assert all(layer.kept for layer in factorize(other, made).layers)
    made = plan(model, method="compot", ratio=0.8, stats=stats, share=3)  # a dictionary may have more atoms than rows
    assert made["blocks.0.0"].arguments["rank"] > 6 and all(layer.kept for layer in factorize(model, made, stats).layers)
    assert model.blocks[0][0].atoms == made["blocks.0.0"].arguments["rank"] and model.blocks[0][0].d is model.blocks[2][0].d


# --- what it costs ---

@pytest.mark.parametrize("method, arguments", [
    ("whitened", {}), *((name, {"density": 0.25}) for name in DICTIONARIES),
    ("compot", {"pattern": "2:4", "dense_share": 0.2}), ("cospadi", {"density": 0.05})])
def test_parameters_and_bytes_are_the_formulas(tiny_bert, tmp_path, method, arguments):
    """a k + g n s numbers, and g n ceil(a / 32) words of masks or g n s positions (methods.md 6.3)."""
    names = [f"bert.encoder.layer.{block}.intermediate.dense" for block in (0, 1)]
    stats = calibrated(tiny_bert)
    made = plan(tiny_bert, method=method, ratio=0.5, policy="per_matrix", stats=stats, arguments=arguments, share=2,
                layers=["*.intermediate.dense"])
    assert list(made) == names
    g, k, n, a = 2, 32, 48, made[names[0]].arguments["rank"]
    report = factorize(tiny_bert, made, stats)
    layer = tiny_bert.get_submodule(names[0])
    s = a if method == "whitened" else layer.nonzeros
    parameters = a * k + g * n * s
    masks = 0 if method == "whitened" else g * n * min(4 * -(-a // 32), 2 * s)
    assert parameters == made.totals()["parameters"] == report.parameters == sum(layer.parameters for layer in report.layers)
    assert masks == made.totals()["index_bytes"] == sum(layer.index_bytes for layer in report.layers)
    assert made.totals()["bytes"] == 4 * parameters and made.totals()["ratio"] == report.ratio <= 0.5
    assert [row["parameters"] for row in made.rows()] == [a * k + n * s, n * s]
    assert [row["macs"] for row in made.rows()] == [a * k + n * s] * 2  # each layer multiplies by it
    assert all(tiny_bert.get_submodule(name).macs() == a * k + n * s for name in names)
    assert [layer.shares for layer in report.layers] == ["", names[0]]
    assert [one.parameters for one in spectra(tiny_bert, layers=["*.intermediate.dense"])] == [a * k + n * s, n * s]
    checkpoint.save(tiny_bert, tmp_path / "out")
    stored = {name: tensor for name, tensor in read_tensors(tmp_path / "out" / WEIGHTS).items()
              if name.startswith(tuple(names)) and not name.endswith(".bias")}
    assert sum(tensor.nbytes for tensor in stored.values()) == 4 * parameters + masks
    by_itself = plan(copy_of_dense(tiny_bert, names), method=method, ratio=0.5, policy="per_matrix", stats=stats,
                     arguments=arguments, layers=["*.intermediate.dense"])
    assert by_itself[names[0]].arguments["rank"] < a  # what the shared factor saves goes into atoms


def copy_of_dense(model, names):
    model = copy.deepcopy(model)
    for name in names:
        replace(model, name, nn.Linear(32, 48))
    return model


# --- a model of shared layers ---

@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
@every_method
def test_a_model_goes_through_a_file_and_keeps_its_ties(request, tmp_path, fixture, method):
    model = request.getfixturevalue(fixture)
    names = list(factorizable(model))
    stats = calibrated(model)
    report = factorize(model, plan(model, method=method, ratio=0.5, stats=stats, share=2), stats)
    assert [layer.name for layer in report.layers] == names and all(layer.kept for layer in report.layers)
    parameters = sum(first.numel() for first in {first_factor(model.get_submodule(name)) for name in names})
    assert report.parameters - parameters == sum(
        parameter.numel() for name in names for key, parameter in model.get_submodule(name).named_parameters()
        if key not in ("bias", model.get_submodule(name).first))
    checkpoint.save(model, tmp_path / "one")
    loaded = [checkpoint.load(tmp_path / "one"), type(model).from_pretrained(tmp_path / "one")]
    for other in (*loaded, copy.deepcopy(model)):
        assert torch.equal(output(other), output(model)) and are_tied(other, model)
    loaded[0].save_pretrained(tmp_path / "two")
    one, two = (read_tensors(tmp_path / folder / WEIGHTS) for folder in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert are_tied(checkpoint.load(tmp_path / "one", dtype=torch.bfloat16), model)
    checkpoint.export_dense(model, tmp_path / "dense")
    torch.testing.assert_close(output(type(model).from_pretrained(tmp_path / "dense")), output(model))
    assert are_tied(model.to(torch.bfloat16), loaded[0]) and model.dtype == torch.bfloat16


def are_tied(model, other):
    """Whether the same layers share in both models, in pairs."""
    firsts = [[id(first_factor(layer)) for _, layer in lowfat.structures.structures(one)] for one in (model, other)]
    pattern = [[ids.index(found) for found in ids] for ids in firsts]
    return pattern[0] == pattern[1] and len(set(firsts[0])) == len(firsts[0]) / 2


@every_method
def test_gradients_of_a_shared_factor_add_up_and_an_optimizer_sees_it_once(tiny_bert, method):
    stats = calibrated(tiny_bert)
    factorize(tiny_bert, plan(tiny_bert, method=method, ratio=0.5, stats=stats, share=2), stats)
    apart = copy.deepcopy(tiny_bert)
    for _, layer in lowfat.structures.structures(apart):
        setattr(layer, layer.first, nn.Parameter(first_factor(layer).detach().clone()))
    for model in (tiny_bert, apart):
        model(tokens()).logits.square().sum().backward()
    layers, others = (dict(lowfat.structures.structures(model)) for model in (tiny_bert, apart))
    for name, layer in layers.items():
        pair = [first_factor(others[name.replace(f"layer.{1 - block}", f"layer.{block}")]).grad for block in (0, 1)]
        torch.testing.assert_close(first_factor(layer).grad, pair[0] + pair[1])
    optimizer = torch.optim.SGD(tiny_bert.parameters(), lr=0.1)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(list(apart.parameters())) - 6


@pytest.mark.parametrize("method", ["whitened", "compot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_the_ties(tmp_path, method, dtype):
    model = classifier().to(dtype)
    stats = calibrate(model, [{"input_ids": torch.randint(0, 32, (4, 12))} for _ in range(4)])
    factorize(model, plan(model, method=method, ratio=0.5, stats=stats, share=2), stats)
    before = digest(model)
    lowfat.finetune(model, rows(8), tokenizer=tokenizer(), steps=3, batch_size=4, max_length=12, learning_rate=1e-2,
                    out=tmp_path / "out", save_every=1)
    assert digest(model) != before and are_tied(model, model) and model.dtype == dtype
    loaded = checkpoint.load(tmp_path / "out")
    assert are_tied(loaded, model) and digest(loaded) == digest(model)


@pytest.mark.parametrize("method", ["svd", "compot"])
def test_projections_of_one_input_can_share(tiny_llama, method):
    """q, k and v of a block, which run as one call: what their layers give one by one."""
    names = [f"model.layers.{block}.self_attn.{part}_proj" for block in (0, 1) for part in "qkv"]
    stats = calibrated(tiny_llama)
    factorize(tiny_llama, plan(tiny_llama, method=method, ratio=0.6, stats=stats, share=[names[:3], names[3:]]), stats)
    together = output(tiny_llama)
    tiny_llama(tokens()).logits.sum().backward()
    shared = first_factor(tiny_llama.get_submodule(names[0]))
    found, shared.grad = shared.grad, None
    assert shared is first_factor(tiny_llama.get_submodule(names[2]))
    lowfat.ungroup_blocks(tiny_llama)
    torch.testing.assert_close(output(tiny_llama), together)
    tiny_llama(tokens()).logits.sum().backward()
    torch.testing.assert_close(found, shared.grad)


def test_a_shared_factor_learns_where_one_of_its_layers_did(tiny_bert):
    frozen = [f"bert.encoder.layer.{block}.output.dense" for block in (0, 1)] + ["bert.encoder.layer.1.intermediate.dense"]
    for name in frozen:
        tiny_bert.get_submodule(name).weight.requires_grad_(False)
    factorize(tiny_bert, plan(tiny_bert, method="svd", ratio=0.5, share=2))
    first, second = (tiny_bert.get_submodule(f"bert.encoder.layer.{block}.intermediate.dense") for block in (0, 1))
    assert first.v is second.v and first.v.requires_grad and first.u.requires_grad and not second.u.requires_grad
    assert not any(tiny_bert.get_submodule(name).v.requires_grad for name in frozen[:2])


def test_a_layer_that_gains_nothing_stays_dense_and_the_others_share():
    """The weight of the second layer is lost among the large ones of the others."""
    torch.manual_seed(1)
    model = linears(*(linear(8, 12) for _ in range(3)))
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    model.blocks[0][0].weight.data = 1e3 * torch.randn(8, 3, dtype=torch.float64) @ basis[:3]
    model.blocks[1][0].weight.data = torch.randn(8, 4, dtype=torch.float64) @ basis[3:7]
    model.blocks[2][0].weight.data = 1e3 * torch.randn(8, 3, dtype=torch.float64) @ basis[:3]
    report = factorize(model, choices(model, "svd", 3))
    assert [layer.kept for layer in report.layers] == [True, False, True] and type(model.blocks[1][0]) is nn.Linear
    assert "no better than a weight of zeros" in report.layers[1].reason
    assert model.blocks[0][0].v is model.blocks[2][0].v and report.layers[2].shares == "blocks.0.0"
    assert report.parameters == 3 * 12 + 2 * 8 * 3 + 8 * 12


# --- on the way ---

@pytest.mark.parametrize("method", ["svd", "compot"])
def test_stored_layers_give_the_same_bits_and_ties(tmp_path, tiny_bert, monkeypatch, method):
    stats = calibrated(tiny_bert)
    made = plan(tiny_bert, method=method, ratio=0.5, stats=stats, share=2)
    plain, half, again = (copy.deepcopy(tiny_bert) for _ in range(3))
    factorize(plain, made, stats)
    steps = []
    report = factorize(tiny_bert, made, stats, resume=tmp_path / "layers", on_progress=lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(number, 12) for number in range(1, 13)]
    assert {step[2] for step in steps} == set(made)
    (tmp_path / "layers" / "layer-00007.json").unlink()  # the second of a group: both are made again
    assert factorize(half, made, stats, resume=tmp_path / "layers").ratio == report.ratio
    monkeypatch.setitem(METHODS, method, METHODS[method]._replace(factorize=None))
    resumed = factorize(again, made, stats, resume=tmp_path / "layers")
    assert [layer.shares for layer in resumed.layers] == [layer.shares for layer in report.layers]
    for model in (tiny_bert, half, again):
        assert digest(model) == digest(plain) and are_tied(model, plain)


def test_a_damaged_layer_of_a_group_is_refused(tmp_path, tiny_bert):
    made = plan(tiny_bert, method="svd", ratio=0.5, share=2)
    factorize(copy.deepcopy(tiny_bert), made, resume=tmp_path / "layers")
    path = tmp_path / "layers" / "layer-00009.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(IntegrityError, match="layer-00009"):
        factorize(tiny_bert, made, resume=tmp_path / "layers")


def test_a_plan_file_keeps_groups_and_older_files_load(tiny_bert, tmp_path):
    made = plan(tiny_bert, method="svd", ratio=0.5, share=[list(factorizable(tiny_bert))[:3]])
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == made and again.totals() == made.totals()
    assert digest(done(tiny_bert, made)) == digest(done(tiny_bert, again))
    older = json.loads((tmp_path / "plan.json").read_text())
    assert sum("group" in entry for entry in older["layers"].values()) == 3  # nothing new is said of layers alone
    for entry in older["layers"].values():
        entry.pop("group", None)
    (tmp_path / "plan.json").write_text(json.dumps(older))
    assert not any(choice.group for choice in Plan.load(tmp_path / "plan.json").values())


def done(model, made):
    model = copy.deepcopy(model)
    factorize(model, made)
    return model


# --- what is refused ---

QUERY, KEY, DEEP, OUT = (f"bert.encoder.layer.{part}" for part in (
    "0.attention.self.query", "0.attention.self.key", "1.attention.self.query", "0.output.dense"))
ASKED = {  # share= -> (class, message)
    "0": (0, ArgumentError, "share must be how many layers .* found 0"), "negative": (-2, ArgumentError, "found -2"),
    "True": (True, ArgumentError, "found True"), "2.0": (2.0, ArgumentError, "found 2.0"),
    "a name": (QUERY, ArgumentError, f"found '{QUERY}'"), "names": ([QUERY, KEY], ArgumentError, "lists of their names"),
    "an empty group": ([[]], ArgumentError, r"found \[\[\]\]"), "numbers": ([[1, 2]], ArgumentError, r"found \[\[1, 2\]\]"),
    "unknown": ([[QUERY, "nowhere"]], ArgumentError, "nowhere is not among the layers"),
    "not linear": ([[QUERY, "bert.embeddings"]], ArgumentError, "bert.embeddings is not among"),
    "two groups": ([[QUERY, KEY], [DEEP, KEY]], ArgumentError, f"{KEY} is there twice"),
    "twice": ([[QUERY, QUERY]], ArgumentError, f"{QUERY} is there twice"),
    "other inputs": ([[QUERY, OUT]], ShapeError, f"{QUERY} has 32 inputs and {OUT} 48"),
}


@pytest.mark.parametrize("case", ASKED)
def test_groups_that_cannot_be_are_refused(tiny_bert, case):
    share, error, message = ASKED[case]
    with pytest.raises(error, match=message):
        plan(tiny_bert, method="svd", ratio=0.5, share=share)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].shared_size is None])
def test_methods_without_a_factor_to_share_refuse_by_name(tiny_bert, method):
    message = f"share: layers cannot share a factor by {method}; they can by svd, whitened, kfac, rocket, compot, cospadi"
    stats = calibrate(tiny_bert, [{"input_ids": tokens(), "labels": torch.tensor([0, 1])}])
    with pytest.raises(ArgumentError, match=message):
        plan(tiny_bert, method=method, ratio=0.5, share=2, stats=stats)
    made = plan(tiny_bert, method="svd", ratio=0.5, share=2)
    arguments = {"rank": 1}
    for name, choice in made.items():
        made[name] = Choice(method, arguments, choice.in_features, choice.out_features, group=choice.group)
    before = digest(tiny_bert)
    with pytest.raises(ArgumentError, match=message):
        factorize(tiny_bert, made, stats)
    assert digest(tiny_bert) == before
    assert not any(choice.group for choice in plan(tiny_bert, method=method, ratio=0.6, share=1, stats=stats).values())


def changed(name, **change):
    return lambda made: made.update({name: Choice(**vars(made[name]) | change)})


PAIR = (QUERY, DEEP)
BAD = {  # what is done to a plan in which queries share -> (class, message)
    "missing": (lambda made: made.pop(DEEP), ArgumentError, f"{QUERY} shares .* with {DEEP}, which is not in the plan"),
    "dense": (changed(DEEP, method=None, arguments={}), ArgumentError, f"{QUERY} shares .* {DEEP}, and {DEEP} stays dense"),
    "first dense": (changed(QUERY, method=None, arguments={}), ArgumentError, f"{QUERY} shares .*, and {QUERY} stays dense"),
    "alone": (changed(DEEP, group=()), ArgumentError, f"{QUERY} shares .* with {DEEP}, which is in another group: none"),
    "two groups": (changed(KEY, group=(KEY, QUERY)), ArgumentError,
                   f"{KEY} shares a factor with {QUERY}, which is in another group: {QUERY}, {DEEP}"),
    "rank": (changed(DEEP, arguments={"rank": 3}), ArgumentError, f"{QUERY} shares .* {DEEP}.*'rank': 3"),
    "method": (changed(DEEP, method="whitened"), ArgumentError, f"{QUERY} shares .* {DEEP}, and has svd .* whitened"),
    "not itself": (changed(QUERY, group=(KEY, DEEP)), ArgumentError, f"{QUERY}: its group must name it and others once"),
    "twice": (changed(QUERY, group=(QUERY, QUERY)), ArgumentError, f"{QUERY}: its group must name"),
    "inputs": (changed(OUT, group=(QUERY, OUT)), ShapeError, f"{OUT}"),
}


@pytest.mark.parametrize("case", BAD)
def test_plans_whose_groups_do_not_fit_are_refused(tiny_bert, tmp_path, case):
    change, error, message = BAD[case]
    made = plan(tiny_bert, method="svd", ratio=0.5, share=[list(PAIR)])
    change(made)
    if case == "inputs":  # the only thing wrong
        made[QUERY] = Choice(**vars(made[QUERY]) | {"group": (QUERY, OUT)})
        made[DEEP] = Choice(**vars(made[DEEP]) | {"group": ()})
        message = f"{QUERY} shares a factor with {OUT}, and has 32 inputs where that has 48"
    before = digest(tiny_bert)
    with pytest.raises(error, match=f"plan: {message}"):
        factorize(tiny_bert, made)
    assert digest(tiny_bert) == before and not hasattr(tiny_bert.config, "quantization_config")
    made.save(tmp_path / "plan.json")
    with pytest.raises(FormatError, match=f"plan.json: {message}"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("group, says", [(3, "'group' cannot be 3"), ([3], "group must be names of layers"),
                                         (None, "'group' cannot be None")])
def test_a_wrong_group_in_a_file_is_named(tiny_bert, tmp_path, group, says):
    plan(tiny_bert, method="svd", ratio=0.5, share=2).save(tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    value["layers"][QUERY]["group"] = group
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(FormatError, match=says):
        Plan.load(tmp_path / "plan.json")


def test_a_rank_beyond_a_layer_of_the_group_is_refused(tiny_llama, tmp_path):
    """k_proj has 16 outputs: its group's rank ends there, whatever that of q_proj's."""
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qk"]
    made = plan(tiny_llama, method="svd", ratio=0.5, share=[names])
    for name in names:
        made[name] = Choice(**vars(made[name]) | {"arguments": {"rank": 17}})
    with pytest.raises(ShapeError, match=f"{names[0]}, {names[1]} has the rank 17; needs a whole number from 1 to 16"):
        factorize(tiny_llama, made)
    made.save(tmp_path / "plan.json")
    with pytest.raises(FormatError, match="rank must be a whole number between 1 and 16; found 17"):
        Plan.load(tmp_path / "plan.json")


def test_layers_of_other_dtype_or_device_are_refused(tiny_bert):
    made = plan(tiny_bert, method="svd", ratio=0.5, share=2)
    tiny_bert.get_submodule(DEEP).to(torch.bfloat16)
    with pytest.raises(DtypeError, match=f"{QUERY} has torch.float32 and {DEEP} torch.bfloat16"):
        factorize(tiny_bert, made)
    assert plan(tiny_bert, method="svd", ratio=0.5, share=2)[DEEP].group == ()  # no layer of its kind is left
    tiny_bert.get_submodule(DEEP).to(torch.float32).to("meta")
    with pytest.raises(DeviceError, match=f"{QUERY} is on cpu and {DEEP} on meta"):
        plan(tiny_bert, method="svd", ratio=0.5, share=2)


def test_statistics_of_every_layer_of_a_group_are_needed(tiny_bert):
    stats = calibrated(tiny_bert)
    made = plan(tiny_bert, method="compot", ratio=0.5, stats=stats, share=2)
    less = Calibration({name: stats[name] for name in stats if name != DEEP})
    with pytest.raises(ArgumentError, match=f"stats: nothing for {DEEP}"):
        plan(tiny_bert, method="compot", ratio=0.5, stats=less, share=2)
    with pytest.raises(ArgumentError, match=f"stats: {DEEP} is missing"):
        factorize(tiny_bert, made, less)


def test_an_error_of_a_method_names_all_layers(monkeypatch, tiny_bert):
    def broken(weight, bias, stats, *, rank):
        raise ArgumentError("no solver converged")

    monkeypatch.setitem(METHODS, "svd", METHODS["svd"]._replace(factorize=broken))
    with pytest.raises(ArgumentError, match=f"{QUERY}, {DEEP}: no solver converged"):
        factorize(tiny_bert, plan(tiny_bert, method="svd", ratio=0.5, share=2))


@pytest.mark.parametrize("density", [0.5, 0.05])
def test_bad_indices_of_a_shared_layer_are_refused_at_load(tiny_bert, tmp_path, density):
    """T-index, of a bitmap and of positions: the layer is named that has them, be it the first of its group or another."""
    stats = calibrated(tiny_bert)
    made = plan(tiny_bert, method="compot", ratio=0.6, stats=stats, arguments={"density": density}, share=2)
    factorize(tiny_bert, made, stats)
    for name in (QUERY, DEEP):
        bad = copy.deepcopy(tiny_bert)
        layer = bad.get_submodule(name)
        assert type(layer) is Dictionary and layer.format == ("bitmap" if density == 0.5 else "positions")
        layer.support.view(-1)[0] = torch.iinfo(layer.support.dtype).min
        checkpoint.save(bad, tmp_path / name)
        for load in (checkpoint.load, type(bad).from_pretrained):
            with pytest.raises(IndexRangeError, match=name.replace(".", r"\.")):
                load(tmp_path / name)
