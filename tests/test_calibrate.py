"""Statistics against their definitions, however batches, windows and folders are arranged; and the model afterwards."""
import copy
import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lowfat.calibrate import calibrate
from lowfat.errors import ArgumentError, FormatError, IntegrityError, NumericsError, UnsupportedError
from lowfat.fisher import FisherSums, label_counts
from lowfat.layers import factorizable
from lowfat.stats import Calibration, Stats

EPS32 = torch.finfo(torch.float32).eps


def text(rows=4, length=9, labels=None, lengths=None):
    batch = {"input_ids": torch.randint(1, 97, (rows, length)), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    for row, end in enumerate(lengths or []):
        batch["attention_mask"][row, end:] = 0
    if labels == "class":
        batch["labels"] = torch.randint(0, 3, (rows,))
    elif labels == "tokens":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def recorded(model, batches, name):
    """All unpadded inputs of one layer, caught by a plain hook.   [rows, k]"""
    found = []
    for batch in batches:
        mask = batch["attention_mask"].bool()
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _, args: found.append(args[0].detach().reshape(*mask.shape, -1)[mask]))
        with torch.no_grad():
            model(**batch)
        handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_gram_is_the_sum_over_unpadded_tokens(request, fixture):
    model = request.getfixturevalue(fixture)
    batches = [text(lengths=[9, 4, 1, 7]), text(rows=2), text(rows=1, length=3)]
    stats = calibrate(model, batches)
    assert set(stats) == set(factorizable(model))
    for name, seen in stats.items():
        x = recorded(model, batches, name)
        assert seen.rows == len(x) == 21 + 18 + 3 and seen.fisher_in is None and seen.samples == 0
        assert seen.gram.dtype == torch.float32
        # two summations of the same fp32 products in different order
        bound = 2 * seen.rows * EPS32 * (x.double().abs().mT @ x.double().abs())
        assert ((seen.gram.double() - x.double().mT @ x.double()).abs() <= bound).all()


def test_padding_does_not_count(tiny_llama):
    unpadded = text(rows=3, length=5)
    padded = {"input_ids": torch.nn.functional.pad(unpadded["input_ids"], (0, 4), value=7),
              "attention_mask": torch.nn.functional.pad(unpadded["attention_mask"], (0, 4))}
    name = "model.layers.1.mlp.down_proj"
    a, b = (calibrate(tiny_llama, [batch])[name] for batch in (unpadded, padded))
    assert a.rows == b.rows == 15
    assert (a.gram - b.gram).norm() <= 64 * EPS32 * a.gram.norm()  # attention over more, masked positions sums differently


def test_layers_that_read_one_input_share_one_gram(tiny_bert, tiny_llama):
    stats = calibrate(tiny_bert, [text()])
    q, k, v, o = (stats[f"bert.encoder.layer.0.attention.{part}"].gram for part in
                  ("self.query", "self.key", "self.value", "output.dense"))
    assert q is k is v and o is not q
    stats = calibrate(tiny_llama, [text()])
    assert stats["model.layers.0.mlp.gate_proj"].gram is stats["model.layers.0.mlp.up_proj"].gram
    assert len({id(seen.gram) for seen in stats.values()}) == 8


class Parallel(nn.Module):
    """Two branches of one input, one after the other; the input may be changed in place between them."""

    def __init__(self, change=False):
        super().__init__()
        self.a, self.b, self.c, self.change = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), change

    def forward(self, x):
        x = x * 2
        y = self.b(self.a(x))
        if self.change:
            x += 1
        return y + self.c(x)


