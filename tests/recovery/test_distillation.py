"""Distillation of what a model computes on the way: each term against its formula, what it must not see, what it refuses."""
import copy
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cosine_similarity, mse_loss

import lowfat
from lowfat.data import batches
from lowfat.errors import ArgumentError
from lowfat.job import open_model
from lowfat.progress import tensors_digest
from lowfat.recovery import (block_movement, finetune, isp, learned_ranks, lpaf, mixed_rank, staged, straight_through,
                             theseus)
from lowfat.recovery.distillation import TERMS, Distillation, paired, read_terms, spelled
from lowfat.recovery.internals import Internals, overheard
from lowfat.recovery.objective import Objective
from tiny_text import classifier, last_token_classifier, rows, tokenizer


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digest(model):
    return tensors_digest(model.state_dict().items())


def deep_classifier(*, layers=4, width=48, heads=2, labels=2):
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(
        vocab_size=32, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=48,
        max_position_embeddings=40, num_labels=labels)).eval()


def tiny_model(kind, attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = {"bert": classifier, "gpt2": last_token_classifier, "llama": lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=40, tie_word_embeddings=False))}[kind]().eval()
    model.config.pad_token_id = 0
    model.set_attn_implementation(attention)
    return model


def train(model, data=None, **changes):
    options = {"tokenizer": tokenizer(), "steps": 4, "batch_size": 4, "max_length": 12, "autocast": False} | changes
    return finetune(model, rows(10) if data is None else data, **options)


def factorized(model, ratio=0.5):
    lowfat.factorize(model, lowfat.plan(model, method="svd", ratio=ratio))
    return model


def batch_of(count, task="classification", **changes):
    found, = batches(rows(count), tokenizer(), task, batch_size=count, **changes)
    return found


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


# ------------------------------------------------------------------------------------------------ what is heard

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("prepare", [lambda model: model, factorized])
def test_hidden_states_and_scores_are_those_that_transformers_reports(kind, attention, prepare):
    model, batch = prepare(tiny_model(kind, attention)), inputs(batch_of(5))
    with torch.no_grad():
        before = model(**batch).logits
        with overheard(model) as heard:
            assert torch.equal(model(**batch).logits, before)
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        reported = eager(**batch, output_hidden_states=True, output_attentions=True)
    real = batch["attention_mask"].bool()
    both = (real[:, :, None] & real[:, None, :])[:, None]
    close = 2**-18  # of sdpa's own order of additions; eager is compared exactly
    for number, states in enumerate(reported.hidden_states):
        difference = (heard.hidden[number] - states)[real].abs().max().item()
        assert difference <= (0 if attention == "eager" else close * states[real].abs().max().item()), number
    for number, shares in enumerate(reported.attentions, 1):
        one = heard.attention[number]
        assert one.is_causal is (kind != "bert") and one.heads == shares.shape[1]
        seen = both.tril() if one.is_causal else both
        found = one.scores().masked_fill(~seen, -math.inf).softmax(-1)
        assert (found - shares)[real[:, None].expand(-1, one.heads, -1)].abs().max() <= close


def test_listening_leaves_nothing_behind():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = factorized(classifier()).eval()
    before, mapping = str(vars(model.bert)), dict(vars(ALL_ATTENTION_FUNCTIONS))
    with pytest.raises(RuntimeError, match="on purpose"), overheard(model):
        model(**inputs(batch_of(2)))
        raise RuntimeError("on purpose")
    assert vars(ALL_ATTENTION_FUNCTIONS) == mapping and str(vars(model.bert)) == before
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_two_models_are_not_mixed_up():
    """A model that runs while another is listened to says nothing."""
    one, other, batch = classifier().eval(), classifier().eval(), inputs(batch_of(3))
    with torch.no_grad(), overheard(one) as heard:
        other(**batch)
        assert not heard.hidden and not heard.attention
        with overheard(other) as inner:
            other(**batch)
        one(**batch)
    assert len(heard.hidden) == len(inner.hidden) == 3 and not torch.equal(heard.hidden[2], inner.hidden[2])
    assert not torch.equal(heard.attention[1].queries, inner.attention[1].queries)


