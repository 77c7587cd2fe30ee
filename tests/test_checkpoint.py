"""Checkpoints: what comes back is what was saved, by every road in and out, and plain transformers refuses the folder."""
import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.models.bert.modeling_bert  # noqa: F401  while tests are collected, where no clock runs: it takes seconds
from torch import nn

from lowfat import checkpoint, storage
from lowfat.errors import ArgumentError, IntegrityError, UnsupportedError
from lowfat.layers import dense_weight, factorizable, replace
from lowfat.strict_json import read_json
from lowfat.structures import Dictionary, LowRank, LowRankGroup, Monarch, Sparse24
from lowfat.tensor_file import read_tensors
from lowfat.validate import INDEX, WEIGHTS

MODELS = ("tiny_bert", "tiny_bert_base", "tiny_llama", "tiny_llama_tied", "tiny_gpt2")
PACKAGE = str(Path(checkpoint.__file__).parent.parent)


@pytest.fixture
def tiny_bert_base(tiny_bert):
    from transformers import BertModel
    return BertModel(tiny_bert.config).eval()


@pytest.fixture
def tiny_llama_tied(tiny_llama):
    config = copy.deepcopy(tiny_llama.config)
    config.tie_word_embeddings = True
    return type(tiny_llama)(config).eval()


def shrink(model: nn.Module, rank: int = 5) -> nn.Module:
    """Every linear layer of the blocks in factors, as `factorize` leaves a model; ranks differ, so that a mix-up shows."""
    for i, (name, module) in enumerate(factorizable(model).items()):
        replace(model, name, LowRank.from_dense(dense_weight(module), module.bias, rank=rank + i % 3))
    checkpoint.attach(model)
    return model


@pytest.fixture(params=MODELS)
def model(request):
    return shrink(request.getfixturevalue(request.param))


