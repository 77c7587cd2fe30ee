"""What counts as a layer to factorize, why the rest does not, and replacing under every name."""
import pytest
import torch
from torch import nn

from lowfat.errors import ArgumentError, UnsupportedError
from lowfat.layers import dense_weight, factorizable, is_linear, replace, sizes, skipped
from lowfat.structures import LowRank


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])
        self.head = nn.Linear(4, 10, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("fixture, each", [("tiny_bert", 6), ("tiny_llama", 7), ("tiny_gpt2", 4)])
def test_default_is_every_linear_of_the_blocks(request, fixture, each):
    model = request.getfixturevalue(fixture)
    found = factorizable(model)
    assert len(found) == 2 * each
    assert all(is_linear(module) and ("layer" in name or ".h." in name) for name, module in found.items())
    assert not set(found) & set(skipped(model))


def test_everything_else_is_listed_with_its_reason(tiny_bert, tiny_gpt2):
    assert skipped(tiny_bert) == {
        "bert.embeddings.word_embeddings.weight": "embedding", "bert.embeddings.position_embeddings.weight": "embedding",
        "bert.embeddings.token_type_embeddings.weight": "embedding", "bert.pooler.dense": "outside the blocks",
        "classifier": "outside the blocks"}
    assert skipped(tiny_gpt2)["lm_head"] == "tied to transformer.wte.weight"


def test_entries_of_a_list_that_are_layers_themselves_are_heads():  # kills: any nn.Linear below a ModuleList
    assert list(factorizable(Model())) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert skipped(Model())["heads.0"] == "outside the blocks"


def test_patterns_choose_by_name():
    model = Model()
    assert list(factorizable(model, ["*.up", "head"])) == ["blocks.0.up", "blocks.1.up", "head"]
    assert skipped(model, ["*.up"])["blocks.0.down"] == "not matched"


@pytest.mark.parametrize("patterns, says", [
    (["*.up", "no*"], "'no\\*' matches no linear layer; there are blocks.\\*.up, blocks.\\*.down, heads.\\*, head"),
    ([], "nothing to factorize"), ("head", "must be a list"), ([1], "must be a list"), (["embed"], "matches no linear")])
def test_patterns_that_choose_nothing_are_errors(patterns, says):
    with pytest.raises(ArgumentError, match=says):
        factorizable(Model(), patterns)


def test_a_model_without_blocks_is_an_error_that_lists_its_layers():
    with pytest.raises(ArgumentError, match="linear layers of this model: up, down"):
        factorizable(Block())


def test_tied_weights_are_left_alone_on_both_sides():
    model = Model()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    model.head.weight = model.embed.weight
    assert list(factorizable(model)) == ["blocks.0.down", "blocks.1.down"]
    reasons = skipped(model)
    assert reasons["blocks.0.up"] == "tied to blocks.1.up.weight" and reasons["head"] == "tied to embed.weight"
    with pytest.raises(ArgumentError, match="head: tied to embed.weight"):
        factorizable(model, ["head"])


def test_tied_by_shared_memory_counts_as_tied():  # kills: comparing parameters by identity only
    model = Model()
    model.blocks[1].up.weight = nn.Parameter(model.blocks[0].up.weight.data)
    assert "blocks.1.up" not in factorizable(model)


def test_untied_layers_on_the_meta_device_are_not_taken_for_tied():
    with torch.device("meta"):
        assert len(factorizable(Model())) == 4


def test_a_module_with_two_names_comes_once_and_is_replaced_under_both():
    model = Model()
    model.blocks[1] = model.blocks[0]
    assert list(factorizable(model)) == ["blocks.0.up", "blocks.0.down"]
    assert list(factorizable(model, ["blocks.1.up"])) == ["blocks.0.up"]
    replace(model, "blocks.0.up", LowRank(4, 6, rank=2))
    assert isinstance(model.blocks[1].up, LowRank) and model.blocks[0].up is model.blocks[1].up
    model.blocks[0], model.blocks[1] = Block(), model.blocks[0]
    shared = nn.Linear(4, 6)
    model.blocks[0].up = model.blocks[1].up = shared
    layer = LowRank(4, 6, rank=2)
    replace(model, "blocks.1.up", layer)
    assert model.blocks[0].up is layer and model.blocks[1].up is layer


def test_replacing_keeps_the_training_flag_and_works():
    model = Model().eval()
    replace(model, "blocks.0.up", LowRank.from_dense(model.blocks[0].up.weight, model.blocks[0].up.bias, rank=4))
    assert not model.blocks[0].up.training
    assert model(torch.randn(3, 4)).shape == (3, 10)
    assert skipped(model)["blocks.0.up"] == "already LowRank"


def test_subclasses_and_layers_read_from_outside_are_left_alone():
    class Mine(nn.Linear):
        pass

    model = Model()
    model.blocks[0].up = Mine(4, 6)
    model.blocks[1] = nn.TransformerEncoderLayer(4, 2, 8)
    assert list(factorizable(model)) == ["blocks.0.down"]
    reasons = skipped(model)
    assert reasons["blocks.0.up.weight"] == "Mine, a subclass of nn.Linear"
    assert reasons["blocks.1.linear1"] == "TransformerEncoderLayer reads its weight directly"
    assert "subclass" in reasons["blocks.1.self_attn.out_proj.weight"]


def test_expert_stacks_and_integer_weights_are_reported():
    model = Model()
    model.blocks[0].experts = nn.Parameter(torch.zeros(3, 4, 6))
    model.blocks[0].up = nn.Linear(4, 6).requires_grad_(False)
    model.blocks[0].up.weight.data = torch.zeros(6, 4, dtype=torch.int8)
    reasons = skipped(model)
    assert reasons["blocks.0.experts"] == "a stack of 3 matrices in one parameter (experts); not supported yet"
    assert reasons["blocks.0.up"] == "stored as torch.int8"


def test_a_mixture_of_experts_model_lists_its_stacks():
    from transformers import MixtralConfig, MixtralForCausalLM
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                             num_attention_heads=2, num_key_value_heads=1, num_local_experts=4))
    assert [name.rpartition(".")[2] for name in factorizable(model)] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    stacks = {name: reason for name, reason in skipped(model).items() if "experts" in name}
    assert len(stacks) == 2 and all("stack of 4" in reason for reason in stacks.values())