def test_grouped_blocks_stay_grouped_and_are_heard(monkeypatch):
    """Hooks on q, k or v would have the block call them one by one."""
    from lowfat import blocks

    model = factorized(tiny_model("llama", "sdpa"))
    calls, original = [], blocks.low_rank_group
    monkeypatch.setattr(blocks, "low_rank_group", lambda *args: calls.append(1) or original(*args))
    with torch.no_grad(), overheard(model) as heard:
        model(**inputs(batch_of(3)))
    assert len(calls) == 2 and set(heard.attention) == {1, 2}


# ------------------------------------------------------------------------------------------------ the terms

def random_internals(widths, *, batch=3, length=6, heads=2, is_causal=False):
    from lowfat.recovery.internals import Attention

    hidden = {number: torch.randn(batch, length, width) for number, width in enumerate(widths)}
    attention = {number: Attention(*torch.randn(2, batch, heads, length, 4), 0.5, is_causal)
                 for number in range(1, len(widths))}
    return Internals(hidden, attention)


def mask_of(*lengths, length=None):
    return (torch.arange(length or max(lengths)) < torch.tensor(lengths)[:, None]).long()


def loss_of(distill, ours, theirs, mask, task="classification", pooling=None):
    """Of internals that no model made."""
    terms = read_terms(distill, task, object(), 0.5)
    found = Distillation.__new__(Distillation)
    torch.nn.Module.__init__(found)
    counts = len(ours.hidden) - 1, len(theirs.hidden) - 1
    found.terms, found.pooling, found.projections, found.progress = terms, pooling, torch.nn.ModuleDict(), 0.0
    found.used = list(terms)
    found.pairs = {name: paired(term["layers"], *counts, first=TERMS[name].first) for name, term in terms.items()}
    return found(ours, theirs, mask)


def test_hidden_and_attention_are_tinyberts_means_over_what_is_no_padding():
    mask = mask_of(6, 2, 4)
    for is_causal in (False, True):
        ours, theirs = (random_internals([5, 5, 5], is_causal=is_causal) for _ in range(2))
        expected, count = 0.0, 0
        for number in range(3):
            squares = [(ours.hidden[number][b, :n] - theirs.hidden[number][b, :n]).square() for b, n in enumerate((6, 2, 4))]
            expected += torch.cat([one.flatten() for one in squares]).mean()
        assert torch.allclose(loss_of({"hidden": 2.0}, ours, theirs, mask), 2 * expected, rtol=1e-6)
        expected = 0.0
        for number in (1, 2):
            squares = []
            for b, n in enumerate((6, 2, 4)):
                one, other = (heard.attention[number].queries[b] @ heard.attention[number].keys[b].mT * 0.5
                              for heard in (ours, theirs))
                for i in range(n):
                    squares += [(one - other)[:, i, j].square() for j in range(i + 1 if is_causal else n)]
            expected += torch.stack(squares).mean()
        assert torch.allclose(loss_of({"attention": 3.0}, ours, theirs, mask), 3 * expected, rtol=1e-6)


def test_cls_is_patient_kds_distance_of_normalized_vectors():
    mask, ours, theirs = mask_of(6, 2, 4), random_internals([5, 5, 5]), random_internals([5, 5, 5])

    def expected(vector, numbers=(1,)):
        return sum((vector(ours.hidden[n]) / vector(ours.hidden[n]).norm(dim=-1, keepdim=True)
                    - vector(theirs.hidden[n]) / vector(theirs.hidden[n]).norm(dim=-1, keepdim=True)).square().sum(-1).mean()
                   for n in numbers)

    first, last = (lambda states: states[:, 0]), (lambda states: states[torch.arange(3), torch.tensor([5, 1, 3])])
    assert torch.allclose(loss_of({"cls": 1}, ours, theirs, mask), expected(first))  # the last layer is left out
    every = {"cls": {"weight": 1, "layers": "uniform"}}
    assert torch.allclose(loss_of(every, ours, theirs, mask), expected(first, (1, 2)))
    mean = (lambda states: torch.stack([states[b, :n].mean(0) for b, n in enumerate((6, 2, 4))]))
    assert torch.allclose(loss_of({"cls": 1}, ours, theirs, mask, "embedding", "mean"), expected(mean), rtol=1e-5)
    for heard in (ours, theirs):
        for one in heard.attention.values():
            one.is_causal = True  # the last token that is no padding has read the text
    assert torch.allclose(loss_of({"cls": 1}, ours, theirs, mask), expected(last))