def output(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12).to(next(model.parameters()).device)
    with torch.no_grad():
        return model(input_ids=ids)[0]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Equal bit for bit: names, dtypes, values and outputs."""
    assert type(one) is type(other)
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name
    assert torch.equal(output(one), output(other))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


def run(code: str, *arguments) -> str:
    """Runs Python in a new process, offline, and gives what it prints."""
    environment = os.environ | {"PYTHONPATH": PACKAGE, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_load_gives_the_same_model(model, tmp_path):
    checkpoint.save(model, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    assert_same(model, loaded)
    assert not loaded.training


def test_load_is_the_first_to_need_transformers(tiny_bert, tmp_path):
    # `import lowfat; lowfat.load(folder)`, and nothing else: then the quantizer's own import is what is waited for
    checkpoint.save(shrink(tiny_bert), tmp_path / "out")
    run("import sys, lowfat; lowfat.load(sys.argv[1])", tmp_path / "out")


def test_from_pretrained_gives_the_same_model(model, tmp_path):
    checkpoint.save(model, tmp_path / "out")
    assert_same(model, type(model).from_pretrained(tmp_path / "out"))


def test_saved_again_gives_the_same_weights(model, tmp_path):
    checkpoint.save(model, tmp_path / "one")
    checkpoint.save(checkpoint.load(tmp_path / "one"), tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()


def test_save_pretrained_writes_what_save_writes(model, tmp_path):
    checkpoint.save(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    checkpoint.load(tmp_path / "one").save_pretrained(tmp_path / "three")
    copy.deepcopy(model).save_pretrained(tmp_path / "four")
    pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path / "five")
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    for name in ("two", "three", "four", "five"):
        assert first == {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}, name


def test_export_dense_opens_without_lowfat(request, tmp_path):
    models = {name: shrink(request.getfixturevalue(name)) for name in MODELS}
    for name, model in models.items():
        checkpoint.export_dense(model, tmp_path / name)
    code = ("import sys, transformers\nfrom safetensors.torch import save_file\n"
            "for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):\n"
            "    state = getattr(transformers, name).from_pretrained(folder).state_dict()\n"
            "    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, folder + '/state')\n"
            "assert 'lowfat' not in sys.modules")
    run(code, *(item for name, model in models.items() for item in (tmp_path / name, type(model).__name__)))
    for kind, model in models.items():
        state = read_tensors(tmp_path / kind / "state")
        for name, layer in model.named_modules():
            if isinstance(layer, LowRank):
                due = layer.dense().T if kind == "tiny_gpt2" else layer.dense()
                assert torch.equal(state.pop(f"{name}.weight"), due), name
        held = model.state_dict()
        for name, tensor in state.items():  # everything else, biases included, is untouched
            assert torch.equal(tensor, held[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_dense_config_is_back_after_export(name, request, tmp_path):
    dense = request.getfixturevalue(name)
    dense.save_pretrained(tmp_path / "before")
    checkpoint.export_dense(shrink(dense), tmp_path / "after")
    assert (tmp_path / "before" / "config.json").read_text() == (tmp_path / "after" / "config.json").read_text()


def test_config_gains_one_section(tiny_bert, tmp_path):
    tiny_bert.save_pretrained(tmp_path / "dense")
    checkpoint.save(shrink(tiny_bert), tmp_path / "out")
    before, after = (read_json(tmp_path / name / "config.json") for name in ("dense", "out"))
    section = after.pop("quantization_config")
    assert before == after
    assert section["modules"]["bert.encoder.layer.0.attention.self.query"] == {
        "structure": "LowRank", "in_features": 32, "out_features": 32, "rank": 5, "bias": True}


def test_plain_transformers_stops(tiny_bert, tiny_gpt2, tmp_path):
    """Decision 10. With a dense checkpoint saved to the same folder before: it must not be found and opened instead."""
    tiny_bert.save_pretrained(tmp_path / "bert")
    shrink(tiny_bert).save_pretrained(tmp_path / "bert")
    checkpoint.save(shrink(tiny_gpt2), tmp_path / "gpt2", max_shard_size="20KB")
    code = ("import sys, transformers\nfor folder, name in zip(sys.argv[1::2], sys.argv[2::2]):\n"
            "    try:\n        getattr(transformers, name).from_pretrained(folder)\n"
            "    except OSError as error:\n        print(error)\n    else:\n        sys.exit('loaded ' + folder)\n"
            "assert 'lowfat' not in sys.modules")
    text = run(code, tmp_path / "bert", "AutoModelForSequenceClassification", tmp_path / "gpt2", "AutoModelForCausalLM",
               tmp_path / "gpt2", "AutoModel")
    assert text.count("no file named model.safetensors") == 3


@pytest.mark.parametrize("first", [
    # find_spec asks for the module without importing it
    "import lowfat.checkpoint, importlib.util; assert 'transformers' not in sys.modules; "
    "importlib.util.find_spec('transformers.quantizers'); import transformers",
    "import transformers.quantizers; import lowfat.checkpoint",
    "import transformers.modeling_utils; import lowfat.checkpoint"])
def test_every_import_order_registers(first, tiny_bert, tmp_path):
    checkpoint.save(shrink(tiny_bert), tmp_path / "out")
    run(f"import sys; {first}\nfrom transformers import AutoModelForSequenceClassification as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1])\nmodel.save_pretrained(sys.argv[1] + '2')\n"
        "assert any(type(m).__name__ == 'LowRank' for m in model.modules())", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "out2")


def test_base_model_from_a_head_checkpoint_and_back(tiny_bert, tmp_path):
    """Names differ by `base_model_prefix`. A head that the checkpoint lacks is new, as ever; a factor never is."""
    from transformers import AutoModel, AutoModelForSequenceClassification
    checkpoint.save(shrink(tiny_bert), tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(output(base), output(tiny_bert.bert))
    assert_same(base, checkpoint.load(tmp_path / "head", auto_class="AutoModel"))
    base.save_pretrained(tmp_path / "base")
    assert_same(base, checkpoint.load(tmp_path / "base"))
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(output(head.bert), output(base))


def test_inner_model_saves_itself(tiny_bert, tmp_path):
    shrink(tiny_bert)
    tiny_bert.bert.save_pretrained(tmp_path / "base")
    assert torch.equal(output(checkpoint.load(tmp_path / "base")), output(tiny_bert.bert))
    tiny_bert.save_pretrained(tmp_path / "head")
    assert_same(tiny_bert, checkpoint.load(tmp_path / "head"))


def test_shards_have_our_names(model, tmp_path):
    checkpoint.save(model, tmp_path / "out", max_shard_size="20KB")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert INDEX in names and sum(name.startswith("lowfat-0000") for name in names) > 1
    assert not any(name.startswith("model") for name in names)
    index = read_json(tmp_path / "out" / INDEX)
    assert set(index["weight_map"].values()) == {name for name in names if "-of-" in name}
    assert_same(model, checkpoint.load(tmp_path / "out"))
    assert_same(model, type(model).from_pretrained(tmp_path / "out"))


def test_stacked_experts_keep_their_names(tmp_path):
    """transformers stores the experts of a mixture apart and stacks them on loading; our file has them as the model does."""
    from transformers import MixtralConfig, MixtralForCausalLM
    model = shrink(MixtralForCausalLM(MixtralConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=3, intermediate_size=16)).eval())
    checkpoint.save(model, tmp_path / "out")
    assert set(read_tensors(tmp_path / "out" / WEIGHTS)) == set(model.state_dict())
    for loaded in (checkpoint.load(tmp_path / "out"), MixtralForCausalLM.from_pretrained(tmp_path / "out")):
        assert_same(model, loaded)


def test_tied_weights_stay_tied_and_untied_ones_do_not(tiny_llama, tiny_llama_tied, tmp_path):
    for tied, model in ((False, shrink(tiny_llama)), (True, shrink(tiny_llama_tied))):
        checkpoint.save(model, tmp_path / str(tied))
        loaded = checkpoint.load(tmp_path / str(tied))
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert ("lm_head.weight" in read_tensors(tmp_path / str(tied) / WEIGHTS)) != tied


def test_shared_layer_stays_shared(tiny_bert, tmp_path):
    """One factorized layer in two places: stored once, and one parameter again after loading."""
    layers = shrink(tiny_bert).bert.encoder.layer
    layers[1].attention.self.query = layers[0].attention.self.query
    checkpoint.save(tiny_bert, tmp_path / "one")
    for loaded in (checkpoint.load(tmp_path / "one"), type(tiny_bert).from_pretrained(tmp_path / "one")):
        assert torch.equal(output(loaded), output(tiny_bert))
        first, second = (layer.attention.self.query for layer in loaded.bert.encoder.layer)
        assert first.v is second.v and first.u is second.u and first.bias is second.bias
    loaded.save_pretrained(tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_permuted_rows_are_kept(tiny_bert, tmp_path):
    """Also of a layer in two places, in another dtype, through a second saving, and in a dense copy."""
    for name, module in factorizable(tiny_bert).items():
        replace(tiny_bert, name, Monarch.from_dense(dense_weight(module), module.bias, blocks=2, rank=4,
                                                    rows=torch.randperm(module.out_features)))
    checkpoint.export_dense(tiny_bert, tmp_path / "dense")
    torch.testing.assert_close(output(type(tiny_bert).from_pretrained(tmp_path / "dense")), output(tiny_bert))
    layers = tiny_bert.bert.encoder.layer
    layers[1].attention.self.query = layers[0].attention.self.query
    checkpoint.save(tiny_bert, tmp_path / "one")
    for loaded in (checkpoint.load(tmp_path / "one"), type(tiny_bert).from_pretrained(tmp_path / "one")):
        assert torch.equal(output(loaded), output(tiny_bert))
        first, second = (layer.attention.self.query for layer in loaded.bert.encoder.layer)
        assert first.v is second.v and torch.equal(first.rows, second.rows)
    loaded.save_pretrained(tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    half = checkpoint.load(tmp_path / "two", dtype=torch.bfloat16)
    assert torch.equal(half.bert.encoder.layer[1].output.dense.rows, layers[1].output.dense.rows)


def test_sparse_layers_and_shared_dictionaries_are_kept(tiny_bert, tmp_path):
    """Masks and positions as they are, in another dtype too, through a second saving and in a dense copy; a dictionary that
    layers share is stored once and is one again."""
    made = {"query": lambda w, b: Sparse24.from_dense(w, b), "key": lambda w, b: Sparse24.from_dense(w, b, n=1, m=8),
            "value": lambda w, b: Dictionary.from_dense(w, b, atoms=8, nonzeros=2, format="positions"),
            "dense": lambda w, b: Dictionary.from_dense(w, b, atoms=8, nonzeros=4, blocks=(2, 2), dense_atoms=2)}
    for name, module in factorizable(tiny_bert).items():
        replace(tiny_bert, name, made[name.rpartition(".")[2]](dense_weight(module), module.bias))
    layers = tiny_bert.bert.encoder.layer
    layers[1].attention.self.value.d = layers[0].attention.self.value.d
    checkpoint.export_dense(tiny_bert, tmp_path / "dense")
    torch.testing.assert_close(output(type(tiny_bert).from_pretrained(tmp_path / "dense")), output(tiny_bert))
    checkpoint.save(tiny_bert, tmp_path / "one")
    stored = read_tensors(tmp_path / "one" / WEIGHTS)
    assert len([name for name in stored if name.endswith("attention.self.value.d")]) == 1
    for loaded in (checkpoint.load(tmp_path / "one"), type(tiny_bert).from_pretrained(tmp_path / "one")):
        assert_same(tiny_bert, loaded)
        first, second = (layer.attention.self.value for layer in loaded.bert.encoder.layer)
        assert first.d is second.d and first.positions.dtype == torch.int16
    loaded.save_pretrained(tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    half = checkpoint.load(tmp_path / "two", dtype=torch.bfloat16)
    for name, buffer in tiny_bert.named_buffers():
        if name.endswith((".mask", ".positions")):
            assert torch.equal(half.get_buffer(name), buffer) and half.get_buffer(name).dtype == buffer.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype, tiny_llama, tmp_path):
    model = shrink(tiny_llama.to(dtype))
    checkpoint.save(model, tmp_path / "out")
    for loaded in (checkpoint.load(tmp_path / "out"), type(model).from_pretrained(tmp_path / "out")):
        held = model.state_dict()
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == dtype and torch.equal(tensor, held[name])
    assert checkpoint.load(tmp_path / "out", dtype=torch.float32).dtype == torch.float32


def test_mixed_dtypes_are_kept(tiny_llama, tmp_path):
    """transformers gives a model one dtype; a norm kept in float32 beside bfloat16 factors must not lose bits on the way."""
    model = shrink(tiny_llama.to(torch.bfloat16))
    model.model.norm.float()
    model.model.norm.weight.data.normal_()
    checkpoint.save(model, tmp_path / "out")
    held = model.state_dict()
    for name, tensor in checkpoint.load(tmp_path / "out").state_dict().items():
        assert tensor.dtype == held[name].dtype and torch.equal(tensor, held[name])


def test_loaded_model_is_an_ordinary_float_model(tiny_bert, tmp_path):
    from transformers import Trainer, TrainingArguments
    checkpoint.save(shrink(tiny_bert), tmp_path / "out")
    for loaded in (checkpoint.load(tmp_path / "out"), type(tiny_bert).from_pretrained(tmp_path / "out")):
        assert loaded.half().dtype == torch.float16 and loaded.float().dtype == torch.float32
        assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded, "hf_quantizer")
        assert not getattr(loaded.config, "_is_quantized", False)
        Trainer(loaded, TrainingArguments(str(tmp_path / "trainer"), report_to=[], use_cpu=True))
        assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_trainer_saves_a_checkpoint(tiny_bert, tmp_path):
    """Trainer's road: save_pretrained into a folder that exists, other files written around it, twice to the same name."""
    from transformers import Trainer, TrainingArguments
    model = shrink(tiny_bert)
    data = [{"input_ids": torch.arange(6), "labels": torch.tensor(i % 3)} for i in range(4)]
    options = TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True, max_steps=2, save_steps=1)
    trainer = Trainer(model, options, train_dataset=data)
    trainer.train()
    for _ in range(2):
        trainer.save_model()
    assert_same(model.eval(), checkpoint.load(tmp_path / "out"))
    assert_same(model, checkpoint.load(tmp_path / "out" / "checkpoint-2"))
    assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").exists()
    assert (tmp_path / "out" / "training_args.bin").exists()


