"""What training minimizes: the task's loss, the distance to a dense teacher's logits or embeddings, and to what it computes
on the way to them."""
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax

from ..evaluate import next_token_losses, pooled
from .distillation import Distillation
from .internals import Internals, overheard


class Objective(nn.Module):
    """The student as one module that returns its loss, for transformers.Trainer.

    The Trainer would otherwise change the student's config, patch its forward, and refuse models without a head."""

    accepts_loss_kwargs = False  # each batch is averaged here, over what counts in it

    def __init__(self, student: nn.Module, task: str, *, teacher: nn.Module | None, temperature: float, alpha: float,
                 autocast: bool, pooling: str | None = None, distillation: Distillation | None = None):
        super().__init__()
        self.student, self.task, self.autocast = student, task, autocast
        self.temperature, self.alpha = temperature, alpha
        self.distillation = distillation  # a submodule: its projections are trained and kept with the student
        self.pooling = pooling  # for embeddings, of student and teacher alike
        self._teacher = (teacher,)  # a tuple hides it: no submodule, so neither train() nor the optimizer reaches it

    def forward(self, **batch) -> dict[str, torch.Tensor]:
        return {"loss": self._loss(*self._compared(batch))}

    def blank_loss(self, **batch) -> torch.Tensor:
        """The loss of a model that answers zeros, so knows nothing: every class or token as likely, no embedding at all."""
        found, *others = self._compared(batch)
        blank = torch.zeros_like(found)
        if internals := _internals_of(found):
            ours, theirs = internals
            blank.internals = ours.blank(), theirs
        return self._loss(blank, *others)

    def _compared(self, batch) -> tuple:
        """(answers, those of the teacher, labels, attention mask)

        Where the teacher is followed on the way, the answers carry along what both computed on it, for _loss()."""
        device = self.student.device
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels", None)
        out = self._embedding if self.task == "embedding" else _logits
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            with self._heard(self.student) as ours:
                found = out(self.student, batch).float()
            with self._heard(self.teacher) as theirs:
                wanted = self._wanted(out, batch)
        if ours is not None:
            found.internals = ours, theirs
        return found, wanted, labels, batch["attention_mask"]

    def _heard(self, model):
        return overheard(model) if self.distillation and self.distillation.counting() else nullcontext()

    def _embedding(self, model, batch) -> torch.Tensor:
        return pooled(model, batch, self.pooling)

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    @torch.no_grad()
    def _wanted(self, out, batch) -> torch.Tensor | None:
        return None if self.teacher is None else out(self.teacher, batch).float()

    def _loss(self, found, wanted, labels, mask) -> torch.Tensor:
        weights = self.answer_weights(has_teacher=wanted is not None)
        loss = 0
        if internals := _internals_of(found):
            loss = self.distillation(*internals, mask)
        if weights.get("embedding"):
            loss = loss + weights["embedding"] * (1 - cosine_similarity(found, wanted, dim=-1)).mean()
        if weights.get("logits"):
            loss = loss + weights["logits"] * self._distance(found, wanted, mask)
        if weights.get("task"):
            loss = loss + weights["task"] * self.task_loss(found, labels)
        return loss

    def task_loss(self, found, labels) -> torch.Tensor:
        return _next_token_loss(found, labels) if self.task == "lm" else cross_entropy(found, labels)

    def answer_weights(self, *, has_teacher: bool) -> dict[str, float]:
        """Of the answers' losses, by now."""
        if self.task == "embedding":
            weights = {"embedding": 1.0}
        else:
            weights = {"logits": self.alpha, "task": 1 - self.alpha} if has_teacher else {"task": 1.0}
        return weights | (self.distillation.answers_now() if self.distillation else {})

    def _distance(self, found, wanted, mask) -> torch.Tensor:
        """T^2 KL(teacher, student) at temperature T: its gradient does not shrink with T (Hinton et al. 2015, sec. 2.1)."""
        found, wanted = (log_softmax(logits / self.temperature, dim=-1) for logits in (found, wanted))
        distances = (wanted.exp() * (wanted - found)).sum(-1)  # [b] or, for lm, [b, t]
        weights = mask.float() if self.task == "lm" else torch.ones_like(distances)
        return self.temperature ** 2 * (distances * weights).sum() / weights.sum()


def _internals_of(found: torch.Tensor) -> tuple[Internals, Internals] | None:
    """(the student's, the teacher's) on the way to these answers"""
    return getattr(found, "internals", None)


def _logits(model, batch) -> torch.Tensor:
    return model(**batch).logits


def _next_token_loss(logits, labels) -> torch.Tensor:
    losses, count = next_token_losses(logits, labels)
    return losses.sum() / max(count, 1)