def test_cosine_is_distilberts():
    mask, ours, theirs = mask_of(6, 2, 4), random_internals([5, 5, 5]), random_internals([5, 5, 5])
    expected = 1 - torch.cat([cosine_similarity(ours.hidden[2][b, :n], theirs.hidden[2][b, :n], dim=-1)
                              for b, n in enumerate((6, 2, 4))]).mean()
    assert torch.allclose(loss_of({"cosine": 1}, ours, theirs, mask), expected, rtol=1e-6)


def relations_by_hand(ours, theirs, lengths, window, triples, between):
    """Loops over every pair and triple."""
    def huber(one, other):
        found = (torch.stack(one) - torch.stack(other)).abs()
        return torch.where(found < 1, found.square() / 2, found - 0.5).mean() if len(one) else 0.0

    def related(sets):
        distances, angles = [], []
        for points, near in sets:
            for j in range(len(points)):
                others = [i for i in range(len(points)) if i != j and near(i, j)]
                distances += [(points[i] - points[j]).norm() for i in others]
                angles += [cosine_similarity(points[i] - points[j], points[k] - points[j], dim=0)
                           for i in others for k in others if i != k]
        mean = torch.stack(distances).mean()
        return [one / mean for one in distances], angles

    def difference(one, other):
        one, other = related(one), related(other)
        return huber(one[0], other[0]) + triples * (huber(one[1], other[1]) if one[1] else 0.0)

    def tokens(heard, number):
        return [(heard.hidden[number][b, :n], lambda i, j: abs(i - j) <= window) for b, n in enumerate(lengths)]

    def layers(heard):
        return [(torch.stack([heard.hidden[number][b, t] for number in range(3)]), lambda i, j: True)
                for b, n in enumerate(lengths) for t in range(n)]

    return (sum(difference(tokens(ours, number), tokens(theirs, number)) for number in range(3))
            + between * difference(layers(ours), layers(theirs)))


@pytest.mark.parametrize("window, triples, between", [(1, 1.0, 1.0), (2, 0.5, 0.0), (9, 0.0, 2.0), (3, 2.0, 0.5)])
def test_relations_are_those_of_every_pair_and_triple(window, triples, between):
    mask, ours, theirs = mask_of(6, 2, 4), random_internals([5, 5, 5]), random_internals([7, 7, 7])  # of any widths
    term = {"relations": {"weight": 1.0, "window": window, "triples": triples, "between": between}}
    expected = relations_by_hand(ours, theirs, (6, 2, 4), window, triples, between)
    assert torch.allclose(loss_of(term, ours, theirs, mask), expected, rtol=1e-4)


def test_relations_do_not_change_when_all_points_are_turned_moved_and_scaled():
    """Which is why they need no projection; hidden states do."""
    ours, mask = random_internals([5, 5, 5]), mask_of(6, 2, 4)
    turn, _ = torch.linalg.qr(torch.randn(8, 5))
    moved = Internals({number: 3 * states @ turn.mT + 1 for number, states in ours.hidden.items()}, ours.attention)
    assert loss_of({"relations": 1}, moved, ours, mask) < 1e-9
    other = Internals({number: states.flip(1) for number, states in ours.hidden.items()}, ours.attention)
    assert loss_of({"relations": 1}, other, ours, mask) > 0.1


