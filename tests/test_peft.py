"""Wavelet layers inside of PEFT: its own commands put them on, train, save, load, merge and take them out."""
import copy

import pytest
import torch

from lowfat.errors import FormatError, ShapeError, UnsupportedError
from lowfat.layers import dense_weight, replace
from lowfat.structures import LowRank, Wavelet

peft = pytest.importorskip("peft")


def config(targets=("query", "value"), r=4, options=None, **others):
    from lowfat.peft import wavelet_layers

    found = peft.LoraConfig(target_modules=list(targets), r=r, lora_alpha=8, **others)
    found._register_custom_module(wavelet_layers(**(options or {})))
    return found


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12)).logits


def randomized(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_wavelet_u" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("name, targets", [("tiny_bert", ("query", "dense")), ("tiny_gpt2", ("c_attn", "c_proj"))])
@pytest.mark.parametrize("options", [{}, {"filter": "db2", "levels": 2, "subbands": "all"}])
def test_the_whole_way(request, name, targets, options, tmp_path):
    base = request.getfixturevalue(name)
    expected, plain, again = logits(base), copy.deepcopy(base), copy.deepcopy(base)
    model = peft.get_peft_model(base, config(targets, options=options))
    assert torch.equal(logits(model), expected)  # a new adapter adds zero
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    adapted = logits(randomized(model))
    assert not torch.equal(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path, config=config(targets, options=options))
    assert torch.equal(logits(loaded), adapted)
    for layer in (layer for layer in model.modules() if type(layer).__name__ == "WaveletLora"):
        ours = Wavelet(copy.deepcopy(layer.base_layer), rank=4, alpha=8.0, **options)
        ours.v.data, ours.u.data = (factor.data for factor in layer._factors("default"))
        x = torch.randn(3, layer.k)
        assert torch.equal(layer(x), ours(x)) and torch.equal(layer.get_delta_weight("default"), ours.delta())
        weight = dense_weight(layer.base_layer).clone()
        layer.merge(safe_merge=True)
        assert torch.equal(dense_weight(layer.base_layer), ours.dense())
        layer.unmerge()
        assert (dense_weight(layer.base_layer) - weight).abs().max() <= 2**-23 * (ours.dense().abs() + weight.abs()).max()
    exact = logits(copy.deepcopy(model).double())
    merged = model.merge_and_unload()
    assert type(merged) is type(plain) and list(merged.state_dict()) == list(plain.state_dict())
    assert (logits(merged).double() - exact).norm() <= 2 * (adapted.double() - exact).norm()


def test_a_factorized_layer_is_adapted_and_not_merged(tiny_bert):
    for layer in tiny_bert.bert.encoder.layer:
        replace(layer.attention.self, "query", LowRank.from_dense(layer.attention.self.query.weight, rank=8))
    expected = logits(tiny_bert)
    model = peft.get_peft_model(tiny_bert, config(("query",)))
    assert torch.equal(logits(model), expected)
    with pytest.raises(UnsupportedError, match="the base layer is a LowRank"):
        model.merge_and_unload()


def test_what_was_stored_is_not_taken_for_something_else(tiny_bert, tmp_path):
    plain = copy.deepcopy(tiny_bert)
    randomized(peft.get_peft_model(tiny_bert, config())).save_pretrained(tmp_path)
    for options in ({"filter": "db2"}, {"levels": 2}, {"subbands": "all"}):
        with pytest.raises(FormatError, match="made with other options than"):
            peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, config=config(options=options))
    with pytest.warns(UserWarning, match="missing adapter keys"):  # without the registration: a new LoRA, which adds nothing
        found = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert torch.equal(logits(found), logits(plain))


def test_it_learns_and_switches(tiny_bert):
    model = peft.get_peft_model(tiny_bert, config(use_rslora=True, lora_dropout=0.1))
    model.add_adapter("second", config(r=2))
    assert {layer.scaling["default"] for layer in model.modules() if type(layer).__name__ == "WaveletLora"} == {8 / 4**0.5}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    before = logits(model.eval())
    model.train()(input_ids=torch.arange(24).view(2, 12), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    after = logits(model.eval())
    assert not torch.equal(after, before)
    model.set_adapter("second")
    assert torch.equal(logits(model), before)
    model.set_adapter("default")
    assert torch.equal(logits(model), after)
    model.delete_adapter("default")


@pytest.mark.parametrize("options, error, text", [
    ({"r": 17}, ShapeError, "rank must be between 1 and 16 for diag"),
    ({"options": {"levels": 6}}, ShapeError, "levels is 6"),
    ({"options": {"subbands": "shared+gain"}}, UnsupportedError, "no gains"),
    ({"lora_bias": True}, UnsupportedError, "lora_bias"),
    ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights"),
    ({"use_dora": True}, UnsupportedError, "use_dora"),
])
def test_what_there_is_not(tiny_bert, options, error, text):
    with pytest.raises(error, match=text):
        peft.get_peft_model(tiny_bert, config(**options))