def test_save_pretrained_keeps_what_is_not_its_own(tiny_bert, tmp_path):
    out = tmp_path / "new" / "out"
    tiny_bert.save_pretrained(out)
    (out / "tokenizer.json").write_text("{}")
    shrink(tiny_bert).save_pretrained(out, max_shard_size="20KB")
    tiny_bert.save_pretrained(out)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", WEIGHTS, "manifest.json", "tokenizer.json"]
    assert_same(tiny_bert, checkpoint.load(out))


def test_save_over_what_was_loaded(tiny_bert, tmp_path):
    """T-save-over-self: the loaded tensors may be views of the very file that is replaced."""
    checkpoint.save(shrink(tiny_bert), tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    with torch.no_grad():
        loaded.classifier.weight.add_(1)
    due = copy.deepcopy(loaded)
    checkpoint.save(loaded, tmp_path / "out", overwrite=True)
    assert_same(due, loaded)
    assert_same(due, checkpoint.load(tmp_path / "out"))


def test_load_finds_a_model_moved_aside(tiny_bert, tmp_path):
    """The process that was replacing it died between its two renames."""
    checkpoint.save(shrink(tiny_bert), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old-999999-0123abcd")
    assert_same(tiny_bert, checkpoint.load(tmp_path / "out"))


def test_push_to_hub_uploads_our_files(tiny_bert, tmp_path, monkeypatch):
    uploaded = []

    def push_to_hub(self, repository, **options):  # saves to a folder of its own and uploads that
        self.save_pretrained(tmp_path / "hub")
        uploaded.append((repository, options))

    monkeypatch.setattr(type(tiny_bert), "push_to_hub", push_to_hub)
    shrink(tiny_bert).save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/small", commit_message="x")
    assert uploaded == [("me/small", {"max_shard_size": checkpoint.SHARD_SIZE, "commit_message": "x"})]
    assert weights(tmp_path / "out") == weights(tmp_path / "hub")


def test_opens_from_the_cache_of_the_hub(tiny_bert, tmp_path, monkeypatch):
    """There the files are links into `blobs`, and transformers fetches no manifest: the loader does, and verifies."""
    import huggingface_hub
    checkpoint.save(shrink(tiny_bert), tmp_path / "out")
    repository, revision = tmp_path / "cache" / "models--me--small", "0123456789abcdef0123456789abcdef01234567"
    for name in ("blobs", "refs", f"snapshots/{revision}"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)

    def fetch(name):
        shutil.copy(tmp_path / "out" / name, repository / "blobs" / name)
        (repository / "snapshots" / revision / name).symlink_to(f"../../blobs/{name}")

    for name in ("config.json", WEIGHTS):
        fetch(name)
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name))
        fetch(name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = type(tiny_bert).from_pretrained("me/small", cache_dir=tmp_path / "cache", local_files_only=True)
    assert asked == [("me/small", "manifest.json")]
    assert_same(tiny_bert, loaded)
    blob = bytearray((repository / "blobs" / WEIGHTS).read_bytes())
    blob[-1] ^= 1
    (repository / "blobs" / WEIGHTS).write_bytes(blob)
    with pytest.raises(IntegrityError, match=WEIGHTS):
        type(tiny_bert).from_pretrained("me/small", cache_dir=tmp_path / "cache", local_files_only=True)


def test_dense_models_are_saved_as_ever(tiny_bert, tmp_path):
    """The replaced save_pretrained touches factorized models alone, even where a config is shared with one."""
    from transformers import BertForSequenceClassification
    dense = BertForSequenceClassification(tiny_bert.config).eval()
    shrink(tiny_bert)
    dense.config = tiny_bert.config
    dense.save_pretrained(tmp_path / "dense")
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == ["config.json", "model.safetensors"]
    assert "quantization_config" not in read_json(tmp_path / "dense" / "config.json")
    assert_same(dense, BertForSequenceClassification.from_pretrained(tmp_path / "dense"))


def test_model_without_factors_can_be_saved(tiny_bert, tmp_path):
    checkpoint.save(tiny_bert, tmp_path / "out")
    assert_same(tiny_bert, checkpoint.load(tmp_path / "out"))


def test_generation_config_and_tokenizer_come_along(tiny_llama, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    model = shrink(tiny_llama)
    model.generation_config.max_new_tokens = 7
    checkpoint.save(model, tmp_path / "out", tokenizer=tokenizer)
    checkpoint.export_dense(model, tmp_path / "dense", tokenizer=tokenizer)
    for folder in (tmp_path / "out", tmp_path / "dense"):
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == {"a": 0, "b": 1}
        assert type(model).from_pretrained(folder).generation_config.max_new_tokens == 7
        assert "tokenizer.json" in storage.verify(folder)["files"]


def test_loading_changes_no_global_state(tiny_bert, tmp_path):
    checkpoint.save(shrink(tiny_bert), tmp_path / "out")
    state = torch.get_rng_state()
    checkpoint.load(tmp_path / "out")
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_arguments_are_named(tiny_bert, tmp_path):
    with pytest.raises(ArgumentError, match="model must be a transformers model, found Linear"):
        checkpoint.save(nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(ArgumentError, match="nothing: no such folder"):
        checkpoint.load(tmp_path / "nothing")
    checkpoint.save(shrink(tiny_bert), tmp_path / "out")
    with pytest.raises(ArgumentError, match="auto_class must be a transformers model class, found 'Bert'"):
        checkpoint.load(tmp_path / "out", auto_class="Bert")
    with pytest.raises(ArgumentError, match="out: exists already"):
        checkpoint.save(tiny_bert, tmp_path / "out")
    with pytest.raises(ArgumentError, match="out: exists already"):
        checkpoint.export_dense(tiny_bert, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="variant"):
        tiny_bert.save_pretrained(tmp_path / "out", variant="fp16")
    query = tiny_bert.bert.encoder.layer[0].attention.self
    query.query = LowRankGroup([query.query])
    with pytest.raises(UnsupportedError, match="query is a LowRankGroup"):
        checkpoint.save(tiny_bert, tmp_path / "group")
    tiny_bert.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedError, match="quantized with bitsandbytes"):
        checkpoint.save(tiny_bert, tmp_path / "bits")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.gpu
def test_loads_onto_a_gpu(tiny_bert, tmp_path):
    checkpoint.save(shrink(tiny_bert).cuda(), tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out", device="cuda")
    held = loaded.state_dict()
    assert all(tensor.is_cuda and torch.equal(tensor, held[name]) for name, tensor in tiny_bert.state_dict().items())