def test_relations_of_texts_of_one_token_and_of_equal_tokens_are_numbers():
    ours, theirs = (random_internals([5, 5, 5], batch=2, length=3) for _ in range(2))
    term = {"relations": {"weight": 1, "between": 0.0}}
    assert loss_of(term, ours, theirs, mask_of(1, 1, length=3)) == 0
    equal = Internals({number: torch.ones(2, 3, 5, requires_grad=True) for number in range(3)}, ours.attention)
    loss = loss_of({"relations": 1}, equal, theirs, mask_of(3, 2, length=3))
    loss.backward()
    assert loss.isfinite() and all(states.grad.isfinite().all() for states in equal.hidden.values())


ALL = {"hidden": 1.0, "attention": 1.0, "cls": 1.0, "relations": 1.0, "cosine": 1.0}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_no_term_sees_padding(kind):
    """The same rows with more padding behind them: the same loss."""
    student, teacher, batch = tiny_model(kind, "sdpa"), tiny_model(kind, "sdpa"), inputs(batch_of(5))
    task = "lm" if kind == "llama" else "classification"
    distill = {name: 1.0 for name in ALL if task != "lm" or name != "cls"} | {"task": 0, "logits": 0}
    made = Distillation(read_terms(distill, task, teacher, 0.5), student, teacher, batch, pooling=None)
    objective = Objective(student, task, teacher=teacher, temperature=1.0, alpha=1.0, autocast=False, distillation=made)
    longer = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
    found, again = objective(**batch)["loss"], objective(**longer)["loss"]
    assert found > 0.1 and abs(found - again) < 1e-5 * found


def test_a_teacher_that_is_the_student_costs_nothing_and_a_factorized_one_does():
    teacher, batch = classifier().eval(), batch_of(5)
    with torch.no_grad():
        for layer in teacher.bert.encoder.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight *= 10  # new ones hardly change what comes in
    for student, is_equal in ((copy.deepcopy(teacher), True), (factorized(copy.deepcopy(teacher)), False)):
        for name in ALL:
            terms = read_terms({name: 1.0}, "classification", teacher, 0.5)
            distillation = Distillation(terms, student, teacher, inputs(batch), pooling=None)
            with torch.no_grad():
                with overheard(student) as ours:
                    student(**inputs(batch))
                with overheard(teacher) as theirs:
                    teacher(**inputs(batch))
            loss = distillation(ours, theirs, batch["attention_mask"])
            assert loss.abs() < 1e-6 if is_equal else loss > 1e-3, name


# ------------------------------------------------------------------------------------------------ layers

def test_maps_of_layers():
    assert paired("uniform", 4, 12, 1) == [(1, 3), (2, 6), (3, 9), (4, 12)]  # TinyBERT's g(i) = 3 i
    assert paired("uniform", 2, 2, 0) == [(0, 0), (1, 1), (2, 2)]
    assert paired("skip", 6, 12, 0) == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]  # patient KD's
    assert paired("uniform", 4, 6, 1) == [(1, 2), (2, 3), (3, 5), (4, 6)]
    assert paired("uniform", 3, 2, 1) == [(1, 1), (2, 2), (3, 2)]
    assert paired("last", 4, 6, 0) == [(4, 6)] and paired([[1, 2], [0, 0]], 4, 6, 0) == [(1, 2), (0, 0)]


def test_widths_that_differ_have_a_learned_projection_that_the_saved_model_has_not(tmp_path, monkeypatch):
    student, teacher, seen = classifier(), deep_classifier(), []
    distill = {"hidden": 1.0, "attention": 0.5, "relations": {"weight": 1.0, "layers": "last", "between": 0.0}}

    module = sys.modules["lowfat.recovery.finetune"]
    monkeypatch.setattr(module, "train_phase", lambda objective, *args, original=module.train_phase, **options: (
        seen.append(objective) or original(objective, *args, **options)))
    train(student, rows(16), teacher=teacher, steps=20, learning_rate=3e-3, distill=distill, out=tmp_path / "out")
    objective, = seen
    names = [name for name, _ in objective.named_parameters() if not name.startswith("student.")]
    assert names == ["distillation.projections.entering.weight", "distillation.projections.hidden.weight"]
    torch.manual_seed(0)
    start = torch.nn.Linear(32, 48, bias=False).weight
    assert not torch.equal(objective.distillation.projections["entering"].weight, start)
    again, _ = open_model(tmp_path / "out")
    assert again.state_dict().keys() == classifier().state_dict().keys() and digest(again) == digest(student)


