"""Adapters on whole models: nothing changes at first, only they learn, they merge, and they come back from files."""
import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers.models.bert.modeling_bert  # noqa: F401  while tests are collected, where no clock runs: it takes seconds
from torch import nn

import lowfat
from lowfat.errors import ArgumentError, FormatError, IntegrityError, NumericsError, ShapeError, UnsupportedError
from lowfat.layers import factorizable, replace
from lowfat.ops.wavelet import SUBBANDS
from lowfat.progress import tensors_digest
from lowfat.strict_json import read_json
from lowfat.structures import Monarch, Wavelet
from lowfat.tensor_file import read_tensors
from tiny_text import classifier, rows, tokenizer

MODELS = ("tiny_bert", "tiny_llama", "tiny_gpt2")


@pytest.fixture(params=MODELS)
def model(request):
    return request.getfixturevalue(request.param)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12)).logits


def digest(model):
    return tensors_digest(model.state_dict().items())


def adapters(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Wavelet)}


def adapted(model, **options):
    """With adapters that add something."""
    lowfat.adapt(model, **{"rank": 2, "alpha": 0.5} | options)
    with torch.no_grad():
        for layer in adapters(model).values():
            for name, parameter in layer.named_parameters(recurse=False):
                if name != "v":
                    parameter.copy_(torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("options", [*({"subbands": subbands} for subbands in SUBBANDS), {"tiny": True},
                                     {"filter": "db4", "levels": 3}])
def test_a_new_adapter_leaves_the_logits_and_freezes_the_rest(model, options):
    expected, layers = logits(model), list(factorizable(model))
    report = lowfat.adapt(model, rank=2, **options)
    assert torch.equal(logits(model), expected) and list(adapters(model)) == list(report.layers) == layers
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in trainable} == set(layers) and report.trained == []
    assert report.parameters == sum(model.get_parameter(name).numel() for name in trainable)
    assert report.parameters == sum(layer["parameters"] for layer in report.layers.values()) < report.all_parameters
    assert json.loads(json.dumps(report.to_json()))["method"] == "wavelet" and report.skipped


def test_layers_and_modules_to_save_are_chosen_by_name(tiny_bert):
    report = lowfat.adapt(tiny_bert, layers=["*.query", "*.value"], modules_to_save=["classifier"], rank=4)
    assert len(report.layers) == 4 and all(name.endswith(("query", "value")) for name in report.layers)
    assert report.trained == ["classifier.weight", "classifier.bias"]
    assert report.skipped["bert.encoder.layer.0.attention.self.key"] == "not matched"
    assert [name for name, parameter in tiny_bert.named_parameters() if parameter.requires_grad
            and not name.endswith((".v", ".u"))] == report.trained


@pytest.mark.parametrize("options, error, text", [
    ({"method": "waveft"}, ArgumentError, "method is 'waveft', must be one of wavelet"),
    ({"ranks": 3}, ArgumentError, "ranks is no option of wavelet; there are rank, alpha, filter, levels, subbands, tiny"),
    ({"rank": 30}, ShapeError, r"bert.encoder.layer.0.attention.self.query: rank must be between 1 and 16"),
    ({"levels": 6}, ShapeError, r"bert.*query: wavelet: levels is 6, must be one of 1, 2, 3, 4, 5 for 32 and 32 features"),
    ({"layers": ["*.gate_proj"]}, ArgumentError, "layers: '.*gate_proj' matches no linear layer"),
    ({"layers": "*"}, ArgumentError, "layers must be a list"),
    ({"modules_to_save": ["head"]}, ArgumentError, "modules_to_save: 'head' matches no module; the outermost are bert"),
    ({"modules_to_save": "classifier"}, ArgumentError, "modules_to_save must be a list of name patterns"),
    ({"modules_to_save": ["bert"]}, ArgumentError, "modules_to_save: bert holds bert.encoder.layer.0.attention.self.query"),
])
def test_mistakes_are_named_and_change_nothing(tiny_bert, options, error, text):
    tiny_bert.bert.embeddings.requires_grad_(False)
    before, frozen = digest(tiny_bert), [p.requires_grad for p in tiny_bert.parameters()]
    with pytest.raises(error, match=text):
        lowfat.adapt(tiny_bert, **options)
    assert digest(tiny_bert) == before and not adapters(tiny_bert)
    assert [p.requires_grad for p in tiny_bert.parameters()] == frozen


def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(tiny_bert):
    last = tiny_bert.bert.encoder.layer[1].output.dense
    with torch.no_grad():
        last.weight[0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"bert.encoder.layer.1.output.dense: weight"):
        lowfat.adapt(tiny_bert, rank=2, tiny=True)
    assert not adapters(tiny_bert) and all(parameter.requires_grad for parameter in tiny_bert.parameters())


