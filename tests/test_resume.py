"""Jobs that are killed: the same call continues and ends with the same bits as a run that nobody disturbed.

Children are forked, on one thread, so that a kill costs no import; the nightly test kills processes at random moments."""
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch

from lowfat import job, storage
from lowfat.errors import ArgumentError, IntegrityError
from lowfat.recovery import (block_movement, finetune, isp, learned_ranks, lpaf, meta_distill, mixed_rank, staged,
                             straight_through, theseus)
from lowfat.strict_json import read_json
from lowfat.tensor_file import read_tensors
from tiny_text import classifier, rows, tokenizer


def dense_model(folder):
    torch.manual_seed(0)
    classifier().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def run_factorize(work, **changes):
    options = {"method": "whitened", "ratio": 0.5, "policy": "allocated", "rows": rows(24), "max_length": 12} | changes
    return job.factorize_folder(work / "dense", work / "out", **options)


def run_finetune(work, **changes):
    options = {"steps": 6, "batch_size": 4, "max_length": 12, "save_every": 2, "seed": 3} | changes
    train = options.pop("rows", rows(10))  # 24 examples of 10 rows: the passes end within batches
    model, tok = job.open_model(options.pop("model", work / "dense"))
    return finetune(model, train, tokenizer=tok, out=work / "out", **options)


def run_staged(work, **changes):
    """Two stages of two steps and ten at the end, of which each stage, as the guard lets none pass, takes four more."""
    options = {"steps": 14, "final_share": 0.7, "guard": 1e-6, "batch_size": 4, "max_length": 12, "save_every": 2,
               "method": "whitened", "calibration_rows": 8, "order": "sensitivity", "seed": 3} | changes
    model, tok = job.open_model(work / "dense")
    return staged(model, options.pop("rows", rows(10)), tokenizer=tok, out=work / "out", **options)


def run_straight_through(work, **changes):
    """Five steps that choose new factors after the third and the fifth, and three of the factors alone."""
    options = {"steps": 8, "every": 3, "freeze": 0.4, "batch_size": 4, "max_length": 12, "save_every": 2,
               "method": "whitened", "calibration_rows": 8, "seed": 3} | changes
    model, tok = job.open_model(work / "dense")
    return straight_through(model, options.pop("rows", rows(10)), tokenizer=tok, out=work / "out", **options)


def run_meta_distill(work, **changes):
    """Every second step with a lesson; the teacher is wider, so that there are projections to train, too."""
    from transformers import BertConfig, BertForSequenceClassification

    options = {"steps": 6, "every": 2, "batch_size": 4, "max_length": 12, "save_every": 2, "seed": 3,
               "distill": {"hidden": {"weight": 1.0, "until": 0.7}, "attention": 1.0}} | changes
    model, tok = job.open_model(work / "dense")
    torch.manual_seed(1)
    teacher = BertForSequenceClassification(BertConfig(
        vocab_size=32, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40, num_labels=2)).eval()
    return meta_distill(model, options.pop("rows", rows(10)), tokenizer=tok, teacher=teacher, out=work / "out", **options)


def run_mixed_rank(work, **changes):
    """Dense branches that learn for five of eight steps."""
    options = {"steps": 8, "p_init": 0.7, "train_dense": True, "batch_size": 4, "max_length": 12, "save_every": 2,
               "method": "whitened", "calibration_rows": 8, "seed": 3} | changes
    model, tok = job.open_model(work / "dense")
    return mixed_rank(model, options.pop("rows", rows(10)), tokenizer=tok, out=work / "out", **options)


def run_theseus(work, **changes):
    """Frozen dense blocks, which no state holds, for five of eight steps."""
    options = {"steps": 8, "batch_size": 4, "max_length": 12, "save_every": 2, "seed": 3} | changes
    model, tok = job.open_model(work / "dense")
    return theseus(model, options.pop("rows", rows(10)), tokenizer=tok, out=work / "out", **options)


def run_lpaf(work, **changes):
    """Five steps of pruning, which two states keep, and five of the factors."""
    options = {"steps": 10, "keep": 0.3, "batch_size": 4, "max_length": 12, "save_every": 2, "seed": 3} | changes
    model, tok = job.open_model(work / "dense")
    return lpaf(model, options.pop("rows", rows(10)), tokenizer=tok, out=work / "out", **options)