def test_the_projection_starts_the_same_whatever_the_generator_holds():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        student, teacher = classifier(), deep_classifier()
        before = torch.get_rng_state()
        made = Distillation(read_terms({"hidden": 1}, "classification", teacher, 0.5), student, teacher, inputs(batch_of(2)),
                            pooling=None)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(made.projections["hidden"].weight)
    assert torch.equal(*found) and found[0].shape == (48, 32)


# ------------------------------------------------------------------------------------------------ in training

@pytest.mark.parametrize("distill", [{name: weight} for name, weight in ALL.items()])
def test_each_term_brings_the_student_closer(distill):
    teacher = classifier().eval()
    torch.manual_seed(4)
    student, data = factorized(classifier()), rows(16)
    report = train(student, data, teacher=teacher, steps=30, batch_size=16, learning_rate=3e-3,
                   distill=distill | {"task": 0, "logits": 0})
    first, last = (sum(entry["loss"] for entry in part) for part in (report.losses[:5], report.losses[-5:]))
    assert last < 0.8 * first


def test_terms_add_to_the_loss_of_before_and_weights_of_the_answers_take_the_place_of_alpha():
    student, teacher, batch = classifier().eval(), classifier().eval(), batch_of(5)

    def loss(distill, alpha=0.3):
        terms = read_terms(distill, "classification", teacher, 0.5)
        made = Distillation(terms, student, teacher, inputs(batch), pooling=None) if terms else None
        with torch.no_grad():
            return Objective(student, "classification", teacher=teacher, temperature=2.0, alpha=alpha, autocast=False,
                             distillation=made)(**batch)["loss"].item()

    task, logits = loss(None, 0.0), loss(None, 1.0)
    hidden = loss({"hidden": 1, "task": 0, "logits": 0})
    cosine = loss({"cosine": 1, "task": 0, "logits": 0})
    assert min(task, logits, hidden, cosine) > 1e-4
    assert loss({"hidden": 2, "cosine": 0.5}) == pytest.approx(0.3 * logits + 0.7 * task + 2 * hidden + cosine / 2, rel=1e-6)
    assert loss({"task": 3, "logits": 5, "cosine": 1}) == pytest.approx(5 * logits + 3 * task + cosine, rel=1e-6)
    assert loss({"hidden": 0}) == loss(None)


def test_weights_of_zero_are_plain_finetuning_bit_for_bit():
    found = []
    for distill in (None, {}, {"hidden": 0.0, "attention": 0}):
        torch.manual_seed(3)
        teacher, student = classifier(), classifier()
        train(student, teacher=teacher, distill=distill)
        found.append(digest(student))
    assert found[0] == found[1] == found[2]
    torch.manual_seed(3)
    teacher, student = classifier(), classifier()
    train(student, teacher=teacher, distill={"hidden": 0.1})
    assert digest(student) != found[0]


