"""What training minimizes: the task's loss, mixed with the distance to a dense teacher's logits or embeddings."""
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax

from ..evaluate import next_token_losses, pooled


class Objective(nn.Module):
    """The student as one module that returns its loss, for transformers.Trainer.

    The Trainer would otherwise change the student's config, patch its forward, and refuse models without a head."""

    accepts_loss_kwargs = False  # each batch is averaged here, over what counts in it

    def __init__(self, student: nn.Module, task: str, *, teacher: nn.Module | None, temperature: float, alpha: float,
                 autocast: bool, pooling: str | None = None):
        super().__init__()
        self.student, self.task, self.autocast = student, task, autocast
        self.temperature, self.alpha = temperature, alpha
        self.pooling = pooling  # for embeddings, of student and teacher alike
        self._teacher = (teacher,)  # a tuple hides it: no submodule, so neither train() nor the optimizer reaches it

    def forward(self, **batch) -> dict[str, torch.Tensor]:
        return {"loss": self._loss(*self._compared(batch))}

    def blank_loss(self, **batch) -> torch.Tensor:
        """The loss of a model that answers zeros, so knows nothing: every class or token as likely, no embedding at all."""
        found, *others = self._compared(batch)
        return self._loss(torch.zeros_like(found), *others)

    def _compared(self, batch) -> tuple:
        """(answers, those of the teacher, labels, attention mask)"""
        device = self.student.device
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels", None)
        out = self._embedding if self.task == "embedding" else _logits
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            found = out(self.student, batch).float()
            wanted = self._wanted(out, batch)
        return found, wanted, labels, batch["attention_mask"]

    def _embedding(self, model, batch) -> torch.Tensor:
        return pooled(model, batch, self.pooling)

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    @torch.no_grad()
    def _wanted(self, out, batch) -> torch.Tensor | None:
        return None if self.teacher is None else out(self.teacher, batch).float()

    def _loss(self, found, wanted, labels, mask) -> torch.Tensor:
        if self.task == "embedding":
            return (1 - cosine_similarity(found, wanted, dim=-1)).mean()
        loss = 0 if wanted is None else self.alpha * self._distance(found, wanted, mask)
        share = 1 if wanted is None else 1 - self.alpha
        if share:
            loss = loss + share * (_next_token_loss(found, labels) if self.task == "lm" else cross_entropy(found, labels))
        return loss

    def _distance(self, found, wanted, mask) -> torch.Tensor:
        """T^2 KL(teacher, student) at temperature T: its gradient does not shrink with T (Hinton et al. 2015, sec. 2.1)."""
        found, wanted = (log_softmax(logits / self.temperature, dim=-1) for logits in (found, wanted))
        distances = (wanted.exp() * (wanted - found)).sum(-1)  # [b] or, for lm, [b, t]
        weights = mask.float() if self.task == "lm" else torch.ones_like(distances)
        return self.temperature ** 2 * (distances * weights).sum() / weights.sum()


def _logits(model, batch) -> torch.Tensor:
    return model(**batch).logits


def _next_token_loss(logits, labels) -> torch.Tensor:
    losses, count = next_token_losses(logits, labels)
    return losses.sum() / max(count, 1)