def test_a_sharded_weight_is_refused_by_name():
    model = Model()
    model.blocks[0].up.weight.full_tensor = lambda: None
    with pytest.raises(UnsupportedError, match="blocks.0.up: the weight is sharded"):
        factorizable(model)


def test_conv1d_is_read_as_out_by_in(tiny_gpt2):
    module = factorizable(tiny_gpt2)["transformer.h.0.attn.c_attn"]
    assert sizes(module) == (32, 96) and dense_weight(module).shape == (96, 32)
    assert dense_weight(module).data_ptr() == module.weight.data_ptr()
    x = torch.randint(-3, 4, (2, 5, 32)).float()
    module.weight.data = torch.randint(-3, 4, (32, 96)).float()
    assert torch.equal(nn.functional.linear(x, dense_weight(module), module.bias), module(x))  # whole numbers: exact
    assert sizes(nn.Linear(3, 5)) == (3, 5) and sizes(LowRank(3, 5, rank=1)) == (3, 5)


def test_layers_whose_weight_their_block_reads_are_left_alone():
    """T5's feed-forward asks `self.wo.weight.dtype`: factors in its place would fail at the first forward."""
    from transformers import T5Config, T5EncoderModel
    model = T5EncoderModel(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)).eval()
    reasons = {name: reason for name, reason in skipped(model).items() if name.endswith(".wo")}
    assert reasons and all("reads its weight directly" in reason for reason in reasons.values())
    assert any(name.endswith(".q") for name in factorizable(model))