def test_terms_count_in_their_part_of_the_run_and_no_longer(tmp_path):
    """TinyBERT's order, first what is on the way and then the answers, in one run: as in two."""
    hidden, answers, found = {"hidden": 1.0, "task": 0, "logits": 0}, {"task": 0, "logits": 1.0}, []
    both = {"hidden": {"weight": 1.0, "until": 0.5}, "task": 0, "logits": {"weight": 1.0, "from": 0.5}}
    for distill in (both, hidden, answers):
        torch.manual_seed(3)
        teacher, student = classifier(), classifier()
        found.append(train(student, teacher=teacher, distill=distill, steps=8).losses)
    each, early, late = ([entry["loss"] for entry in losses] for losses in found)
    assert each[:4] == early[:4] and len(each) == 8
    # the fifth loss is of the answers of a student that has learned of the hidden states alone
    assert all(abs(a - b) > 1e-4 for a, b in zip(each[4:], early[4:])) and abs(each[4] - late[0]) < abs(each[4] - early[3])
    with pytest.raises(ArgumentError, match="from 0 of the steps on every weight is 0"):  # alpha leaves none to the task
        train(classifier(), teacher=classifier(), alpha=1.0, distill={"logits": {"weight": 1, "from": 0.5}})
    with pytest.raises(ArgumentError, match="staged compares losses"):
        staged(classifier(), rows(10), tokenizer=tokenizer(), teacher=classifier(), distill=both, steps=8)


def test_the_clock_runs_on_through_the_phases_of_a_run(monkeypatch):
    seen, counting = [], Distillation.counting
    monkeypatch.setattr(Distillation, "counting", lambda self: seen.append(self.progress) or counting(self))
    straight_through(classifier(), rows(10), tokenizer=tokenizer(), teacher=classifier(), distill={"hidden": 1.0}, steps=5,
                     every=2, freeze=0.4, fade=0.2, batch_size=4, max_length=12, autocast=False)
    assert sorted(set(seen)) == [0.0, 0.2, 0.4, 0.6, 0.8]


def test_the_teacher_stays_as_it_is():
    student, teacher = classifier(), classifier()
    before = digest(teacher)
    train(student, teacher=teacher, distill=ALL)
    assert digest(teacher) == before and all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_labels_are_not_needed_where_they_have_no_weight():
    unlabelled = [{"text": row["text"]} for row in rows(8)]
    train(classifier(), unlabelled, teacher=classifier(), distill={"hidden": 1, "task": 0})
    with pytest.raises(ArgumentError, match='no "label"'):
        train(classifier(), unlabelled, teacher=classifier(), alpha=1.0, distill={"hidden": 1, "task": 0.1})


def test_embeddings_and_language_models(tiny_llama):
    torch.manual_seed(5)
    teacher, student = classifier().bert, factorized(classifier()).bert
    texts = [{"text": row["text"]} for row in rows(8)]
    report = train(student, texts, teacher=teacher, distill={name: 1 for name in ALL} | {"embedding": 2.0}, steps=2)
    assert report.task == "embedding"
    teacher = copy.deepcopy(tiny_llama)
    before = digest(factorized(tiny_llama))
    train(tiny_llama, texts, teacher=teacher, distill={"hidden": 1, "attention": 1, "relations": 1}, steps=2)
    assert digest(tiny_llama) != before


@pytest.mark.parametrize(("strategy", "options"), [
    (staged, {}), (straight_through, {"every": 2}), (mixed_rank, {}), (theseus, {}), (lpaf, {}), (learned_ranks, {}),
    (isp, {"rounds": 2}), (block_movement, {})])
def test_every_strategy_follows_too(strategy, options):
    found = []
    for distill in (None, {"hidden": 1.0}):
        torch.manual_seed(3)
        teacher, model = classifier(), classifier()
        strategy(model, rows(10), tokenizer=tokenizer(), teacher=teacher, distill=distill, batch_size=4, max_length=12,
                 autocast=False, steps=8, **options)
        found.append(digest(model))
        assert all("projection" not in name for name in model.state_dict())
    assert found[0] != found[1]


def test_half_precision_models():
    student, teacher = classifier().bfloat16(), classifier().bfloat16()
    train(student, teacher=teacher, distill=ALL, autocast=True)
    assert all(p.dtype == torch.bfloat16 for p in student.parameters())


