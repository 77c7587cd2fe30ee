"""MetaDistil: the teacher's gradient is the one through the student's step, and without lessons all is plain fine-tuning."""
import copy
import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import lowfat
from lowfat.data import batches
from lowfat.errors import ArgumentError
from lowfat.job import open_model
from lowfat.progress import tensors_digest
from lowfat.recovery import finetune, meta_distill
from lowfat.recovery.distillation import Distillation, read_terms
from lowfat.recovery.meta_distill import _Taught
from lowfat.recovery.objective import Objective
from tiny_text import classifier, rows, tokenizer


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digest(model):
    return tensors_digest(model.state_dict().items())


def train(model, data=None, **changes):
    options = {"tokenizer": tokenizer(), "steps": 4, "batch_size": 4, "max_length": 12, "autocast": False} | changes
    return meta_distill(model, rows(10) if data is None else data, **options)


def factorized(model):
    lowfat.factorize(model, lowfat.plan(model, method="svd", ratio=0.5))
    return model


def batch_of(data):
    found, = batches(data, tokenizer(), "classification", batch_size=len(data))
    return found


def taught(student, teacher, quiz, *, distill=None, rate=0.5, every=1, teacher_rate=1e-3):
    terms = read_terms(distill, "classification", teacher, 0.5)
    inputs = {name: value for name, value in batch_of(rows(2)).items() if name != "labels"}
    plain = Objective(student, "classification", teacher=teacher, temperature=2.0, alpha=0.7, autocast=False,
                      distillation=Distillation(terms, student, teacher, inputs, pooling=None) if terms else None)
    data = [{"input_ids": tokenizer()(row["text"])["input_ids"], "labels": row["label"]} for row in quiz]
    return _Taught(plain, data, tokenizer(), learning_rate=rate, teacher_rate=teacher_rate, every=every, batch_size=4)


