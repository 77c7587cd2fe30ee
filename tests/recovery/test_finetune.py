"""Fine-tuning: it learns, it is the optimizer it says it is, it repeats bit for bit, and it leaves nothing behind."""
import ast
import copy
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

import lowfat
from lowfat.data import batches
from lowfat.errors import ArgumentError, DeviceError, NumericsError
from lowfat.evaluate import embed, evaluate
from lowfat.progress import tensors_digest
from lowfat.recovery import finetune
from lowfat.recovery.objective import Objective
from tiny_text import bare_tokenizer, classifier, rows, tokenizer


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digest(model):
    return tensors_digest(model.state_dict().items())


def train(model, data=None, **changes):
    options = {"tokenizer": tokenizer(), "steps": 4, "batch_size": 4, "max_length": 12, "autocast": False} | changes
    return finetune(model, rows(10) if data is None else data, **options)


def factorized(model):
    lowfat.factorize(model, lowfat.plan(model, method="svd", ratio=0.5))
    return model


def loss_of(model, data):
    batch, = batches(data, tokenizer(), "classification", batch_size=len(data), max_length=12)
    with torch.no_grad():
        objective = Objective(model.eval(), "classification", teacher=None, temperature=1, alpha=0, autocast=False)
        return objective(**batch)["loss"]


@pytest.mark.parametrize("prepare", [lambda model: model, factorized])
def test_it_learns_the_task(tmp_path, prepare):
    model, data = prepare(classifier()), rows(32)
    before = loss_of(model, data)
    seen = []
    report = train(model, data, steps=40, batch_size=16, learning_rate=1e-2, validation=data,
                   on_progress=lambda *step: seen.append(step[:2]))
    assert loss_of(model, data) < before / 4
    assert report.validation == evaluate(model, data, tokenizer(), max_length=12) and report.validation["accuracy"] > 0.9
    assert [entry["step"] for entry in report.losses] == list(range(1, 41))
    assert seen == [(step, 40) for step in range(1, 41)]
    assert not model.training and json.loads(json.dumps(report.to_json(), allow_nan=False))["steps"] == 40
    assert not list(tmp_path.iterdir())  # no runs/, no checkpoints, no tmp_trainer


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(9)
        model = classifier()
        torch.manual_seed(100 + len(found))  # what the caller's generators hold does not matter
        train(model, seed=seed)
        found.append(digest(model))
    assert found[0] == found[1] != found[2]


def test_the_callers_generators_go_on_as_if_nothing_had_happened():
    model = classifier()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model)
    assert torch.equal(torch.rand(3), expected)