class Wrapped(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_sharing_is_seen_across_other_layers_and_ends_where_the_input_is_changed():
    batch = {"x": torch.randn(5, 6)}
    stats = calibrate(Wrapped(Parallel()), [batch])
    assert stats["blocks.0.a"].gram is stats["blocks.0.c"].gram
    stats = calibrate(Wrapped(Parallel(change=True)), [batch])
    x = batch["x"] * 2 + 1
    assert (stats["blocks.0.c"].gram - x.mT @ x).abs().max() <= 10 * EPS32 * (x.abs().mT @ x.abs()).max()


def test_an_input_that_is_shared_only_at_first_is_an_error():
    block = Parallel()
    batches = [{"x": torch.randn(5, 6)} for _ in range(2)]

    class Turning(Wrapped):
        def forward(self, x):
            block.change = x is not None and bool((x == batches[1]["x"]).all())
            return super().forward(x)

    with pytest.raises(UnsupportedError, match="blocks.0.c read the input of blocks.0.a in the first batch"):
        calibrate(Turning(block), batches)


def test_a_block_used_twice_counts_both_calls():
    block = Parallel()
    model = Wrapped(block, block)
    x = torch.randn(5, 6)
    stats = calibrate(model, [{"x": x}])
    assert stats["blocks.0.a"].rows == 10 and list(stats) == ["blocks.0.a", "blocks.0.b", "blocks.0.c"]
    second = block(x).detach() * 2
    exact = 4 * x.mT @ x + second.mT @ second
    assert (stats["blocks.0.a"].gram - exact).norm() <= 20 * EPS32 * exact.norm()


# --- Fisher ---

def one_by_one(model, batches, name):
    """The definition: each sample alone through the model, its loss's gradient squared, the mean of that.   [n, k]"""
    module, squares = model.get_submodule(name), []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            alone = {key: value[row:row + 1] for key, value in batch.items()}
            model.zero_grad()
            loss = model(**alone).loss
            if loss.isfinite():  # a text without labels has none
                loss.backward()
                gradient = module.weight.grad if isinstance(module, nn.Linear) else module.weight.grad.mT
                squares.append(gradient.double().square())
    model.zero_grad()
    return torch.stack(squares).mean(0), len(squares)


@pytest.mark.parametrize("fixture, labels", [("tiny_bert", "class"), ("tiny_llama", "tokens"), ("tiny_gpt2", "tokens")])
def test_fisher_is_the_mean_of_squared_gradients_of_single_samples(request, fixture, labels):
    model = request.getfixturevalue(fixture).double()  # so that batched and single passes agree to more than they must
    batches = [text(labels=labels, lengths=[9, 5, 2, 7]), text(rows=2, labels=labels)]
    if labels == "tokens":
        batches[0]["labels"][1, 1:] = -100  # the first label has no predecessor: a sample without loss
    stats = calibrate(model, batches, fisher="elements")
    for name, seen in stats.items():
        exact, samples = one_by_one(model, batches, name)
        assert seen.samples == samples == (5 if labels == "tokens" else 6)
        bound = 32 * EPS32 * exact.max()  # squares and sums of fp32 products over at most 9 tokens and 6 samples
        assert (seen.fisher.double() - exact).abs().max() <= bound
        assert (seen.fisher_in.double() - exact.sum(0)).abs().max() <= bound * exact.shape[0]
        assert (seen.fisher_out.double() - exact.sum(1)).abs().max() <= bound * exact.shape[1]


def test_sums_are_kept_alone_unless_elements_are_wanted(tiny_bert):
    batches = [text(labels="class")]
    sums, elements = calibrate(tiny_bert, batches), calibrate(tiny_bert, batches, fisher="elements")
    for name in sums:
        assert sums[name].fisher is None
        assert torch.equal(sums[name].fisher_in, elements[name].fisher_in)
        assert torch.equal(sums[name].fisher_out, elements[name].fisher_out)
        assert torch.equal(sums[name].gram, elements[name].gram)
    assert calibrate(tiny_bert, batches, fisher=False)[name].fisher_in is None


def test_logistic_regression_has_the_fisher_information_of_the_book():
    class Logistic(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(5, 1, bias=False)})])

        def forward(self, x, labels=None):
            logits = self.blocks[0]["fc"](x)[:, 0]
            loss = None if labels is None else nn.functional.binary_cross_entropy_with_logits(logits, labels)
            return type("Output", (), {"loss": loss})

    model, x, y = Logistic().double(), torch.randn(40, 5, dtype=torch.float64), torch.randint(0, 2, (40,)).double()
    seen = calibrate(model, [{"x": x[:30], "labels": y[:30]}, {"x": x[30:], "labels": y[30:]}])["blocks.0.fc"]
    p = (x @ model.blocks[0]["fc"].weight[0]).sigmoid()
    exact = ((p - y)[:, None] * x).square().mean(0).detach()  # dL/dw = (p - y) x
    assert (seen.fisher_in - exact).abs().max() <= 40 * EPS32 * exact.max() and seen.samples == 40