def run_learned_ranks(work, **changes):
    """Five steps with gates, and three of the components that were chosen then."""
    options = {"steps": 8, "final_share": 0.4, "batch_size": 4, "max_length": 12, "save_every": 2, "method": "whitened",
               "calibration_rows": 8, "seed": 3} | changes
    model, tok = job.open_model(work / "dense")
    return learned_ranks(model, options.pop("rows", rows(10)), tokenizer=tok, out=work / "out", **options)


def run_isp(work, **changes):
    """Two rounds of three steps, after each of which units go, and two steps of those that stay."""
    options = {"steps": 8, "rounds": 2, "final_share": 0.25, "batch_size": 4, "max_length": 12, "save_every": 2,
               "seed": 3} | changes
    model, tok = job.open_model(work / "dense")
    return isp(model, options.pop("rows", rows(10)), tokenizer=tok, out=work / "out", **options)


def run_block_movement(work, **changes):
    """Five steps with masks, and three of the units that stay then."""
    options = {"steps": 8, "final_share": 0.4, "block": 8, "batch_size": 4, "max_length": 12, "save_every": 2,
               "seed": 3} | changes
    model, tok = job.open_model(work / "dense")
    return block_movement(model, options.pop("rows", rows(10)), tokenizer=tok, out=work / "out", **options)


JOBS = {"factorize": run_factorize, "finetune": run_finetune, "staged": run_staged,
        "straight_through": run_straight_through, "meta_distill": run_meta_distill, "mixed_rank": run_mixed_rank,
        "theseus": run_theseus, "lpaf": run_lpaf, "learned_ranks": run_learned_ranks, "isp": run_isp, "block_movement": run_block_movement}


def child(call):
    """Process id of a fork that makes the call and ends."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # without pytest's own end
    return process


def ended(process, timeout_s=45.0):
    """How a child process ends: 0, or minus the signal."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"the child did not end within {timeout_s} s")


def forked(call):
    return ended(child(call))


def with_stage(stage, call):
    """Makes the call with another storage.stage, under every name it was imported by. For children: nothing is put back."""
    original = storage.stage
    for module in list(sys.modules.values()):
        if module.__name__.startswith("lowfat") and vars(module).get("stage") is original:
            module.stage = stage
    call()


def logging(log, call):
    """Makes the call and writes the name of each stage it passes to the file."""
    with open(log, "w") as file:
        with_stage(lambda name: print(name, file=file, flush=True), call)


def stages_of(call, log):
    assert forked(partial(logging, log, call)) == 0
    return log.read_text().splitlines()


def dying(count, call):
    """Makes the call in a child that kills itself at its count-th stage; how the child ended."""
    left = [count]

    def stage(name):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return forked(lambda: with_stage(stage, call))


def result(work):
    """{file: SHA-256} of the result, which must be all there is beside the dense model."""
    left = sorted(path.name for path in work.iterdir() if path.name not in ("dense", "out", "log"))
    assert not left, left
    return digests(work / "out")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def where(stages, name):
    """Number of the stage, from 1; "last S5" is the S5 of the result, "S5" that of the first folder written."""
    if name.startswith("last "):
        return len(stages) - stages[::-1].index(name.removeprefix("last "))
    return stages.index(name) + 1


POINTS = {"factorize": ["window 1", "planned", "layer 1", "layer 7", "S2", "S5", "S6", "saved", "progress removal"],
          "finetune": ["step 1", "step 3", "S2", "S6", "step 6", "last S3", "last S6", "progress removal"],
          # the first stage has the steps 1 and 2, and 3 to 6 when it was undone; the second 7 and 8, and 9 to 12
          "staged": ["ordered", "S6", "step 3", "stage 1", "step 10", "renamed", "last S6", "progress removal"],
          "straight_through": ["step 1", "step 3", "S6", "step 4", "step 7", "last S6", "progress removal"],
          "meta_distill": ["step 1", "step 3", "S6", "step 5", "last S6", "progress removal"],
          "mixed_rank": ["step 3", "step 7", "last S6"], "theseus": ["step 5"],
          "lpaf": ["step 3", "step 5", "step 8", "last S6"],
          "learned_ranks": ["step 1", "step 3", "S6", "step 5", "step 7", "last S6", "progress removal"],
          "isp": ["step 1", "step 3", "S6", "step 4", "step 6", "step 8", "last S6", "progress removal"],
          "block_movement": ["step 1", "step 3", "S6", "step 5", "step 7", "last S6", "progress removal"]}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", JOBS)