def test_the_steps_are_adamw_with_warm_up_decay_and_clipping():
    """Against a loop in plain torch: the same batches, so the same bits up to how a fused optimizer rounds."""
    data, steps, rate = rows(10), 20, 1e-2
    model = classifier()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    plain = copy.deepcopy(model).train()
    train(model, data, steps=steps, learning_rate=rate, seed=2)

    generator = torch.Generator().manual_seed(2)
    order = torch.cat([torch.randperm(10, generator=generator) for _ in range(8)]).tolist()
    no_decay = ("bias", "LayerNorm")
    groups = [{"params": [p for n, p in plain.named_parameters() if any(part in n for part in no_decay) is not decayed],
               "weight_decay": 0.01 if decayed else 0.0} for decayed in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=1e-8)
    for step in range(steps):
        factor = step / 2 if step < 2 else (steps - step) / (steps - 2)  # two steps up, eighteen down
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        used = [data[index] for index in order[4 * step:4 * step + 4]]
        batch, = batches(used, tokenizer(), "classification", max_length=12)
        labels = batch.pop("labels")
        cross_entropy(plain(**batch).logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    moved = max((a - b).abs().max().item() for a, b in zip(model.parameters(), plain.parameters()))
    # each step moves a weight by at most about its rate; a wrong schedule, decay, clip or order is off by whole steps
    assert moved < rate * 2**-10 * steps


def test_distillation_is_the_divergence_between_softened_answers():
    torch.manual_seed(1)
    student, teacher = classifier().eval(), classifier().eval()
    batch, = batches(rows(5), tokenizer(), "classification")
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits, wanted = student(**inputs).logits.double(), teacher(**inputs).logits.double()
    p = (wanted / 3).softmax(-1)
    divergence = (p * (p.log() - log_softmax(logits / 3, -1))).sum(-1).mean() * 9
    task = cross_entropy(logits, labels)
    for alpha in (0.0, 0.3, 1.0):
        objective = Objective(student, "classification", teacher=teacher, temperature=3.0, alpha=alpha, autocast=False)
        found = objective(**batch)["loss"].double()
        assert abs(found - (alpha * divergence + (1 - alpha) * task)) < 2**-20 * (1 + task)  # a few fp32 roundings
    assert not any(name.startswith("_teacher") or "teacher" in name for name, _ in objective.named_parameters())
    objective.train()
    assert not teacher.training  # a Trainer puts its model in training mode at every step


def test_the_teacher_stays_as_it_is_and_labels_are_optional_when_only_it_counts():
    student, teacher = classifier(), classifier()
    before = digest(teacher)
    unlabelled = [{"text": row["text"]} for row in rows(8)]
    teacher.train()
    train(student, unlabelled, teacher=teacher, alpha=1.0)
    assert digest(teacher) == before and teacher.training and all(p.grad is None for p in teacher.parameters())
    with pytest.raises(ArgumentError, match='no "label"'):
        train(student, unlabelled, teacher=teacher, alpha=0.9)


def test_embeddings_follow_the_teacher():
    teacher = classifier().bert
    torch.manual_seed(8)
    student = factorized(classifier()).bert  # of other random weights
    texts = [row["text"] for row in rows(16)]

    def cosine():
        with torch.no_grad():
            return torch.cosine_similarity(embed(student, tokenizer(), texts), embed(teacher, tokenizer(), texts)).mean()

    before = cosine()
    report = train(student, [{"text": text} for text in texts], teacher=teacher, steps=30, learning_rate=3e-3)
    assert report.task == "embedding" and 1 - cosine() < (1 - before) / 2


def test_a_language_model_learns_its_text(tiny_llama):
    data = [{"text": "the red cat sees a bird"}] * 8
    before = evaluate(tiny_llama, data, tokenizer(), max_length=7)
    train(tiny_llama, data, steps=30, learning_rate=1e-2, max_length=7, teacher=None)
    after = evaluate(tiny_llama, data, tokenizer(), max_length=7)
    assert after["tokens"] == before["tokens"] and after["nats_per_token"] < before["nats_per_token"] / 4


def test_half_precision_weights_train_in_fp32_and_come_back(tiny_llama):
    """A rate of 1e-4 moves a bf16 weight of 0.02 by less than its last bit; in fp32 the steps add up."""
    model = tiny_llama.bfloat16()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, rows(8), steps=20, learning_rate=1e-3)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_string_labels_become_the_models_names():
    model, data = classifier(), [row | {"label": ["yes", "no"][row["label"]]} for row in rows(8)]
    train(model, data)
    assert model.config.label2id == {"no": 0, "yes": 1} and model.config.id2label == {0: "no", 1: "yes"}
    evaluate(model, data[:1], tokenizer())  # one name alone is still the right number


