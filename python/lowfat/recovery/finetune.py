"""Plain fine-tuning through transformers.Trainer, on the task or on a dense teacher, resumable at any moment."""
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..evaluate import evaluate
from .training import Phase, TrainReport, check_numbers, in_order, prepared, ready, run_into, train_phase


def finetune(model, train: Sequence[Mapping], *, tokenizer, task: str | None = None, teacher=None, teacher_tokenizer=None,
             validation: Sequence[Mapping] | None = None, steps: int, learning_rate: float = 1e-4, batch_size: int = 32,
             max_length: int | None = None, temperature: float = 2.0, alpha: float = 0.5, autocast: bool | str = "auto",
             distill: Mapping | None = None, seed: int = 0, out: str | Path | None = None, overwrite: bool = False,
             save_every: int = 100, on_progress=None) -> TrainReport:
    """Trains every parameter of the model in place; with out, writes the trained model there.

    Classification and lm minimize the task loss; with a teacher, (1 - alpha) task loss + alpha KL to its logits at the
    temperature (alpha 1 needs no labels). Embedding minimizes 1 - cosine to the teacher's embedding and needs no labels.
    distill adds what the teacher computes on the way, {"hidden": 1.0, "attention": 1.0}: see recovery/distillation.py.
    AdamW, weight decay 0.01, gradients clipped to norm 1; the learning rate rises over a tenth of the steps, then falls
    linearly to 0. autocast "auto": bf16 where the hardware multiplies it (a GPU, a CPU with AVX512-BF16). Half-precision
    weights train in fp32.

    With out, the training state goes to .NAME.training beside it every save_every steps: the same call continues from there
    and ends with the same bits, given as many threads. on_progress(step, steps, what). ArgumentError before any work."""
    started = time.monotonic()
    check_numbers(alpha, {"steps": steps, "batch_size": batch_size, "save_every": save_every}, learning_rate=learning_rate,
                  temperature=temperature)
    objective, data = prepared(model, train, tokenizer=tokenizer, task=task, teacher=teacher,
                               teacher_tokenizer=teacher_tokenizer, validation=validation, max_length=max_length,
                               temperature=temperature, alpha=alpha, autocast=autocast, distill=distill)
    options = {"task": objective.task, "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size,
               "temperature": temperature, "alpha": alpha, "autocast": objective.autocast, "seed": seed}

    def run(states):
        with ready(objective, tokenizer):
            return train_phase(objective, in_order(data, steps * batch_size, seed), tokenizer,
                               Phase(steps, learning_rate, total=steps), batch_size=batch_size, seed=seed, states=states,
                               save_every=save_every, on_progress=on_progress)[0]

    state = run_into(out, run, objective, tokenizer, data, options, overwrite)
    report = TrainReport(objective.task, steps, state.resumed_from, str(model.device), objective.autocast,
                         time.monotonic() - started, state.log_history)
    if validation is not None:
        report.validation = evaluate(model, validation, tokenizer, task=objective.task, max_length=max_length)
    return report