def test_killed_at_a_stage(tmp_path, name):
    dense_model(tmp_path / "dense")
    run = partial(JOBS[name], tmp_path)
    stages = stages_of(run, tmp_path / "log")
    expected = result(tmp_path)
    for point in POINTS[name]:
        shutil.rmtree(tmp_path / "out")
        assert dying(where(stages, point), run) == -signal.SIGKILL
        assert forked(run) == 0, point
        assert result(tmp_path) == expected, point


def test_killed_between_the_layers_of_a_group(tmp_path):
    """Layer 7 shares with layer 1, and they are written one after the other: what is there of one alone is made again."""
    dense_model(tmp_path / "dense")
    run = partial(run_factorize, tmp_path, method="compot", share=2)
    stages = stages_of(run, tmp_path / "log")
    expected = result(tmp_path)
    layers = [stage for stage in stages if stage.startswith("layer")]
    assert layers[:4] == ["layer 1", "layer 7", "layer 2", "layer 8"]
    for point in ("layer 1", "layer 7", "layer 3"):
        shutil.rmtree(tmp_path / "out")
        assert dying(where(stages, point), run) == -signal.SIGKILL
        assert forked(run) == 0, point
        assert result(tmp_path) == expected, point


@pytest.mark.parametrize("name, number", [("factorize", 1), ("factorize", 2), ("finetune", 1), ("finetune", 3),
                                          ("staged", 1), ("staged", 4)])