def test_a_second_adapter_is_refused(tiny_bert):
    lowfat.adapt(tiny_bert, rank=2, layers=["*.query"])
    before = digest(tiny_bert)
    with pytest.raises(UnsupportedError, match="query: base_layer is a Wavelet already"):
        lowfat.adapt(tiny_bert, rank=2)
    with pytest.raises(ArgumentError, match="already Wavelet"):  # nor is the layer below one of the model's
        lowfat.factorize(tiny_bert, {"bert.encoder.layer.0.attention.self.query": None})
    assert digest(tiny_bert) == before and lowfat.plan(tiny_bert, method="svd", ratio=0.5)


# --- merging, taking out ---

def test_merged_models_compute_the_same_and_come_back(model):
    adapted(model)
    exact = logits(copy.deepcopy(model).double())
    before, weights = logits(model), digest(model)
    lowfat.merge_adapters(model, keep_base=True)
    merged = logits(model)
    # as near to the exact ones as the adapters were, but for twice the luck of the roundings
    assert (merged.double() - exact).norm() <= 2 * (before.double() - exact).norm()
    lowfat.merge_adapters(model)  # nothing left to merge
    lowfat.unmerge_adapters(model)
    assert digest(model) == weights and torch.equal(logits(model), before)
    lowfat.unadapt(model)
    assert not adapters(model) and torch.equal(logits(model), merged)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ArgumentError, match="the model has no adapters"):
        lowfat.unadapt(model)


@pytest.mark.parametrize("merged", [False, True])
def test_without_merging_nothing_is_left_of_them(model, merged):
    before, names = digest(model), list(model.state_dict())
    adapted(model)
    if merged:
        lowfat.merge_adapters(model, keep_base=True)
    lowfat.unadapt(model, merge=False)
    assert digest(model) == before and list(model.state_dict()) == names


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"], indirect=True)
def test_factorized_layers_are_adapted_too(model):
    lowfat.factorize(model, lowfat.plan(model, method="svd", ratio=0.5))
    expected, before = logits(model), digest(model)
    report = lowfat.adapt(model, rank=2)
    assert torch.equal(logits(model), expected) and all("parameters" in layer for layer in report.layers.values())
    assert {type(layer.base_layer).__name__ for layer in adapters(model).values()} == {"LowRank"}
    lowfat.unadapt(model, merge=False)
    assert digest(model) == before and torch.equal(logits(model), expected)
    adapted(model)
    lowfat.unadapt(model)
    assert not adapters(model) and logits(model).isfinite().all()


def test_what_cannot_be_merged_is_said_before_anything_is(tiny_bert):
    name = "bert.encoder.layer.1.output.dense"
    replace(tiny_bert, name, Monarch(48, 32))
    adapted(tiny_bert)
    before = digest(tiny_bert)
    for call in (lowfat.unadapt, lowfat.merge_adapters):
        with pytest.raises(UnsupportedError, match=f"{name}: base_layer is a Monarch"):
            call(tiny_bert)
    assert digest(tiny_bert) == before and not any(layer.merged for layer in adapters(tiny_bert).values())


# --- training ---

def test_only_the_adapters_and_the_head_are_trained(tmp_path):
    model, data = classifier(), rows(32)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lowfat.adapt(model, rank=4, modules_to_save=["classifier"])
    report = lowfat.finetune(model, data, tokenizer=tokenizer(), steps=30, batch_size=16, learning_rate=2e-2, max_length=12,
                             autocast=False, validation=data, out=tmp_path / "out")
    assert report.validation["accuracy"] > 0.9
    lowfat.save_adapter(model, tmp_path / "adapter")
    trained = logits_of(model)
    for name, tensor in copy.deepcopy(model).state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if plain in expected:
            assert torch.equal(tensor, expected[plain]) is not plain.startswith("classifier"), name
    assert torch.equal(logits_of(lowfat.load(tmp_path / "out")), trained)
    base = classifier()
    base.load_state_dict(expected)
    lowfat.load_adapter(base.eval(), tmp_path / "adapter")
    assert torch.equal(logits_of(base), trained)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).view(2, 12)).logits


def test_half_precision_is_trained_in_fp32_and_comes_back(tmp_path):
    model = classifier().bfloat16()
    lowfat.adapt(model, rank=2, tiny=True)
    lowfat.finetune(model, rows(8), tokenizer=tokenizer(), steps=2, batch_size=4, max_length=12, autocast=False,
                    out=tmp_path / "out")
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}
    found = lowfat.load(tmp_path / "out")
    assert digest(found) == digest(model) and torch.equal(logits_of(found), logits_of(model))
    assert logits_of(lowfat.load(tmp_path / "out", dtype=torch.float32)).dtype == torch.float32


