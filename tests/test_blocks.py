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
    for family, activation, name in (("Bert", "gelu_new", "NewGELU"), ("Llama", "gelu", "GELU")):
        assert set(factorized(family, hidden_act=activation)[1].others.values()) == {
            f"its activation is {name}Activation, which low_rank has not in its place"}
    model = built("Llama")
    some = lowfat.plan(model, method="svd", ratio=0.5, layers=["*.q_proj", "*.o_proj"])
    report = lowfat.factorize(model, some)
    assert set(report.blocks.others.values()) == {"k_proj is a Linear"} and not report.blocks.grouped
    assert report.to_json()["blocks"]["others"] == report.blocks.others
    distil = factorized("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    assert set(distil[1].others.values()) == {"DistilBertSelfAttention is not among the known blocks"}


class Sub(lowfat.LowRank):
    """Somebody's own layer, which may do anything."""


def watch(kind):
    def disturb(layer):
        return getattr(layer, f"register_{kind}_hook")(lambda *args: None).remove
    return disturb


def patch(layer):
    layer.forward = lambda *args: type(layer).forward(layer, *args)
    return lambda: layer.__dict__.pop("forward")


def of_another_class(layer):
    own, layer.__class__ = type(layer), Sub if isinstance(layer, lowfat.LowRank) else type("Sub", (type(layer),), {})
    return lambda: setattr(layer, "__class__", own)


def watch_all(layer):
    return nn.modules.module.register_module_forward_hook(lambda *args: None).remove


DISTURBANCES = {"forward hook": watch("forward"), "forward pre-hook": watch("forward_pre"),
                "backward hook": watch("full_backward"), "backward pre-hook": watch("full_backward_pre"),
                "another forward": patch, "another class": of_another_class, "a hook on all modules": watch_all}


@pytest.mark.parametrize("what", DISTURBANCES)
@pytest.mark.parametrize("family, layer, op", [
    ("Llama", "model.layers.0.self_attn.k_proj", "low_rank_group"), ("Llama", "model.layers.0.mlp.up_proj", "low_rank_swiglu"),
    ("Llama", "model.layers.0.mlp.act_fn", "low_rank_swiglu"), ("Bert", "bert.encoder.layer.0.intermediate.dense", "low_rank"),
    ("Bert", "bert.encoder.layer.0.intermediate.intermediate_act_fn", "low_rank"),
    ("Bert", "bert.encoder.layer.0.output.dropout", "low_rank")])
def test_who_touches_a_layer_has_it_called(family, layer, op, what, counted):
    """Kills a block that goes on without the layer: the hook would not fire, the other forward not run."""
    model, _ = factorized(family)
    model.requires_grad_(False)
    expected = model(IDS).logits
    calls = counted[op]
    undo = DISTURBANCES[what](model.get_submodule(layer))
    assert torch.equal(model(IDS).logits, expected)
    assert counted[op] - calls == (0 if what == "a hook on all modules" else calls - 1)
    undo()
    before = counted[op]
    assert torch.equal(model(IDS).logits, expected) and counted[op] == before + calls


def test_a_layer_or_activation_replaced_later(counted):
    for family, replace in (("Llama", lambda m: setattr(m.model.layers[1].mlp, "up_proj", nn.Linear(32, 48, bias=False))),
                            ("Llama", lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.ReLU())),
                            ("Llama", lambda m: setattr(m.model.layers[1].self_attn, "v_proj", nn.Linear(32, 16, bias=False))),
                            ("Bert", lambda m: setattr(m.bert.encoder.layer[1].intermediate, "intermediate_act_fn", nn.Tanh())),
                            ("Bert", lambda m: setattr(m.bert.encoder.layer[1].output, "dense", nn.Linear(48, 32)))):
        model, _ = factorized(family)
        replace(model)
        found = model(IDS).logits
        lowfat.ungroup_blocks(model)
        assert torch.equal(model(IDS).logits, found)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_pickled_copied_offloaded_and_on_meta(family, tmp_path):
    import pickle

    from accelerate import cpu_offload

    model, found = factorized(family)
    expected = model(IDS).logits
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(copied(IDS).logits, expected) and lowfat.group_blocks(copied) == found
        assert {type(block) for block in copied.modules()} == {type(block) for block in model.modules()}
    assert copy.deepcopy(model).to("meta")(IDS.to("meta")).logits.is_meta
    assert torch.equal(cpu_offload(copy.deepcopy(model), torch.device("cpu"))(IDS).logits, expected)


def test_a_class_that_somebody_put_on_top(counted):
    """As FSDP2 does: the block still runs as one, notices what is replaced, and keeps that class."""
    model, _ = factorized("Bert")
    block = model.bert.encoder.layer[0].intermediate
    block.__class__ = sharded = type("Sharded", (type(block),), {})
    expected = model(IDS).logits
    assert counted["low_rank"] == 6 and lowfat.group_blocks(model).grouped
    block.dense = nn.Linear(32, 48)
    assert not torch.equal(model(IDS).logits, expected) and counted["low_rank"] == 6 + 5
    lowfat.ungroup_blocks(model)
    assert type(block) is sharded


@pytest.mark.parametrize("name", ["LlamaMLP", "BertOutput", "BertIntermediate", "LlamaAttention"])
def test_other_classes_of_these_names_are_unknown(name):
    block = type(name, (nn.Module,), {})()
    block.fc1, block.fc2 = lowfat.LowRank(6, 5, 2), lowfat.LowRank(6, 5, 2)
    assert lowfat.group_blocks(nn.Sequential(block)).others == {"0": f"{name} is not among the known blocks"}


def test_a_projection_of_another_input_is_not_given_the_first_one():
    """Kills a stand-in that answers by name alone."""
    model, _ = factorized("Bert")
    block, other = model.bert.encoder.layer[0].attention.self, torch.randn(1, 3, 32)
    x = torch.randn(1, 3, 32)
    stand_in = blocks._Projected(block, x, {"query": x})
    assert stand_in.query(x) is x and torch.equal(stand_in.query(other), block.query(other))
    assert stand_in.scaling == block.scaling