def test_killed_while_deleting(tmp_path, name, number):
    """Deleting a folder takes a while: what is left of it must not pass for a complete one, nor for a damaged one."""
    dense_model(tmp_path / "dense")
    run = partial(JOBS[name], tmp_path)
    assert forked(run) == 0
    expected, left = result(tmp_path), [number]
    shutil.rmtree(tmp_path / "out")

    def half(folder, *args, **kwargs):
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        left[0] -= bool(files)
        for path in files if left[0] else files[:len(files) // 2 + 1]:
            path.unlink()
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        shutil.rmtree = half
        run()

    assert forked(killed) == -signal.SIGKILL
    assert forked(run) == 0 and result(tmp_path) == expected


@pytest.mark.parametrize("name", JOBS)
def test_killed_again_and_again(tmp_path, name):
    """Twelve stages an attempt: more than saving a training state takes, fewer than the job, which still gets done. (Thirty
    of what has several times as many.)"""
    dense_model(tmp_path / "dense")
    run = partial(JOBS[name], tmp_path)
    assert forked(run) == 0
    expected = result(tmp_path)
    shutil.rmtree(tmp_path / "out")
    for attempt in range(10):
        if (code := dying(12 if name in ("factorize", "finetune") else 30, run)) == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and attempt > 0
    assert result(tmp_path) == expected


@pytest.mark.parametrize("name", JOBS)
def test_overwrite_survives_a_kill_between_the_renames(tmp_path, name):
    """The old result is aside and the new one not yet there: neither is lost."""
    dense_model(tmp_path / "dense")
    run = partial(JOBS[name], tmp_path, overwrite=True)
    assert forked(run) == 0
    expected, other = result(tmp_path), {"ratio": 0.4} if name == "factorize" else {"seed": 4}
    assert forked(partial(run, **other)) == 0
    old = result(tmp_path)
    assert old != expected
    shutil.copytree(tmp_path / "out", tmp_path / "dense" / "old")
    stages = stages_of(run, tmp_path / "log")
    shutil.rmtree(tmp_path / "out")
    shutil.move(tmp_path / "dense" / "old", tmp_path / "out")
    assert dying(where(stages, "last aside"), run) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    storage.restore(tmp_path / "out")  # what every reader does first
    assert digests(tmp_path / "out") == old
    assert forked(run) == 0 and result(tmp_path) == expected


CHANGES = {
    "factorize": {"options.ratio": {"ratio": 0.4}, "options.policy": {"policy": "per_matrix"}, "rows": {"rows": rows(23)},
                  "options.max_length": {"max_length": 10}, "options.method": {"method": "svd"},
                  "options.share": {"share": 2}},
    "finetune": {"options.learning_rate": {"learning_rate": 2e-4}, "options.seed": {"seed": 4}, "data": {"rows": rows(9)},
                 "options.steps": {"steps": 7}, "options.autocast": {"autocast": False}},
    "staged": {"options.guard": {"guard": 2.0}, "options.seed": {"seed": 4}, "options.order": {"order": "forward"},
               "options.final_share": {"final_share": 0.6}, "options.calibration": {"calibration_rows": 7},
               "options.ratio": {"ratio": 0.4}, "data": {"rows": rows(9)}, "options.method": {"method": "svd"}},
    "mixed_rank": {"options.p_init": {"p_init": 0.6}, "options.until": {"until": 0.5}, "options.seed": {"seed": 4},
                   "options.consistency": {"consistency": 0.5}, "options.schedule": {"schedule": "constant"},
                   "options.train_dense": {"train_dense": False}, "options.calibration": {"calibration_rows": 7}},
    "theseus": {"options.p_init": {"replaced": 0.5}, "options.until": {"until": 0.5}, "data": {"rows": rows(9)}},
    "lpaf": {"options.keep": {"keep": 0.4}, "options.weighting": {"weighting": "mask"}, "options.scope": {"scope": "global"},
             "options.pruning_steps": {"prune_share": 0.4}, "options.criterion": {"criterion": "magnitude"},
             "options.score_rate": {"score_rate": 0.1}, "options.warmup": {"warmup": 0.2},
             "options.cool_down": {"cool_down": 0.2}, "options.p_init": {"p_init": 0.6}, "options.steps": {"steps": 12},
             "options.arguments.exact": {"arguments": {"exact": True}}, "data": {"rows": rows(9)}},
    "straight_through": {"options.every": {"every": 2}, "options.fade": {"fade": 0.3}, "options.freeze": {"freeze": 0.2},
                         "options.pull": {"pull": 0.0}, "options.shadow_rate": {"shadow_rate": 1e-5},
                         "options.calibration": {"calibration_rows": 7}, "data": {"rows": rows(9)}},
    "meta_distill": {"options.every": {"every": 3}, "options.teacher_rate": {"teacher_rate": 2e-5},
                     "options.quiz_share": {"quiz_share": 0.2}, "options.alpha": {"alpha": 0.4}, "data": {"rows": rows(9)},
                     "distill.hidden.weight": {"distill": {"hidden": 2.0, "attention": 1.0}},
                     "distill.attention": {"distill": {"hidden": 1.0}}},
    "learned_ranks": {"options.final_share": {"final_share": 0.3}, "options.warmup": {"warmup": 0.4},
                      "options.gate_rate": {"gate_rate": 0.2}, "options.start": {"start": 2.0},
                      "options.ratio": {"ratio": 0.4}, "data": {"rows": rows(9)}},
    "isp": {"options.rounds": {"rounds": 1}, "options.policy": {"policy": "per_block"},
            "options.final_share": {"final_share": 0.2}, "options.ratio": {"ratio": 0.6}, "data": {"rows": rows(9)}},
    "block_movement": {"options.block": {"block": 16}, "options.scope": {"scope": "matrix"},
                       "options.score_rate": {"score_rate": 2e-2}, "options.warmup": {"warmup": 0.2},
                       "options.ratio": {"ratio": 0.6}, "data": {"rows": rows(9)}},
}


@pytest.mark.parametrize("name", JOBS)
def test_a_changed_job_is_refused_by_the_name_of_the_change(tmp_path, name):
    dense_model(tmp_path / "dense")
    base = {"autocast": True} if name == "finetune" else {}
    run = partial(JOBS[name], tmp_path, **base)
    assert dying(9, run) == -signal.SIGKILL
    kept = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    for key, change in CHANGES[name].items():
        with pytest.raises(ArgumentError, match=rf"{re.escape(key)} was .*, is now "):
            JOBS[name](tmp_path, **(base | change))
    with torch.no_grad():
        model, _ = job.open_model(tmp_path / "dense")
        model.classifier.bias += 1
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ArgumentError, match="model.* was .*, is now "):
        run()
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == kept