def test_inspect_takes_an_adapter_for_what_it_makes_of_its_layer(tiny_bert):
    from lowfat.spectra import spectra

    adapted(tiny_bert, layers=["*.query"])
    found = {one.name: one for one in spectra(tiny_bert, layers=["*.query"])}
    assert list(found) == list(adapters(tiny_bert)) and all(one.rank is None for one in found.values())


def test_transformers_trainer_takes_them(tmp_path, tiny_bert):
    from transformers import Trainer, TrainingArguments

    lowfat.adapt(tiny_bert, rank=2, modules_to_save=["classifier"])
    before = {name: parameter.clone() for name, parameter in tiny_bert.named_parameters()}
    data = [{"input_ids": torch.arange(8) + i, "labels": i % 3} for i in range(8)]
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
                                  report_to="none", disable_tqdm=True, save_strategy="no")
    trainer = Trainer(tiny_bert, arguments, train_dataset=data)
    trainer.train()
    for name, parameter in tiny_bert.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad or name.endswith(".v"), name
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(lowfat.load(tmp_path / "saved")), logits(tiny_bert.eval()))


# --- files ---

@pytest.mark.parametrize("options", [{}, {"tiny": True, "levels": 2}, {"subbands": "shared+gain", "filter": "sym4"}])
def test_a_whole_model_is_saved_and_loaded(model, options, tmp_path):
    adapted(model, **options)
    lowfat.save(model, tmp_path / "whole")
    found = lowfat.load(tmp_path / "whole")
    assert digest(found) == digest(model) and torch.equal(logits(found), logits(model))
    assert {name: layer.shape() for name, layer in adapters(found).items()} == {
        name: layer.shape() for name, layer in adapters(model).items()}
    for layer in adapters(found).values():
        assert not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
        assert layer.gain is None or layer.gain.requires_grad
    lowfat.export_dense(found, tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense")
    lowfat.unadapt(model)
    assert not adapters(plain) and torch.equal(logits(plain), logits(model))


def test_merged_models_are_not_saved_as_if_they_were_not(tiny_bert, tmp_path):
    adapted(tiny_bert)
    lowfat.merge_adapters(tiny_bert)
    for call in (lowfat.save, lowfat.export_dense, lowfat.save_adapter):
        with pytest.raises(UnsupportedError, match=r"is merged.*unmerge\(\) it first, or take the adapters out"):
            call(tiny_bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"tiny": True, "levels": 2}, {"subbands": "shared+gain"}, {"layers": ["*1*"]}])
def test_adapters_alone_are_saved_and_loaded(model, options, tmp_path):
    plain = copy.deepcopy(model)
    adapted(model, **options)
    lowfat.save_adapter(model, tmp_path / "adapter")
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["adapter.json", "adapter.safetensors", "manifest.json"]
    stored = read_tensors(tmp_path / "adapter" / "adapter.safetensors")
    assert not any("base_layer" in name for name in stored)
    lowfat.adapt(fresh := copy.deepcopy(plain), **{"rank": 2} | options)
    report = lowfat.load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(logits(plain), logits(model)) and digest(plain) == digest(model)
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in fresh.parameters()]
    assert list(report.layers) == list(adapters(model))
    with pytest.raises(ArgumentError, match="exists already"):
        lowfat.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="is a Wavelet already"):
        lowfat.load_adapter(plain, tmp_path / "adapter")


def test_adapters_take_the_dtype_of_the_model(tiny_bert, tmp_path):
    half = copy.deepcopy(tiny_bert).bfloat16()
    lowfat.save_adapter(adapted(tiny_bert), tmp_path / "adapter")
    lowfat.load_adapter(half, tmp_path / "adapter")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16} and logits(half).dtype == torch.bfloat16


