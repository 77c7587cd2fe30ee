"""A teacher that learns to teach: it is changed so that a student who follows it for a step does better in a quiz on rows
that the student does not train on (MetaDistil, Zhou et al. 2106.04570, algorithm 1).

The gradient through the student's step is taken by a central difference (as Liu et al. 1806.09055 do), so that no layer
needs a second derivative. Ours: the difference is taken without dropout and in fp32, and the teacher learns by Adam."""
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import padded
from ..errors import ArgumentError
from ..evaluate import evaluate
from ..listen import untouched
from .objective import Objective
from .training import Phase, TrainReport, check_numbers, in_order, prepared, ready, run_into, train_phase

QUIZ_SHARE, TEACHER_RATE = 0.1, 1e-5
_STEP = 0.01  # how far the student's weights, all together, move to either side for the difference


@dataclass
class MetaDistillReport(TrainReport):
    """What meta_distill() did."""
    quiz_rows: int = 0  # those of the training rows that were kept for the quiz; pieces of text for lm
    lessons: int = 0  # steps before which the teacher learned, of the whole run


def meta_distill(model, train: Sequence[Mapping], *, tokenizer, task: str | None = None, teacher, teacher_tokenizer=None,
                 quiz_share: float = QUIZ_SHARE, teacher_rate: float = TEACHER_RATE, every: int = 1,
                 validation: Sequence[Mapping] | None = None, steps: int, learning_rate: float = 1e-4, batch_size: int = 32,
                 max_length: int | None = None, temperature: float = 2.0, alpha: float = 0.5, autocast: bool | str = "auto",
                 distill: Mapping | None = None, seed: int = 0, out: str | Path | None = None, overwrite: bool = False,
                 save_every: int = 100, on_progress=None) -> MetaDistillReport:
    """Trains the model in place as finetune() does with a teacher, which learns on the way, too; with out, writes the
    trained model there. The teacher that is given stays as it is: a copy learns, in fp32, and is gone afterwards.

    Before every `every`-th step the copy takes a step of Adam, at teacher_rate, down the gradient of the task's loss on a
    batch of the quiz, after a step of gradient descent by the student at learning_rate. The quiz is quiz_share of the rows,
    drawn by the seed, which the student does not train on. A step with a lesson costs about four without.

    Classification and lm, with labels. The other arguments, out and on_progress are those of finetune(). ArgumentError
    before any work."""
    started = time.monotonic()
    check_numbers(alpha, {"steps": steps, "every": every, "batch_size": batch_size, "save_every": save_every},
                  learning_rate=learning_rate, teacher_rate=teacher_rate, temperature=temperature)
    if not 0 < quiz_share < 1:
        raise ArgumentError(f"quiz_share is {quiz_share}; needs a number above 0 and below 1")
    if teacher is None:
        raise ArgumentError("teacher is missing; meta_distill needs one that learns to teach")
    plain, data = prepared(model, train, tokenizer=tokenizer, task=task, teacher=teacher,
                           teacher_tokenizer=teacher_tokenizer, validation=validation, max_length=max_length,
                           temperature=temperature, alpha=alpha, autocast=autocast, distill=distill)
    _check_losses(plain)
    quiz, data = _split(data, quiz_share, seed)
    objective = _Taught(plain, in_order(quiz, steps * batch_size, seed), tokenizer, learning_rate=learning_rate,
                        teacher_rate=teacher_rate, every=every, batch_size=batch_size)
    options = {"task": objective.task, "steps": steps, "learning_rate": learning_rate, "quiz_share": quiz_share,
               "teacher_rate": teacher_rate, "every": every, "batch_size": batch_size, "temperature": temperature,
               "alpha": alpha, "autocast": objective.autocast, "seed": seed}

    def run(states):
        with ready(objective, tokenizer):
            return train_phase(objective, in_order(data, steps * batch_size, seed), tokenizer,
                               Phase(steps, learning_rate, total=steps), batch_size=batch_size, seed=seed, states=states,
                               save_every=save_every, on_progress=on_progress)[0]

    state = run_into(out, run, objective, tokenizer, data, options, overwrite)
    report = MetaDistillReport(objective.task, steps, state.resumed_from, str(model.device), objective.autocast,
                               time.monotonic() - started, state.log_history, None, len(quiz), -(-steps // every))
    if validation is not None:
        report.validation = evaluate(model, validation, tokenizer, task=objective.task, max_length=max_length)
    return report


def _check_losses(objective: Objective) -> None:
    if objective.task == "embedding":
        raise ArgumentError("meta_distill needs labels for its quiz; an embedding has none")
    weights = objective.answer_weights(has_teacher=True) | (objective.distillation.answers if objective.distillation else {})
    if not weights["task"]:
        raise ArgumentError("meta_distill: the labels have weight 0; needs alpha below 1, for the quiz is judged by them")
    if not weights["logits"] and not (objective.distillation and objective.distillation.used):
        raise ArgumentError("meta_distill: the teacher has weight 0; needs alpha above 0, or terms in distill")


def _split(data: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(the quiz, the others in their order)"""
    count = max(1, round(share * len(data)))
    if count >= len(data):
        raise ArgumentError(f"quiz_share is {share}; of {len(data)} examples that leaves none to train on")
    chosen = set(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    return [data[number] for number in sorted(chosen)], [one for number, one in enumerate(data) if number not in chosen]


class _Taught(Objective):
    """The loss of a student whose teacher learns before the step is taken.

    The teacher, the moments of its optimizer and the number of steps are parameters and buffers here, though none that the
    student's optimizer sees: the training state has them."""

    def __init__(self, plain: Objective, quiz: list[dict], tokenizer, *, learning_rate: float, teacher_rate: float,
                 every: int, batch_size: int):
        taught = copy.deepcopy(plain.teacher).float().eval().requires_grad_(False)
        super().__init__(plain.student, plain.task, teacher=taught, temperature=plain.temperature, alpha=plain.alpha,
                         autocast=plain.autocast, pooling=plain.pooling, distillation=plain.distillation)
        self.taught, self.moments = taught, nn.Module()
        self.register_buffer("steps", torch.tensor(0))
        self._quiz, self._tokenizer, self._batch_size = quiz, tokenizer, batch_size
        self._learning_rate, self._every = learning_rate, every
        self._optimizer = torch.optim.Adam(taught.parameters(), lr=teacher_rate)
        for number, parameter in enumerate(taught.parameters()):
            state = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                     "exp_avg_sq": torch.zeros_like(parameter)}
            for name, tensor in state.items():
                self.moments.register_buffer(f"{name}_{number}", tensor)
            self._optimizer.state[parameter] = state  # the same tensors, which it changes in place

    def train(self, mode: bool = True):
        super().train(mode)
        self.taught.eval()
        return self

    def forward(self, **batch) -> dict[str, Tensor]:
        if self.training:
            step = int(self.steps)
            if step % self._every == 0:
                self._teach(batch, self._quiz_batch(step // self._every))
            self.steps += 1
        return super().forward(**batch)

    def _quiz_batch(self, number: int) -> dict[str, Tensor]:
        first = number * self._batch_size
        return padded(self._quiz[first:first + self._batch_size], self._tokenizer)

    def _teach(self, batch: Mapping[str, Tensor], quiz: Mapping[str, Tensor]) -> None:
        for parameter, gradient in zip(self.taught.parameters(), self.hypergradient(batch, quiz)):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def hypergradient(self, batch: Mapping[str, Tensor], quiz: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Of the quiz' loss after a step s' = s - rate dL/ds of the student s, in the teacher's parameters t:
        -rate d2L/dtds v with v the quiz' gradient at s', which is -rate (dL/dt at s + e v - dL/dt at s - e v) / 2e."""
        with self._calm() as student:
            saved = [parameter.detach().clone() for parameter in student]

            def at(ways: Sequence[Tensor], far: float) -> None:
                with torch.no_grad():
                    for parameter, start, way in zip(student, saved, ways):
                        parameter.copy_(start + far * way)

            try:
                at(_gradients(super().forward(**batch)["loss"], student), -self._learning_rate)
                ways = _gradients(self._quiz_loss(quiz), student)
                length = torch.stack([way.norm() for way in ways]).norm().item()
                if not 0 < length < float("inf"):
                    return [None] * len(list(self.taught.parameters()))
                found = []
                for side in (1, -1):
                    at(ways, side * _STEP / length)
                    found.append(self._teachers_gradients(batch))
            finally:
                at(saved, 0.0)
        return [(plus - minus) * (-self._learning_rate * length / (2 * _STEP)) for plus, minus in zip(*found)]

    def _quiz_loss(self, quiz: Mapping[str, Tensor]) -> Tensor:
        batch = {name: value.to(self.student.device) for name, value in quiz.items()}
        labels = batch.pop("labels")
        return self.task_loss(self.student(**batch).logits.float(), labels)

    def _teachers_gradients(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Of the student's loss, in the teacher's parameters."""
        self.taught.requires_grad_(True)
        try:
            with untouched(self.student):
                loss, parameters = super().forward(**batch)["loss"], list(self.taught.parameters())
                if not loss.requires_grad:  # by now the student follows no teacher
                    return [torch.zeros_like(parameter) for parameter in parameters]
                return _gradients(loss, parameters)
        finally:
            self.taught.requires_grad_(False)

    def _wanted(self, out, batch) -> Tensor:
        with torch.set_grad_enabled(next(self.taught.parameters()).requires_grad):
            return out(self.teacher, batch).float()

    @contextmanager
    def _calm(self) -> Iterator[list[nn.Parameter]]:
        """The student's trained parameters, while it and its losses are as they must be for differences."""
        modes, autocast = {module: module.training for module in self.student.modules()}, self.autocast
        self.student.eval()
        self.autocast = False
        try:
            yield [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        finally:
            self.autocast = autocast
            for module, mode in modes.items():
                module.training = mode


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for a parameter that the loss does not depend on."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(parameter) if one is None else one for parameter, one in zip(parameters, found)]