@pytest.mark.parametrize("name", JOBS)
def test_two_at_once(tmp_path, name):
    """The second is told; the first goes on."""
    dense_model(tmp_path / "dense")
    seen = []

    def stage(stage_name):
        if not seen:
            with pytest.raises(ArgumentError, match="another process is at work on it"):
                JOBS[name](tmp_path)
            seen.append(stage_name)

    def both():
        with_stage(stage, partial(JOBS[name], tmp_path))
        assert seen

    assert forked(both) == 0


def test_a_damaged_training_state_is_reported(tmp_path):
    dense_model(tmp_path / "dense")
    run = partial(run_finetune, tmp_path)
    assert dying(where(stages_of(run, tmp_path / "log"), "step 3"), partial(run, overwrite=True)) == -signal.SIGKILL
    state = next(tmp_path.glob(".out.training/step-*/state.safetensors"))
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(IntegrityError, match="state.safetensors"):
        run(overwrite=True)
    state.write_bytes(content[:1000])
    with pytest.raises(IntegrityError, match="state.safetensors"):
        run(overwrite=True)


def test_every_random_generator_is_restored(tmp_path):
    """Dropout draws from torch; Python's and numpy's are drawn by hand, as a data pipeline would."""
    import numpy
    from lowfat.recovery.training_state import restore_rng, rng_state

    random.seed(5), numpy.random.seed(6), torch.manual_seed(7)
    numpy.random.normal()  # leaves a second gauss behind
    random.gauss(0, 1)
    tensors, state = rng_state()
    storage.write_tensors(tmp_path / "rng.safetensors", tensors)
    storage.write_json(tmp_path / "rng.json", state)

    def draws():
        return [random.random(), random.gauss(0, 1), numpy.random.normal(), numpy.random.rand(), torch.rand(3).tolist()]

    expected = draws()
    restore_rng(read_tensors(tmp_path / "rng.safetensors"), read_json(tmp_path / "rng.json"))
    assert draws() == expected


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", JOBS)
def test_killed_at_random_moments(tmp_path, name):
    """SIGKILL from outside, milliseconds after a random stage, in 18 of 20 past the first layer or saved step."""
    dense_model(tmp_path / "dense")
    run, log = partial(JOBS[name], tmp_path), tmp_path / "log"
    stages = stages_of(run, log)
    expected, first = result(tmp_path), stages.index("layer 1" if name == "factorize" else "S7") + 1
    seed = int(os.environ.get("LOWFAT_SEED", random.randrange(10**6)))
    moments = random.Random(seed)
    print(f"\nLOWFAT_SEED={seed}   {name}   {len(stages)} stages")
    for number in range(1, 21):
        shutil.rmtree(tmp_path / "out")
        log.write_text("")
        after, delay_s = moments.randrange(0 if number <= 2 else first, len(stages)), moments.random() * 0.02
        process, deadline = child(partial(logging, log, run)), time.monotonic() + 45
        while log.read_bytes().count(b"\n") < after and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(delay_s)
        os.kill(process, signal.SIGKILL)
        code, passed = ended(process), log.read_text().splitlines()
        kept = len(list(tmp_path.glob(".out.*/**/*")))
        if not (tmp_path / "out").exists() or list(tmp_path.glob(".out.*")):  # else it was complete, and says so
            assert forked(run) == 0
        same = result(tmp_path) == expected
        print(f"{number:2}  {'killed' if code else 'ended'} after {passed[-1] if passed else 'nothing':17} "
              f"(stage {len(passed):2})   {kept:2} files kept   {'same digests' if same else 'DIFFERENT DIGESTS'}")
        assert same