@pytest.mark.parametrize("prepare", [lambda model: model, factorized])
def test_the_result_opens_again(tmp_path, prepare):
    from lowfat.job import open_model
    model = prepare(classifier())
    report = train(model, out=tmp_path / "out", save_every=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and report.resumed_from == 0
    again, tok = open_model(tmp_path / "out")
    assert digest(again) == digest(model) and tok.get_vocab() == tokenizer().get_vocab()
    assert again.config.use_cache == classifier().config.use_cache  # the Trainer would have switched it off
    with pytest.raises(ArgumentError, match="exists already"):
        train(model, out=tmp_path / "out")
    train(model, out=tmp_path / "out", overwrite=True)


def test_training_that_explodes_stops():
    model = classifier()
    with torch.no_grad():
        model.classifier.bias.fill_(math.nan)
    with pytest.raises(NumericsError, match="loss nan at step 1"):
        train(model)


@pytest.mark.parametrize("change, message", [
    ({"steps": 0}, "steps is 0"), ({"steps": -1}, "steps"), ({"steps": 2.5}, "steps is 2.5"),
    ({"batch_size": 0}, "batch_size"), ({"save_every": 0}, "save_every"), ({"learning_rate": 0}, "learning_rate"),
    ({"learning_rate": math.inf}, "learning_rate"), ({"learning_rate": math.nan}, "learning_rate is nan"),
    ({"temperature": -1.0}, "temperature"), ({"alpha": 1.1}, "alpha is 1.1"), ({"alpha": math.nan}, "alpha"),
    ({"autocast": "bf16"}, "autocast is 'bf16'"),
    ({"task": "poetry"}, "task is 'poetry'"), ({"task": "embedding"}, "teacher is missing"), ({"data": []}, "no rows"),
    ({"data": [{"text": "a"}]}, 'row 1 has no "label"'), ({"validation": [{"text": "a"}]}, 'no "label"'),
    ({"validation": [{"text": "a", "label": 2}]}, "label 2"),
    ({"validation": [{"text": "", "label": 1}], "tokenizer": bare_tokenizer()}, "row 1 has no tokens"), ({"out": "missing/out"}, "does not exist"),
    ({"max_length": 41}, "max_length is 41; BertForSequenceClassification takes 40 tokens"),
    ({"task": "lm"}, "BertForSequenceClassification is a model for classification"), ({"validation": []}, "no rows"),
])
def test_bad_arguments_are_named_before_any_work(tmp_path, change, message):
    model = classifier()
    before = digest(model)
    with pytest.raises(ArgumentError, match=message):
        train(model, **change)
    assert digest(model) == before and not list(tmp_path.iterdir())


def test_a_frozen_model_is_refused():
    with pytest.raises(ArgumentError, match="every parameter is frozen"):
        train(classifier().requires_grad_(False))


def test_a_teacher_that_does_not_fit_is_named():
    model = classifier()
    with pytest.raises(DeviceError, match="teacher is on meta, the model on cpu"):
        train(model, teacher=classifier().to("meta"))
    with pytest.raises(ArgumentError, match="teacher is the model"):
        train(model, teacher=model)
    other = tokenizer()
    other.add_tokens(["elephant"])
    with pytest.raises(ArgumentError, match="teacher_tokenizer has another vocabulary"):
        train(model, teacher=classifier(), teacher_tokenizer=other)
    for change, message in (({"vocab_size": 33}, "33 tokens"), ({"num_labels": 3}, "labels"),
                            ({"hidden_size": 64}, "hidden_size 64")):
        teacher = classifier()
        for name, value in change.items():
            setattr(teacher.config, name, value)
        with pytest.raises(ArgumentError, match=message):
            train(model, teacher=teacher, task="embedding" if "hidden_size" in change else None)


PICKLERS = ("pickle", "dill", "joblib", "shelve", "marshal")


def test_no_pickle_anywhere_in_the_package():
    """What a pickle runs when it is opened is anybody's choice: the package neither writes nor reads one."""
    package = Path(lowfat.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                found += [(path.name, name) for name in names if name.split(".")[0] in PICKLERS]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (node.value.id, node.attr) in {("torch", "load"), ("torch", "save"), ("jit", "load")}:
                    found.append((path.name, f"{node.value.id}.{node.attr}"))
            elif isinstance(node, ast.Name) and node.id in ("eval", "exec"):
                found.append((path.name, node.id))
            elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                found.append((path.name, node.arg))
    assert not found and len(list(package.rglob("*.py"))) > 20


def test_training_never_calls_the_pickling_half_of_the_trainer(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    train(classifier(), out=tmp_path / "out", save_every=1)


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit():
    found = []
    for _ in range(2):
        torch.manual_seed(9)
        model = classifier().cuda()
        report = train(model, autocast="auto")
        found.append(digest(model))
    assert report.autocast and report.device.startswith("cuda") and found[0] == found[1]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] and not torch.are_deterministic_algorithms_enabled()