def test_labels_are_shifted_inside_the_model_and_nowhere_else(tiny_llama):
    """labels=input_ids predicts the next token; shifting them before gives the Fisher information of the one after it."""
    ids = torch.randint(0, 97, (1, 8))
    stats = calibrate(tiny_llama.double(), [{"input_ids": ids, "labels": ids}], fisher="elements")
    seen = stats["model.layers.1.mlp.up_proj"]
    logits = tiny_llama(input_ids=ids).logits[0, :-1]
    nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
    exact = tiny_llama.model.layers[1].mlp.up_proj.weight.grad.square()
    assert (seen.fisher - exact).abs().max() <= 16 * EPS32 * exact.max()


def test_terms_of_the_loss_are_counted_for_each_sample(tiny_bert, tiny_llama, tiny_gpt2):
    labels = torch.tensor([[-100, 5, 6, -100], [1, -100, -100, -100], [-100, -100, -100, 2]])
    batch = {"input_ids": labels, "labels": labels}
    assert label_counts(tiny_llama, batch).tolist() == label_counts(tiny_gpt2, batch).tolist() == [2, 0, 1]
    tiny_bert.loss_type = "ForTokenClassification"
    assert label_counts(tiny_bert, batch).tolist() == [2, 1, 1]
    tiny_bert.loss_type = "ForSomethingNew"
    assert label_counts(tiny_bert, batch) is None
    assert label_counts(tiny_bert, {"input_ids": labels, "labels": torch.tensor([0, 1, 2])}).tolist() == [1, 1, 1]


def test_an_unknown_loss_is_taken_sample_by_sample(tiny_llama):
    model = tiny_llama.double()
    batches = [text(labels="tokens", lengths=[9, 5, 2, 7])]
    known = calibrate(model, batches)
    type(model).loss_type, kept = None, model.loss_type
    model.loss_type = "ForSomethingNew"
    try:
        unknown = calibrate(model, batches)
    finally:
        del type(model).loss_type
        model.loss_type = kept
    for name in known:
        assert unknown[name].samples == known[name].samples == 4
        gap = (unknown[name].fisher_in - known[name].fisher_in).abs().max()
        assert gap <= 32 * EPS32 * known[name].fisher_in.max()


def test_a_layer_called_twice_is_squared_once():  # kills: adding the squares of the calls
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4, bias=False)})])

        def forward(self, x, labels=None):
            fc = self.blocks[0]["fc"]
            y = fc(fc(x).tanh()).sum(1)
            return type("Output", (), {"loss": None if labels is None else (y - labels).square().mean()})

    model, x, y = Twice().double(), torch.randn(3, 4, dtype=torch.float64), torch.randn(3).double()
    seen = calibrate(model, [{"x": x, "labels": y}], fisher="elements")["blocks.0.fc"]
    squares = []
    for row in range(3):
        model.zero_grad()
        model(x[row:row + 1], y[row:row + 1]).loss.backward()
        squares.append(model.blocks[0]["fc"].weight.grad.square())
    exact = torch.stack(squares).mean(0)
    assert (seen.fisher - exact).abs().max() <= 16 * EPS32 * exact.max()


def test_autocast_around_the_call_does_not_round_the_sums():
    sums, x, g = FisherSums.of(nn.Linear(4, 3), elements=True), torch.rand(1, 5, 4), torch.rand(1, 5, 3)
    sums.arrived.append((x, g))
    with torch.autocast("cpu", torch.bfloat16):
        sums.add(torch.ones(1), (1, 5), "layer")
    assert torch.equal(sums.elements, (g[0].mT @ x[0]).square())


# --- the model is left as it was ---