def test_blank_answers_cost_what_the_teacher_weighs():
    """staged() compares losses with those of a model that knows nothing: it computes zeros on the way, too."""
    student, teacher, batch = classifier().eval(), classifier().eval(), batch_of(5)
    terms = read_terms({"hidden": 1, "cosine": 1, "task": 0, "logits": 0}, "classification", teacher, 0.5)
    objective = Objective(student, "classification", teacher=teacher, temperature=2.0, alpha=0.5, autocast=False,
                          distillation=Distillation(terms, student, teacher, inputs(batch), pooling=None))
    with torch.no_grad(), overheard(teacher) as heard:
        teacher(**inputs(batch))
    real = batch["attention_mask"].bool()
    expected = sum(mse_loss(torch.zeros_like(one[real]), one[real]) for one in heard.hidden.values()) + 1
    assert torch.allclose(objective.blank_loss(**batch), expected)


# ------------------------------------------------------------------------------------------------ what is refused

@pytest.mark.parametrize("distill, message", [
    ({"hiden": 1}, "has 'hiden'; for classification needs one of hidden, attention, cls, relations, cosine, task, logits"),
    ({"embedding": 1}, "distill has 'embedding'"), ("hidden=1", "distill is 'hidden=1'; needs weights by name"),
    ({"hidden": -1}, "hidden has weight -1"), ({"hidden": math.nan}, "hidden has weight nan"),
    ({"hidden": True}, "hidden has weight True"), ({"hidden": "1"}, "hidden has weight '1'"),
    ({"hidden": {"layers": "last"}}, "hidden has no weight"),
    ({"hidden": {"weight": 1, "window": 3}}, "hidden has no option 'window'; it has weight, from, until, layers"),
    ({"relations": {"weight": 1, "window": 0}}, "relations has window 0"),
    ({"relations": {"weight": 1, "between": -1.0}}, "relations has between -1.0"),
    ({"relations": {"weight": 1, "layers": "last"}}, "relations between layers need two or more"),
    ({"hidden": {"weight": 1, "layers": "first"}}, "hidden has layers 'first'; needs uniform, skip, last"),
    ({"hidden": {"weight": 1, "layers": [1, 2]}}, r"hidden has layers \[1, 2\]"),
    ({"hidden": {"weight": 1, "layers": [[1, 3]]}}, "hidden pairs layer 1 with 3; the model has 0 to 2, the teacher 0 to 2"),
    ({"attention": {"weight": 1, "layers": [[0, 1]]}}, "attention pairs layer 0 with 1; the model has 1 to 2"),
    ({"hidden": 0, "task": 0, "logits": 0}, "from 0 of the steps on every weight is 0"),
    ({"hidden": {"weight": 1, "until": 0.5}, "task": 0, "logits": {"weight": 1, "from": 0.6}}, "from 0.5 of the steps on"),
    ({"hidden": {"weight": 1, "until": 0.5}, "task": 0, "logits": 0}, "from 0.5 of the steps on"),
    ({"hidden": {"weight": 1, "from": 0.5, "until": 0.5}}, "hidden counts from 0.5 until 0.5"),
    ({"hidden": {"weight": 1, "until": 2}}, "hidden counts from 0.0 until 2"),
])
def test_wrong_terms_are_named_before_any_work(tmp_path, distill, message):
    model = classifier()
    before = digest(model)
    with pytest.raises(ArgumentError, match=message):
        train(model, teacher=classifier(), distill=distill, out=tmp_path / "out")
    assert digest(model) == before and not list(tmp_path.iterdir())


def test_a_model_and_a_teacher_that_a_term_does_not_fit_are_named(tiny_llama):
    with pytest.raises(ArgumentError, match=r"distill \(hidden\) has no teacher"):
        train(classifier(), distill={"hidden": 1})
    for name in ("cls", "cosine"):
        with pytest.raises(ArgumentError, match=f"{name}: the hidden states of the model are 32 wide, the teacher's 48"):
            train(classifier(), teacher=deep_classifier(), distill={name: 1})
    with pytest.raises(ArgumentError, match="layer 1 of the model has 2 heads, layer 2 of the teacher 4"):
        train(classifier(), teacher=deep_classifier(heads=4), distill={"attention": 1})
    with pytest.raises(ArgumentError, match="cls with layers 'skip' is left without one; the model has 1"):
        train(deep_classifier(layers=1), teacher=deep_classifier(), distill={"cls": 1})
    with pytest.raises(ArgumentError, match="cls needs one vector that stands for the text"):
        train(tiny_llama, teacher=copy.deepcopy(tiny_llama), distill={"cls": 1})
    model = classifier()
    model.bert.encoder.layer[1].gradient_checkpointing = True
    with pytest.raises(ArgumentError, match="the model has gradient checkpointing on"):
        train(model, teacher=classifier(), distill={"hidden": 1})