def lively(model):
    """With weights large enough for the answers to depend on the words."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter *= 8
    return model.eval()


def exact_hypergradient(objective, batch, quiz):
    """By a derivative of the derivative, of the dense student."""
    student, teacher = objective.student, objective.taught
    parameters = dict(student.named_parameters())
    teacher.requires_grad_(True)
    with objective._calm():
        loss = Objective.forward(objective, **batch)["loss"]
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
        stepped = {name: parameter if gradient is None else parameter - objective._learning_rate * gradient
                   for (name, parameter), gradient in zip(parameters.items(), gradients)}
        inputs = {key: quiz[key] for key in ("input_ids", "attention_mask")}
        logits = torch.func.functional_call(student, stepped, kwargs=inputs).logits
        found = torch.autograd.grad(cross_entropy(logits, quiz["labels"]), list(teacher.parameters()), allow_unused=True)
    teacher.requires_grad_(False)
    return [torch.zeros_like(one) if gradient is None else gradient for one, gradient in zip(teacher.parameters(), found)]


@pytest.mark.parametrize("distill", [None, {"hidden": 1.0, "attention": 0.5}])
def test_the_difference_is_the_derivative_through_the_students_step(distill):
    student, teacher = lively(classifier()), lively(classifier())
    for model in (student, teacher):
        model.set_attn_implementation("eager")  # sdpa on a CPU has no second derivative, which only this test needs
    objective = taught(student, teacher, rows(12), distill=distill, rate=1e-3)
    batch, quiz = batch_of(rows(5)), batch_of(rows(12)[7:])
    expected = torch.cat([one.flatten() for one in exact_hypergradient(objective, batch, quiz)])
    found = torch.cat([one.flatten() for one in objective.hypergradient(batch, quiz)])
    # a difference over 0.01 is off by its square, and by fp32's 2^-24 over it; tenfold, for what multiplies either
    assert expected.norm() > 0 and (found - expected).norm() < 10 * (0.01**2 + 2**-24 / 0.01) * expected.norm()


def test_a_lesson_lowers_the_loss_of_the_quiz_after_the_step():
    student, teacher = factorized(lively(classifier())).eval(), lively(classifier())
    quiz_rows, rate = rows(16)[8:12], 0.05
    objective = taught(student, teacher, quiz_rows, rate=rate, teacher_rate=3e-3)
    batch, quiz = batch_of(rows(8)), batch_of(quiz_rows)

    def after_a_step():
        pupil = copy.deepcopy(student)
        loss = Objective(pupil, "classification", teacher=objective.taught, temperature=2.0, alpha=0.7,
                         autocast=False)(**batch)["loss"]
        loss.backward()
        with torch.no_grad():
            for parameter in pupil.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
            answers = pupil(input_ids=quiz["input_ids"], attention_mask=quiz["attention_mask"]).logits
            return cross_entropy(answers, quiz["labels"]).item()

    losses = [after_a_step()]
    for _ in range(5):
        objective._teach(batch, quiz)
        losses.append(after_a_step())
    assert all(later < earlier for earlier, later in zip(losses, losses[1:]))


def test_a_lesson_leaves_student_generators_and_modes_as_they_were():
    student, teacher = factorized(classifier()), classifier()
    objective = taught(student, teacher, rows(8))
    objective.train()
    student.bert.embeddings.eval()
    before, modes, state = digest(student), [one.training for one in student.modules()], torch.get_rng_state()
    of_teacher = digest(objective.taught)
    objective._teach(batch_of(rows(5)), batch_of(rows(8)[5:]))
    assert digest(student) == before and torch.equal(torch.get_rng_state(), state)
    assert [one.training for one in student.modules()] == modes and all(p.requires_grad for p in student.parameters())
    assert all(p.grad is None for p in objective.parameters())
    assert digest(objective.taught) != of_teacher and not objective.taught.training
    assert not any(p.requires_grad for p in objective.taught.parameters())


def test_without_lessons_it_is_finetuning_on_the_rows_that_are_no_quiz():
    """The first lesson comes before the first step: here it changes nothing, at a rate too small for fp32."""
    data, found = rows(10), []
    chosen = set(torch.randperm(10, generator=torch.Generator().manual_seed(3))[:2].tolist())
    for strategy in (finetune, meta_distill):
        torch.manual_seed(7)
        teacher, model = classifier(), factorized(classifier())
        options = {"tokenizer": tokenizer(), "teacher": teacher.eval(), "steps": 5, "batch_size": 4, "max_length": 12,
                   "autocast": False, "seed": 3}
        if strategy is finetune:
            strategy(model, [row for number, row in enumerate(data) if number not in chosen], **options)
        else:
            report = strategy(model, data, quiz_share=0.2, teacher_rate=1e-30, every=9, **options)
            assert (report.quiz_rows, report.lessons, report.steps) == (2, 1, 5)
        found.append(digest(model))
    assert found[0] == found[1]


def test_the_lessons_change_what_the_student_becomes_and_repeat_bit_for_bit():
    found = []
    for rate in (1e-3, 1e-3, 1e-30):
        torch.manual_seed(7)
        teacher, model = classifier(), factorized(classifier())
        before = digest(teacher)
        report = train(model, teacher=teacher, teacher_rate=rate, steps=5, every=2, validation=rows(4))
        assert digest(teacher) == before and all(p.grad is None for p in teacher.parameters())
        assert report.lessons == 3 and json.loads(json.dumps(report.to_json(), allow_nan=False))["quiz_rows"] == 1
        found.append(digest(model))
    assert found[0] == found[1] != found[2]


def test_lessons_go_on_where_the_student_follows_no_teacher_any_more():
    terms = {"logits": {"weight": 1.0, "until": 0.5}}
    assert train(classifier(), teacher=classifier(), steps=4, distill=terms).lessons == 4


def test_the_result_is_the_student_alone(tmp_path):
    model = factorized(classifier())
    train(model, teacher=classifier(), out=tmp_path / "out", save_every=2)
    again, _ = open_model(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and digest(again) == digest(model)


def test_the_training_state_has_the_teacher_its_moments_and_the_steps():
    from lowfat.recovery.training_state import model_tensors

    objective = taught(classifier(), classifier(), rows(8))
    names = model_tensors(objective).keys()
    count = len(list(objective.taught.parameters()))
    assert sum(name.startswith("model.taught.") for name in names) == count
    assert sum(name.startswith("model.moments.exp_avg") for name in names) == 2 * count and "model.steps" in names
    objective.train()
    objective(**batch_of(rows(4)))
    state = model_tensors(objective)
    assert state["model.steps"] == 1 and state["model.moments.step_0"] == 1
    assert any(state[name].abs().max() > 0 for name in names if name.startswith("model.moments.exp_avg_sq"))


def test_language_models_and_half_precision(tiny_llama):
    teacher = copy.deepcopy(tiny_llama).bfloat16()
    model = factorized(tiny_llama).bfloat16()
    before = digest(model)
    train(model, [{"text": row["text"]} for row in rows(10)], teacher=teacher, learning_rate=1e-3, autocast=True)
    assert digest(model) != before and all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("change, message", [
    ({"teacher": None}, "teacher is missing"), ({"quiz_share": 0.0}, "quiz_share is 0.0"),
    ({"quiz_share": 1.0}, "quiz_share is 1.0"),
    ({"quiz_share": math.nan}, "quiz_share is nan"), ({"quiz_share": 0.99}, "of 10 examples that leaves none to train on"),
    ({"every": 0}, "every is 0"), ({"teacher_rate": 0.0}, "teacher_rate is 0.0"), ({"steps": 0}, "steps is 0"),
    ({"alpha": 1.0}, "the labels have weight 0"), ({"alpha": 0.0}, "the teacher has weight 0"),
    ({"distill": {"task": 0}}, "the labels have weight 0"), ({"distill": {"logits": 0}}, "the teacher has weight 0"),
    ({"task": "embedding"}, "meta_distill needs labels"), ({"data": [{"text": "a"}] * 4}, 'row 1 has no "label"'),
])
def test_bad_arguments_are_named_before_any_work(tmp_path, change, message):
    model, teacher = classifier(), classifier()
    before = digest(model), digest(teacher)
    with pytest.raises(ArgumentError, match=message):
        train(model, **({"teacher": teacher, "out": tmp_path / "out"} | change))
    assert (digest(model), digest(teacher)) == before and not list(tmp_path.iterdir())