class Trap(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_exactly_as_it_was(tiny_bert, fails):
    model = tiny_bert.train()
    model.bert.encoder.layer[1].eval()
    model.bert.embeddings.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = {name: (value.clone(), value.requires_grad, None if value.grad is None else value.grad.clone())
              for name, value in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    config, rng = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    batches = [text(labels="class") for _ in range(2)]
    torch.set_rng_state(rng)

    def progress(done, total, what):
        if fails and done == 1:
            raise Trap

    if fails:
        with pytest.raises(Trap):
            calibrate(model, batches, on_progress=progress)
    else:
        calibrate(model, batches, on_progress=progress)
    assert torch.equal(torch.get_rng_state(), rng) and model.config.to_dict() == config
    assert {name: module.training for name, module in model.named_modules()} == training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.named_parameters():
        was, required, grad = before[name]
        assert torch.equal(value, was) and value.requires_grad == required
        assert (value.grad is None) == (grad is None) and (grad is None or torch.equal(value.grad, grad))


def test_it_works_inside_no_grad_and_for_frozen_models(tiny_bert):
    batches = [text(labels="class")]
    expected = calibrate(tiny_bert, batches).fingerprint()
    tiny_bert.requires_grad_(False)
    with torch.no_grad():
        assert calibrate(tiny_bert, batches).fingerprint() == expected


# --- memory, windows, folders ---

def test_windows_and_folders_change_no_bit(tiny_bert, tmp_path):
    batches = [text(labels="class", lengths=[9, 4, 1, 7]) for _ in range(3)]
    whole = calibrate(tiny_bert, batches)
    said = []
    largest = 4 * 48 * 48 + 4 * (48 + 32)
    windowed = calibrate(tiny_bert, batches, out=tmp_path / "w", memory=largest, on_progress=lambda *a: said.append(a))
    once = calibrate(tiny_bert, (batch for batch in batches), out=tmp_path / "o")
    assert "in 6 passes" in said[0][2] and said[0][:2] == (0, 18) and said[-1][:2] == (18, 18)
    assert [done for done, _, _ in said] == list(range(19))
    whole.save(tmp_path / "s")
    loaded = Calibration.load(tmp_path / "s")
    assert all(len(list((tmp_path / folder).glob("group-*"))) == 8 for folder in "wos")  # one for each distinct input
    assert list(whole) == list(windowed) == list(once) == list(loaded)
    assert len({c.fingerprint() for c in (whole, windowed, once, loaded)}) == 1
    for name, seen in whole.items():
        for other in (windowed[name], once[name], loaded[name]):
            assert other.rows == seen.rows and other.samples == seen.samples
            assert all(torch.equal(a, b) for a, b in zip(seen.tensors().values(), other.tensors().values(), strict=True))
            assert all(t.data_ptr() % 64 == 0 for t in other.tensors().values())


def test_the_fingerprint_sees_every_part():
    def prints(**change):
        parts = {"gram": torch.eye(3), "rows": 5, "fisher_in": torch.ones(3), "fisher_out": torch.ones(2), "samples": 4}
        return Calibration({"a": Stats(**parts | change)}).fingerprint()

    others = [prints(gram=torch.eye(3) * 2), prints(rows=6), prints(fisher_in=torch.zeros(3)), prints(samples=5),
              prints(fisher_out=torch.zeros(2)), prints(fisher=torch.ones(2, 3)),
              Calibration({"b": Stats(torch.eye(3), 5, torch.ones(3), torch.ones(2), None, 4)}).fingerprint()]
    assert len({prints(), *others}) == len(others) + 1 and prints() == prints()


def test_later_windows_stop_the_forward_pass_where_they_can(tiny_llama, tmp_path):
    calls = []
    handle = tiny_llama.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    calibrate(tiny_llama, [text() for _ in range(4)], out=tmp_path / "w", memory=4 * 48 * 48)
    handle.remove()
    assert len(calls) == 1  # the look at the first batch


def test_an_interrupted_calibration_continues_with_the_same_bits(tiny_bert, tmp_path):
    batches = [text() for _ in range(3)]
    expected = calibrate(tiny_bert, batches).fingerprint()

    def stop(done, total, what):
        if done == 7:
            raise Trap

    memory = 4 * 48 * 48
    with pytest.raises(Trap):
        calibrate(tiny_bert, batches, out=tmp_path / "w", memory=memory, on_progress=stop)
    written = sorted(os.listdir(tmp_path / "w"))
    assert len(written) > 1 and "calibration.json" not in written
    with pytest.raises(FormatError, match="did not finish"):
        Calibration.load(tmp_path / "w")
    said = []
    continued = calibrate(tiny_bert, batches, out=tmp_path / "w", memory=memory, on_progress=lambda *a: said.append(a))
    assert continued.fingerprint() == expected and said[0][1] < 3 * 8
    again = calibrate(tiny_bert, batches, out=tmp_path / "w", memory=memory, on_progress=lambda *a: said.append(a))
    assert again.fingerprint() == expected and said[-1][:2] == (0, 0)
    with pytest.raises(ArgumentError, match="other layers or settings"):
        calibrate(tiny_bert, batches[:2], out=tmp_path / "w")


def test_more_than_the_memory_is_refused_without_a_folder(tiny_bert, tmp_path):
    with pytest.raises(ArgumentError, match="need .* may be used; pass out=folder"):
        calibrate(tiny_bert, [text()], memory=10_000)
    with pytest.raises(ArgumentError, match="of one layer need 9.22 kB, 9 kB may be used"):
        calibrate(tiny_bert, [text()], memory=9_000, out=tmp_path / "w")


def test_many_tokens_are_summed_in_fp64(monkeypatch):
    monkeypatch.setattr(sys.modules["lowfat.calibrate"], "_MANY_TOKENS", 1000)
    x = torch.rand(2000, 6) + 100  # in fp32, thousands of equal terms lose digits
    model = Wrapped(Parallel())
    seen = calibrate(model, [{"x": part} for part in x.split(10)])["blocks.0.a"]
    exact = (2 * x.double()).mT @ (2 * x.double())
    assert ((seen.gram.double() - exact).abs() <= EPS32 / 2 * exact.abs()).all()  # one rounding, at the end


def test_a_changed_byte_is_noticed(tiny_bert, tmp_path):
    calibrate(tiny_bert, [text()]).save(tmp_path / "s")
    path = next((tmp_path / "s").glob("group-00000*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    loaded = Calibration.load(tmp_path / "s")
    with pytest.raises(IntegrityError, match="not what was written"):
        [loaded[name] for name in loaded]


@pytest.mark.parametrize("change, says", [
    (lambda v: v.update(format=2), "needs format 1"), (lambda v: v.pop("layers"), "needs format 1 and layers"),
    (lambda v: first(v).update(file="../x.safetensors"), "not a plain name"),
    (lambda v: first(v).update(rows="5"), "rows cannot be"), (lambda v: first(v).update(extra=1), "needs name, file, rows"),
    (lambda v: v["layers"].append(first(v)), "appears twice"),
    (lambda v: first(v)["digests"].pop("gram"), "digests must be of"),
    (lambda v: first(v)["digests"].update(more="x"), "digests must be")])
def test_a_wrong_index_is_refused_by_field(tiny_bert, tmp_path, change, says):
    calibrate(tiny_bert, [text()]).save(tmp_path / "s")
    index = tmp_path / "s" / "calibration.json"
    value = json.loads(index.read_text())
    change(value)
    index.write_text(json.dumps(value))
    with pytest.raises(FormatError, match=says):
        Calibration.load(tmp_path / "s")


def first(value):
    return value["layers"][0]


# --- bad input ---

@pytest.mark.parametrize("batches, says", [
    ([], "batches: empty"), (iter([]), "batches: empty"), ([["text"]], "batch 0 is a list"), ([{}], "holds no tensor"),
    ([{"input_ids": torch.zeros(2, 3, dtype=torch.long)}, {"input_ids": torch.zeros(0, 3, dtype=torch.long)}],
     "batch 1 holds no tokens"),
    ([{"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)}], "batch 0 holds no tokens"),
    ([text(labels="class"), text()], "1 of 2 carry labels")])
def test_batches_that_cannot_work_are_refused_before_any_work(tiny_bert, batches, says):
    tiny_bert.forward = None
    with pytest.raises(ArgumentError, match=says):
        calibrate(tiny_bert, batches)


def test_fisher_without_what_it_needs_is_refused(tiny_bert, tiny_llama):
    with pytest.raises(ArgumentError, match="needs labels in the batches; they carry none"):
        calibrate(tiny_bert, [text()], fisher="sums")
    with pytest.raises(ArgumentError, match="BertModel takes no labels"):
        calibrate(tiny_bert.bert, [text(labels="class")], fisher="sums")
    assert calibrate(tiny_bert.bert, [text(labels="class")])["encoder.layer.0.output.dense"].fisher_in is None
    with pytest.raises(ArgumentError, match="fisher must be one of sums, elements"):
        calibrate(tiny_bert, [text(labels="class")], fisher="all")
    nothing = text(labels="tokens")
    nothing["labels"][:] = -100
    with pytest.raises(ArgumentError, match="no batch has a label that counts"):
        calibrate(tiny_llama, [nothing])


def test_inputs_that_are_not_finite_are_refused_by_layer(tiny_bert):
    tiny_bert.bert.embeddings.LayerNorm.bias.data[0] = float("nan")
    with pytest.raises(NumericsError, match="bert.encoder.layer.0.attention.self.query: its inputs hold NaN"):
        calibrate(tiny_bert, [text()])


def test_padding_that_cannot_be_told_apart_is_refused():
    class Mixing(Wrapped):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids.float()[:, :, None].expand(-1, -1, 6).reshape(-1, 6)[1:])

    ids = torch.ones(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    with pytest.raises(UnsupportedError, match="do not line up with the attention mask"):
        calibrate(Mixing(Parallel()), [{"input_ids": ids, "attention_mask": mask}])
    assert calibrate(Mixing(Parallel()), [{"input_ids": ids, "attention_mask": torch.ones(2, 3)}])["blocks.0.a"].rows == 5


def test_encoder_decoder_models_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        calibrate(model, [text()])


@pytest.mark.parametrize("where, says", [("missing/out", "does not exist"), ("file", "cannot be made a folder")])
def test_a_folder_that_cannot_be_is_refused(tiny_bert, tmp_path, where, says):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=says):
        calibrate(tiny_bert, [text()], out=tmp_path / where)


def test_saving_over_something_is_refused(tiny_bert, tmp_path):
    stats = calibrate(tiny_bert, [text()])
    stats.save(tmp_path / "s")
    with pytest.raises(ArgumentError, match="exists"):
        stats.save(tmp_path / "s")
    with pytest.raises(ArgumentError, match="no such folder"):
        Calibration.load(tmp_path / "t")


def test_nothing_is_kept_alive(tiny_bert):
    gc.collect()
    stats = calibrate(tiny_bert, [text(labels="class")])
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.shape == (4, 9, 32)]
    assert tensors == [] and len(stats) == 12


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from torch import nn
from lowfat.calibrate import calibrate

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8192, 8)})])})
model.forward = lambda x: model["blocks"][0]["fc"](x)
batches = [{"x": torch.randn(64, 8192)} for _ in range(2)]
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
calibrate(model, batches, out=sys.argv[1])
print((status("VmHWM") - before) / (4 * 8192**2))
"""


@pytest.mark.nightly
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads /proc")
def test_statistics_take_little_more_memory_than_was_said(tmp_path):
    """Checking and writing a Gram matrix must not copy it: a check at once took three times its size."""
    out = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "w")], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert float(out.stdout) <= 1.25


@pytest.mark.gpu
def test_a_model_on_a_gpu_gives_the_same_statistics(tiny_bert):
    batches = [text(labels="class", lengths=[9, 4, 1, 7])]
    cpu, gpu = calibrate(tiny_bert, batches), calibrate(tiny_bert.cuda(), batches)
    for name in cpu:
        for a, b in zip(cpu[name].tensors().values(), gpu[name].tensors().values(), strict=True):
            assert b.device.type == "cpu" and (a - b).norm() <= 1000 * EPS32 * a.norm()


def test_statistics_on_disk_belong_to_one_model_and_its_batches(tiny_bert, tmp_path):
    """kills: a resume that looks at counts alone, which a fine-tuned copy or other text of the same length share."""
    batches = [{"input_ids": torch.arange(12).reshape(2, 6)}]
    calibrate(tiny_bert, batches, out=tmp_path / "stats")
    with pytest.raises(ArgumentError, match="other layers or settings"):
        calibrate(tiny_bert, [{"input_ids": torch.arange(12, 24).reshape(2, 6)}], out=tmp_path / "stats")
    with torch.no_grad():
        tiny_bert.get_input_embeddings().weight.add_(1)
    with pytest.raises(ArgumentError, match="other layers or settings"):
        calibrate(tiny_bert, batches, out=tmp_path / "stats")


def test_padding_of_several_choices_is_left_out():
    from transformers import BertConfig, BertForMultipleChoice
    model = BertForMultipleChoice(BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                             intermediate_size=48, max_position_embeddings=40)).eval()
    mask = torch.ones(2, 3, 8, dtype=torch.long)
    mask[..., 4:] = 0
    stats = calibrate(model, [{"input_ids": torch.randint(97, (2, 3, 8)), "attention_mask": mask}])
    assert {one.rows for one in stats.values()} == {24}