def test_a_model_without_a_list_of_layers_or_transformers_attention_is_named():
    from transformers import AlbertConfig, AlbertForSequenceClassification, BloomConfig, BloomForSequenceClassification

    albert = AlbertForSequenceClassification(AlbertConfig(
        vocab_size=32, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40))
    with pytest.raises(ArgumentError, match="AlbertForSequenceClassification has no list of its 2 layers"):
        train(albert, teacher=copy.deepcopy(albert), distill={"hidden": 1})
    bloom = BloomForSequenceClassification(BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0))
    with pytest.raises(ArgumentError, match="layer 1 of the model does not go through transformers' attention interface"):
        train(bloom, teacher=copy.deepcopy(bloom), distill={"attention": 1})
    with pytest.raises(ArgumentError, match="cls: attention does not go through transformers' interface"):
        train(bloom, teacher=copy.deepcopy(bloom), distill={"cls": 1})
    train(bloom, teacher=copy.deepcopy(bloom).eval(), distill={"hidden": 1, "relations": 1}, steps=1)


def test_a_resumed_run_must_have_the_same_terms(tmp_path):
    from lowfat.recovery.training import _fingerprint, prepared

    def fingerprint(distill):
        torch.manual_seed(1)
        objective, data = prepared(classifier(), rows(4), tokenizer=tokenizer(), task=None, teacher=classifier(),
                                   teacher_tokenizer=None, validation=None, max_length=12, temperature=1.0, alpha=0.5,
                                   autocast=False, distill=distill)
        return json.loads(json.dumps(_fingerprint(objective, data, {})))

    plain = fingerprint(None)
    assert "distill" not in plain and fingerprint({"hidden": 1}) == plain | {
        "distill": {"hidden": {"layers": "uniform", "weight": 1, "from": 0.0, "until": 1.0}}}
    assert fingerprint({"hidden": {"weight": 1, "layers": [(1, 2)]}})["distill"]["hidden"]["layers"] == [[1, 2]]


# ------------------------------------------------------------------------------------------------ the command line

def test_terms_are_spelled_on_the_command_line():
    assert spelled(None) is None
    assert spelled("hidden=1,attention=0.5") == {"hidden": 1, "attention": 0.5}
    assert spelled("relations=10:window=4:layers=last,cls=2:layers=[[1,2],[2,4]],task=0") == {
        "relations": {"weight": 10, "window": 4, "layers": "last"}, "cls": {"weight": 2, "layers": [[1, 2], [2, 4]]},
        "task": 0}
    for text, message in (("hidden", "NAME=VALUE"), ("", "NAME=VALUE"), ("hidden=1,hidden=2", "has hidden twice")):
        with pytest.raises(ArgumentError, match=message):
            spelled(text)


@pytest.mark.parametrize("command", ["finetune", "staged", "straight_through"])
def test_the_commands_pass_them_on(tmp_path, monkeypatch, command):
    from lowfat import cli_training, recovery

    classifier().save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    seen = []
    monkeypatch.setattr(recovery, command, lambda *args, **options: seen.append(options) or SimpleNamespace(to_json=dict))
    getattr(cli_training, command)(str(tmp_path / "dense"), tmp_path / "out", tmp_path / "texts.jsonl",
                                   teacher=str(tmp_path / "dense"), distill="hidden=1,cls=2", device="cpu", as_json=True)
    assert seen[0]["distill"] == {"hidden": 1, "cls": 2}