def rewritten(folder, change):
    """The same folder with another content, and a manifest that agrees."""
    from lowfat import storage

    described, stored = read_json(folder / "adapter.json"), read_tensors(folder / "adapter.safetensors")
    found = SimpleNamespace(json=described, tensors={name: tensor.clone() for name, tensor in stored.items()})
    change(found)

    def fill(out):
        storage.write_json(out / "adapter.json", found.json)
        storage.write_tensors(out / "adapter.safetensors", found.tensors)

    storage.write_folder(folder, fill, overwrite=True)


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("change, error, text", [
    (lambda f: f.json.pop("trained"), FormatError, "must have format, method, layers and trained"),
    (lambda f: f.json.update(format=2), FormatError, "format 2 of method 'wavelet'; this lowfat reads format 1"),
    (lambda f: f.json.update(method=["wavelet"]), FormatError, "method"),
    (lambda f: f.json.update(layers={}), FormatError, "at least one entry"),
    (lambda f: f.json["layers"][QUERY].update(rank=3), FormatError, r"v must be numbers \[3, 32\], found \[2, 32\]"),
    (lambda f: f.json["layers"][QUERY].update(levels=9), FormatError, f"layers.{QUERY}: wavelet: levels is 9"),
    (lambda f: f.json["layers"][QUERY].update(color="red"), FormatError, f"layers.{QUERY}: .*color"),
    (lambda f: f.json["layers"][QUERY].pop("alpha"), FormatError, f"layers.{QUERY} is .*, expected a form like"),
    (lambda f: f.json["layers"][QUERY].update(device="cpu"), FormatError, f"layers.{QUERY}: "),
    (lambda f: f.json["layers"].update(other=f.json["layers"].pop(QUERY)), FormatError, "other.v must be numbers"),
    (lambda f: f.tensors.pop(f"{QUERY}.u"), FormatError, rf"{QUERY}.u must be numbers \[32, 2\], found nothing"),
    (lambda f: f.tensors.update(more=torch.ones(2)), FormatError, "other tensors"),
    (lambda f: f.tensors[f"{QUERY}.u"].fill_(float("nan")), NumericsError, f"{QUERY}.u holds NaN or infinity"),
    (lambda f: f.tensors.update({f"{QUERY}.u": torch.ones(32, 2, dtype=torch.int32)}), FormatError, "must be numbers"),
    (lambda f: f.json["trained"].append("classifier.weight"), FormatError, "other tensors"),
    (lambda f: (f.json["trained"].append("head.weight"), f.tensors.update({"head.weight": torch.ones(2)})), FormatError,
     "trained names head.weight, which this model lacks"),
])
def test_files_that_do_not_fit_are_refused_and_change_nothing(tiny_bert, tmp_path, change, error, text):
    plain = copy.deepcopy(tiny_bert)
    lowfat.save_adapter(adapted(tiny_bert, layers=["*.query"]), tmp_path / "adapter")
    rewritten(tmp_path / "adapter", change)
    before = digest(plain)
    with pytest.raises(error, match=text):
        lowfat.load_adapter(plain, tmp_path / "adapter")
    assert digest(plain) == before and all(parameter.requires_grad for parameter in plain.parameters())


def test_another_model_is_refused(tiny_bert, tiny_llama, tmp_path):
    lowfat.save_adapter(adapted(copy.deepcopy(tiny_bert)), tmp_path / "adapter")
    with pytest.raises(FormatError, match=r"layers\.bert\..* is no module of this model"):
        lowfat.load_adapter(tiny_llama, tmp_path / "adapter")
    replace(tiny_bert, QUERY, nn.Linear(16, 32))
    with pytest.raises(FormatError, match=f"layers.{QUERY} is for 32 to 32 features, the model has 16 to 32"):
        lowfat.load_adapter(tiny_bert, tmp_path / "adapter")
    with pytest.raises(ArgumentError, match="no such folder"):
        lowfat.load_adapter(tiny_bert, tmp_path / "nothing")
    with (tmp_path / "adapter" / "adapter.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\1")
    with pytest.raises(IntegrityError, match="adapter.safetensors"):
        lowfat.load_adapter(tiny_bert, tmp_path / "adapter")


def test_an_adapter_itself_is_no_model():
    with pytest.raises(ArgumentError, match=r"model is an adapter itself; use its merge\(\)"):
        lowfat.merge_adapters(Wavelet(nn.Linear(8, 8), rank=2))


def test_layers_that_share_a_factor_share_it_again_after_unmerge(tiny_bert):
    lowfat.factorize(tiny_bert, lowfat.plan(tiny_bert, method="svd", ratio=0.4, share=2))
    before = copy.deepcopy(tiny_bert)
    ties = tiny_bert.all_tied_weights_keys
    lowfat.adapt(tiny_bert, rank=2, subbands="LL")
    lowfat.merge_adapters(tiny_bert)
    lowfat.unmerge_adapters(tiny_bert)
    lowfat.unadapt(tiny_bert, merge=False)
    assert tiny_bert.all_tied_weights_keys == ties
    queries = [layer.attention.self.query for layer in tiny_bert.bert.encoder.layer]
    assert queries[0].v is queries[1].v
    assert sum(one.numel() for one in tiny_bert.parameters()) == sum(one.numel() for one in before.parameters())
    for (name, left), right in zip(tiny_bert.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
