"""Blocks that run their projections of one input as one call: the same numbers, names and parameters as before."""
import copy

import pytest
import torch
from torch import nn

import lowfat
from lowfat import blocks

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=40)
IDS = torch.arange(18).view(2, 9) * 5 % 97


def built(family, **sizes):
    import transformers

    head = "ForCausalLM" if family not in ("Bert", "Roberta", "Electra", "DistilBert") else "ForSequenceClassification"
    if family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"):
        sizes = {"num_key_value_heads": 2, "head_dim": 8} | sizes
    config = getattr(transformers, f"{family}Config")(**SIZES | sizes)
    torch.manual_seed(0)
    return getattr(transformers, family + head)(config).eval()


def factorized(family, **sizes):
    """(the model, what became of its blocks)"""
    model = built(family, **sizes)
    return model, lowfat.factorize(model, lowfat.plan(model, method="svd", ratio=0.5)).blocks


@pytest.fixture
def counted(monkeypatch):
    """How often each of the ops was called by a block."""
    calls = {"low_rank": 0, "low_rank_group": 0, "low_rank_swiglu": 0}
    for name in calls:
        def count(*args, op=getattr(blocks, name), name=name, **options):
            calls[name] += 1
            return op(*args, **options)
        monkeypatch.setattr(blocks, name, count)
    return calls


@pytest.mark.parametrize("family, expected", [*((one, {"low_rank": 0, "low_rank_group": 2, "low_rank_swiglu": 2})
                                                for one in ("Llama", "Mistral", "Qwen2", "Qwen3")),
                                              *((one, {"low_rank": 6, "low_rank_group": 2, "low_rank_swiglu": 0})
                                                for one in ("Bert", "Roberta", "Electra"))])
def test_the_same_outputs_by_fewer_calls(family, expected, counted):
    """Of two layers: kills a block that is listed and computes as before, and one that changes a bit."""
    model, found = factorized(family)
    assert len(found.grouped) == sum(expected.values()) and not found.others
    grouped = model(IDS).logits
    assert counted == expected
    names = list(model.state_dict())
    lowfat.ungroup_blocks(model)
    assert torch.equal(model(IDS).logits, grouped) and list(model.state_dict()) == names
    assert counted == expected


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_the_same_outputs_under_autocast(family):
    """BERT's residual is kept in fp32 there: kills a sum that is rounded with the product."""
    model, _ = factorized(family)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(IDS).logits)
        lowfat.ungroup_blocks(model)
    assert torch.equal(*found)


def test_dropout_stays_between_a_product_and_its_residual(counted):
    model, _ = factorized("Bert", hidden_dropout_prob=0.3)
    torch.manual_seed(1)
    dropped = model.train()(IDS).logits
    assert counted["low_rank"] == 2  # the activations
    lowfat.ungroup_blocks(model)
    torch.manual_seed(1)
    assert torch.equal(model(IDS).logits, dropped)


def test_the_same_gradients():
    model, _ = factorized("Llama")
    found = []
    for _ in range(2):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        lowfat.ungroup_blocks(model)
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_generation_with_a_cache_and_recorded_attention(counted):
    model, _ = factorized("Mistral")
    model.set_attn_implementation("eager")
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, max_new_tokens=5, do_sample=False)
    assert counted["low_rank_group"] == 2 * 5
    weights = model(IDS, output_attentions=True).attentions
    lowfat.ungroup_blocks(model)
    again = model.generate(IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, again)
    for found, expected in zip(weights, model(IDS, output_attentions=True).attentions, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_a_graph_without_breaks(family):
    model, _ = factorized(family)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_a_loaded_model_is_grouped_and_saves_the_same_files(family, tmp_path):
    model, _ = factorized(family)
    lowfat.save(model, tmp_path / "one")
    loaded = lowfat.load(tmp_path / "one")
    grouped = [name for name, module in loaded.named_modules() if type(module).__name__.startswith("Grouped")]
    assert grouped == list(lowfat.group_blocks(model).grouped)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "two")
    weights = [(tmp_path / name / "lowfat.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    lowfat.export_dense(loaded, tmp_path / "dense")
    assert torch.equal(copy.deepcopy(loaded)(IDS).logits, loaded(IDS).logits)


def test_what_stays_as_it_was_is_listed():
    assert set(factorized("Gemma")[1].others.values()) == {"GemmaAttention is not among the known blocks",
                                                           "GemmaMLP is not among the known blocks"}
    assert set(factorized("Bert", hidden_act="gelu_new")[1].others.values()) == {
        "its activation, NewGELUActivation, is none of low_rank's"}
    assert set(factorized("Llama", hidden_act="gelu")[1].others.values()) == {"its activation is GELUActivation, not SiLU"}
    model = built("Llama")
    some = lowfat.plan(model, method="svd", ratio=0.5, layers=["*.q_proj", "*.o_proj"])
    report = lowfat.factorize(model, some)
    assert set(report.blocks.others.values()) == {"k_proj is a Linear"} and not report.blocks.grouped
    assert report.to_json()["blocks"]["others"] == report.blocks.others
    distil = factorized("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    assert set(distil[1].others.values()) == {"DistilBertSelfAttention is not among the known blocks"}


def test_a_projection_replaced_or_watched_later_is_called_by_itself(counted):
    model, _ = factorized("Llama")
    expected = model(IDS).logits
    first = model.model.layers[0].self_attn
    seen = []
    hook = first.q_proj.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    assert torch.equal(model(IDS).logits, expected) and seen == [(2, 9, 32)] and counted["low_rank_group"] == 3
    hook.remove()
    dense = nn.Linear(32, 48, bias=False)
    with torch.no_grad():
        dense.weight.copy_(model.model.layers[1].mlp.up_proj.dense())
    model.model.layers[1].mlp.up_proj = dense
    found = model(IDS).logits
    assert counted["low_rank_swiglu"] == 5
    lowfat.ungroup_blocks(model)
    assert torch.equal(model(IDS).logits, found)


def test_a_projection_of_another_input_is_not_given_the_first_one():
    """Kills a stand-in that answers by name alone."""
    model, _ = factorized("Bert")
    block, other = model.bert.encoder.layer[0].attention.self, torch.randn(1, 3, 32)
    x = torch.randn(1, 3, 32)
    stand_in = blocks._Projected(block, x, {"query": x})
    assert stand_in.query(x) is x and torch.equal(stand_in.query(other), block.query(other))
    assert stand_in.scaling == block.scaling
