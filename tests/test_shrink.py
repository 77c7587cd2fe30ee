"""Taking heads and neurons out: what is left computes as if the others gave zeros, is smaller, and opens again."""
import copy
import json

import pytest
import torch

import lowfat
from lowfat import shrink as shrinking
from lowfat.errors import ArgumentError, FormatError, ShapeError, UnsupportedError
from lowfat.shrink import dense_size, recorded, removable, resize, shrink

MODELS = ("tiny_bert", "tiny_llama", "tiny_gpt2")


@pytest.fixture(params=MODELS)
def model(request):
    found = request.getfixturevalue(request.param)
    with torch.no_grad():
        for parameter in found.parameters():  # biases too
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return found


def batch():
    torch.manual_seed(4)
    ids = torch.randint(5, 90, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def answers(model):
    return model(**batch()).logits


def some(units):
    """Other units of every block, another number in each."""
    kept = {}
    for number, (name, one) in enumerate(units.items()):
        kept[name] = list(range(one.count))[number % 2:one.count - (number % 3 if one.kind == "neurons" else 0)]
    return kept


def masked(model, units, kept):
    """The model whose other units hand on zeros."""
    made = copy.deepcopy(model)
    for name, one in units.items():
        gone = [unit for unit in range(one.count) if unit not in kept[name]]
        columns = one.columns[gone].flatten()
        made.get_submodule(one.writer).register_forward_pre_hook(
            lambda module, args, columns=columns: (args[0].index_fill(-1, columns, 0.0),))
    return made


def test_every_matrix_of_the_blocks_is_counted_once(model):
    units = removable(model)
    assert len(units) == 4 and {one.kind for one in units.values()} == {"heads", "neurons"}
    chosen = lowfat.layers.factorizable(model)
    assert dense_size(units) == sum(layer.weight.numel() for layer in chosen.values())
    assert {layer for one in units.values() for layer in (*one.rows, one.writer)} == set(chosen)
    for one in units.values():
        assert torch.equal(one.columns.flatten(), torch.arange(one.columns.numel()))
        for rows in one.rows.values():
            assert torch.equal(rows.flatten().sort().values, torch.arange(rows.numel()))


def test_what_is_left_computes_as_if_the_others_gave_zeros(model):
    units = removable(model)
    kept = some(units)
    expected = answers(masked(model, units, kept))
    assert not torch.allclose(expected, answers(model), atol=1e-4)
    size = sum(parameter.numel() for parameter in model.parameters())
    shrink(model, kept)
    torch.testing.assert_close(answers(model), expected)  # sums in another order
    left = removable(model)
    assert {name: one.count for name, one in left.items()} == {name: len(indices) for name, indices in kept.items()}
    assert {name: one.cost for name, one in left.items()} == {name: one.cost for name, one in units.items()}
    gone = dense_size(units) - dense_size(left)
    assert 0 < gone <= size - sum(parameter.numel() for parameter in model.parameters())  # and their biases


def test_cuts_say_what_happened_to_every_parameter(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    cuts = shrink(model, some(removable(model)))
    for name, parameter in model.named_parameters():
        expected = before[name]
        for dimension, index in cuts.get(name, []):
            expected = expected.index_select(dimension, index)
        assert torch.equal(parameter, expected), name
    assert cuts


def test_twice_is_as_once_and_all_is_nothing(model):
    units, again = removable(model), copy.deepcopy(model)
    assert answers(again).equal(answers(model))
    shrink(again, {name: range(one.count) for name, one in units.items()})
    assert answers(again).equal(answers(model)) and not recorded(again)
    neurons = [name for name, one in units.items() if one.kind == "neurons"]
    shrink(model, {name: range(4, 24) for name in neurons})
    shrink(model, {neurons[0]: range(2, 10)})
    shrink(again, {neurons[0]: range(6, 14), neurons[1]: range(4, 24)})
    assert answers(again).equal(answers(model))


def test_a_shrunk_model_opens_again(model, tmp_path):
    """Blocks of different sizes: in lowfat.load, in from_pretrained, and saved by save_pretrained, too."""
    from transformers import AutoConfig

    shrink(model, some(removable(model)))
    sizes = recorded(model)
    assert sizes
    lowfat.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "other")
    for folder in (tmp_path / "saved", tmp_path / "other"):
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["shrunk"] == sizes
        assert not list(folder.glob("model*"))  # which plain transformers would open
        for again in (lowfat.load(folder), type(model).from_pretrained(folder)):
            assert recorded(again) == sizes and torch.equal(answers(again), answers(model))
            assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    base = type(model.base_model).from_pretrained(tmp_path / "saved")
    assert len(recorded(base)) == len(sizes)
    assert AutoConfig.from_pretrained(tmp_path / "saved").hidden_size == 32


def test_neurons_of_one_number_make_an_ordinary_model(model, tmp_path):
    shrink(model, {name: range(7, 27) for name, one in removable(model).items() if one.kind == "neurons"})
    assert not recorded(model)
    model.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").exists()
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(answers(type(model).from_pretrained(tmp_path / "plain").eval()), answers(model))


def test_key_value_heads_of_one_number_make_an_ordinary_model(tiny_llama, tmp_path):
    shrink(tiny_llama, {name: [1] for name, one in removable(tiny_llama).items() if one.kind == "heads"})
    assert not recorded(tiny_llama) and tiny_llama.config.num_attention_heads == 2
    tiny_llama.save_pretrained(tmp_path / "plain")
    again = type(tiny_llama).from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(answers(again), answers(tiny_llama))
    tokens = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(**batch(), **tokens), tiny_llama.generate(**batch(), **tokens))


def test_heads_of_encoders_are_recorded_though_they_are_one_number(tiny_bert):
    """transformers would give the one head that is left the size of all."""
    shrink(tiny_bert, {name: [0] for name, one in removable(tiny_bert).items() if one.kind == "heads"})
    assert set(recorded(tiny_bert).values()) == {1} and tiny_bert.config.num_attention_heads == 2


def test_a_shrunk_model_is_factorized_and_saved(tiny_bert, tmp_path):
    shrink(tiny_bert, some(removable(tiny_bert)))
    lowfat.factorize(tiny_bert, lowfat.plan(tiny_bert, method="svd", ratio=0.5))
    lowfat.save(tiny_bert, tmp_path / "saved")
    assert torch.equal(answers(lowfat.load(tmp_path / "saved")), answers(tiny_bert))
    with pytest.raises(UnsupportedError, match="cannot say"):
        lowfat.export_dense(tiny_bert, tmp_path / "dense")
    name = next(name for name, one in removable(tiny_bert).items() if one.kind == "neurons")
    with pytest.raises(UnsupportedError, match="before it is factorized"):
        shrink(tiny_bert, {name: [0]})


def test_frozen_weights_and_dtypes_stay(tiny_gpt2):
    model = tiny_gpt2.bfloat16()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    shrink(model, some(removable(model)))
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "transformer.h.0.mlp.c_fc.weight"]
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("kept, error, message", [
    ({"nothing": [0]}, ArgumentError, "nothing is no block that can be shrunk; there are bert.encoder"),
    ({"bert.encoder.layer.0.intermediate": [0, 0]}, ArgumentError, "each once"),
    ({"bert.encoder.layer.0.intermediate": [48]}, ArgumentError, "below 48"),
    ({"bert.encoder.layer.0.intermediate": [-1]}, ArgumentError, "below 48"),
    ({"bert.encoder.layer.0.attention.self": []}, ShapeError, "none of its heads"),
])
def test_what_cannot_be_kept_is_refused_before_any_change(tiny_bert, kept, error, message):
    before = {name: tuple(tensor.shape) for name, tensor in tiny_bert.state_dict().items()}
    with pytest.raises(error, match=message):
        shrink(tiny_bert, {"bert.encoder.layer.1.intermediate": [0]} | kept)
    assert before == {name: tuple(tensor.shape) for name, tensor in tiny_bert.state_dict().items()}


def test_resize_never_grows(tiny_bert):
    for counts in ({"bert.encoder.layer.0.intermediate": 49}, {"bert.encoder.layer.0.intermediate": 0}, {"pooler": 1}):
        with pytest.raises(ArgumentError, match="cannot have"):
            resize(tiny_bert, counts)


@pytest.mark.parametrize("shrunk, message", [
    ([], "expected numbers of units"), ({"a": 0}, "expected numbers"), ({"a": True}, "expected numbers"),
    ({"bert.encoder.layer.9.intermediate": 3}, "is no module of"), ({}, "shape of .* config.json implies"),
    ({"bert.encoder.layer.0.intermediate": 400}, "cannot have 400"),
    ({"bert.encoder.layer.0.output": 3}, "none that can be taken out"),
])
def test_a_file_that_says_other_sizes_is_refused(tiny_bert, tmp_path, shrunk, message):
    from lowfat import manifest

    shrink(tiny_bert, some(removable(tiny_bert)))
    lowfat.save(tiny_bert, tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["shrunk"] = shrunk
    path.write_text(json.dumps(config))
    files = [tmp_path / "saved" / name for name in ("config.json", "lowfat.safetensors")]
    (tmp_path / "saved" / manifest.NAME).write_text(manifest.describe(tmp_path / "saved", files, {}))
    with pytest.raises(FormatError, match=message):
        lowfat.load(tmp_path / "saved")


def test_blocks_of_other_layers_are_left_out(tiny_bert):
    """Whoever wraps a layer may hide its sizes: saving asks every model for its units."""
    class Wrapped(torch.nn.Module):
        pass

    tiny_bert.bert.encoder.layer[0].attention.self.query = Wrapped()
    assert len(removable(tiny_bert)) == 3 and not recorded(tiny_bert)


def test_only_known_families_have_units():
    class Own(torch.nn.Module):
        pass

    assert removable(Own()) == {} and len(shrinking._KNOWN) == 16
