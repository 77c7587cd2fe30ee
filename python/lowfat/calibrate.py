"""What each linear layer reads when real batches pass: the Gram matrix, and with labels the Fisher information."""
import hashlib
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import ArgumentError, NumericsError, UnsupportedError
from .fisher import FisherSums, add_fisher, batch_shape, parts
from .layers import factorizable, sizes
from .listen import forward, listening, untouched
from .progress import tensors_digest
from .stats import Calibration, Stats, read_group, write_group, write_index
from .storage import stage

log = logging.getLogger("lowfat")
_MANY_TOKENS = 1_000_000  # beyond, fp32 sums lose digits, so they are kept in fp64 while they grow
_FISHER = ("sums", "elements", "kronecker")


@dataclass
class Group:
    """Layers that read the same tensor, in the order of their calls; the first computes the Gram matrix for all."""
    names: list[str]
    k: int


@dataclass
class Look:
    """What reading all batches once, before any work, has shown."""
    batches: int
    tokens: int
    labelled: bool
    digest: str  # of all tensors in them


class Enough(Exception):
    """Ends a forward pass after the last layer that is listened to."""


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, layers: Sequence[str] | None = None,
              fisher: str | bool | None = None, out: str | os.PathLike | None = None, memory: int | None = None,
              on_progress: Callable[[int, int, str], None] | None = None) -> Calibration:
    """Statistics of each layer's inputs over all batches, each a dict for model(**batch); padding is left out.

    layers: name patterns. fisher: "sums" (the default where batches carry labels), "elements" for fwsvd with exact=True,
    "kronecker" for kfac, False for none. out: a folder for the statistics. When they need more than `memory` bytes (by
    default half of what is free) they are gathered window by window, each written and dropped, and the batches are read once for each window. The
    same call goes on where an interrupted one stopped. on_progress(batches done, in all, what is done) hears of the need for
    memory first. The model is left exactly as it was. Raises ArgumentError, NumericsError, UnsupportedError."""
    modules = factorizable(model, layers)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedError("calibrate: encoder-decoder models; which mask belongs to which layer is not known")
    batches = list(batches) if iter(batches) is batches else batches  # an iterator can be read only once
    look = look_at(batches)
    fisher = _fisher_mode(model, fisher, look)
    folder = None if out is None else _folder(out)
    with untouched(model):
        groups, calls = discover(model, modules, next(iter(batches)))
        dtype = torch.float64 if look.tokens > _MANY_TOKENS else torch.float32
        needs = [_bytes_of(group, modules, fisher, dtype) for group in groups]
        settings = "" if folder is None else _settings(model, groups, fisher, look)
        found: dict = {} if folder is None else _written(folder, len(groups), settings)
        windows = _windows([number for number, group in enumerate(groups) if group.names[0] not in found], needs,
                           _free(model) // 2 if memory is None else memory, folder)
        total = len(windows) * look.batches
        _tell(on_progress, total, f"{len(modules)} layers, {len(groups)} distinct inputs: statistics of {_size(sum(needs))}"
              + (f" in {len(windows)} passes" if len(windows) > 1 else ""))
        for index, window in enumerate(windows):
            title = f"pass {index + 1} of {len(windows)}" if len(windows) > 1 else "calibration"
            stats = _gather(model, batches, [groups[number] for number in window], modules, fisher, dtype, calls,
                            lambda done: on_progress and on_progress(index * look.batches + done, total, title))
            stage(f"window {index + 1}")
            for number in window:
                members = {name: stats.pop(name) for name in groups[number].names}
                found |= members if folder is None else write_group(folder, number, members, settings)
    if folder is None:
        return Calibration({name: found[name] for name in modules})
    write_index(folder, {name: found[name] for name in modules})
    return Calibration.load(folder)


def _settings(model: nn.Module, groups: Sequence[Group], fisher: str | None, look: Look) -> str:
    """What statistics on disk must agree in to be taken for these: layers, options, every weight, every batch."""
    facts = [[group.names for group in groups], fisher, look.digest, tensors_digest(model.state_dict().items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def look_at(batches: Iterable) -> Look:
    count = tokens = labelled = 0
    digest = hashlib.sha256()
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ArgumentError(f"batches: batch {count} is a {type(batch).__name__}, needs a dict for model(**batch)")
        mask, shape = batch.get("attention_mask"), batch_shape(batch)
        inside = int((mask != 0).sum()) if isinstance(mask, Tensor) else torch.Size(shape).numel()
        if inside == 0:
            raise ArgumentError(f"batches: batch {count} holds no tokens")
        count, tokens, labelled = count + 1, tokens + inside, labelled + ("labels" in batch)
        digest.update(tensors_digest((key, value) for key, value in batch.items() if isinstance(value, Tensor)).encode())
    if count == 0:
        raise ArgumentError("batches: empty; calibration needs at least one batch")
    if 0 < labelled < count:
        raise ArgumentError(f"batches: {labelled} of {count} carry labels; give labels to all or to none")
    return Look(count, tokens, labelled > 0, digest.hexdigest())


def _fisher_mode(model: nn.Module, fisher: str | bool | None, look: Look) -> str | None:
    if fisher not in (None, False, *_FISHER):
        raise ArgumentError(f"fisher must be one of {', '.join(_FISHER)}, False or None; found {fisher!r}")
    has_loss = "labels" in signature(model.forward).parameters
    if fisher is None:
        return "sums" if look.labelled and has_loss else None
    if fisher and not look.labelled:
        raise ArgumentError("fisher needs labels in the batches; they carry none")
    if fisher and not has_loss:
        raise ArgumentError(f"fisher needs a model with a loss; {type(model).__name__} takes no labels")
    return fisher or None


def _folder(out: str | os.PathLike) -> Path:
    folder = Path(out)
    if not folder.parent.is_dir():
        raise ArgumentError(f"{out}: the folder {folder.parent} does not exist")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"{out}: cannot be made a folder ({error.strerror})") from error
    return folder


def _written(folder: Path, groups: int, settings: str) -> dict[str, dict]:
    """What an earlier call with the same settings has left."""
    found: dict[str, dict] = {}
    for number in range(groups):
        found |= read_group(folder, number, settings) or {}
    return found


@torch.no_grad()
def discover(model: nn.Module, modules: Mapping[str, nn.Module], batch: Mapping) -> tuple[list[Group], list[str]]:
    """Which layers read the same tensor, in the order of their first calls; and the order of all calls."""
    calls: list[str] = []
    groups: dict[str, Group] = {}
    readers: list[tuple[weakref.ref, int, str]] = []  # (input, its version, who read it first)

    def before(name: str, x: Tensor) -> None:
        calls.append(name)
        if name in calls[:-1]:
            return
        first = next((leader for ref, version, leader in readers if ref() is x and x._version == version), None)
        if first is None:
            groups[name] = Group([name], x.shape[-1])
            readers.append((weakref.ref(x), x._version, name))
        else:
            groups[first].names.append(name)

    with listening(modules, before):
        forward(model, batch, labels=False)
    if not calls:
        raise ArgumentError("calibrate: the first batch reached none of the layers")
    groups |= {name: Group([name], sizes(module)[0]) for name, module in modules.items() if name not in calls}
    return list(groups.values()), calls


def _bytes_of(group: Group, modules: Mapping[str, nn.Module], fisher: str | None, dtype: torch.dtype) -> int:
    shapes = [sizes(modules[name]) for name in group.names]
    of_fisher = sum(4 * (k + n + (k * n if fisher == "elements" else 0)) for k, n in shapes) if fisher else 0
    of_gradients = sum(n * n for _, n in shapes) if fisher == "kronecker" else 0
    return (group.k ** 2 + of_gradients) * dtype.itemsize + of_fisher


def _windows(todo: list[int], needs: list[int], memory: int, folder: Path | None) -> list[list[int]]:
    """Groups in call order, as many at a time as the memory holds."""
    total = sum(needs[number] for number in todo)
    if total > memory and folder is None:
        raise ArgumentError(f"calibrate: the statistics need {_size(total)}, {_size(memory)} may be used; "
                            "pass out=folder to gather them window by window")
    windows: list[list[int]] = []
    left = -1
    for number in todo:
        if needs[number] > memory:
            raise ArgumentError(f"calibrate: the statistics of one layer need {_size(needs[number])}, "
                                f"{_size(memory)} may be used")
        if needs[number] > left:
            windows.append([])
            left = memory
        windows[-1].append(number)
        left -= needs[number]
    return windows


def _gather(model: nn.Module, batches: Iterable[Mapping], groups: Sequence[Group], modules: Mapping[str, nn.Module],
            fisher: str | None, dtype: torch.dtype, calls: list[str], done: Callable[[int], None]) -> dict[str, Stats]:
    """Statistics of the layers in these groups, from one pass over the batches."""
    leaders = {name: group.names[0] for group in groups for name in group.names}
    listened = {name: modules[name] for name in leaders}
    grams = {group.names[0]: torch.zeros(group.k, group.k, dtype=dtype, device=modules[group.names[0]].weight.device)
             for group in groups}
    rows = dict.fromkeys(grams, 0)
    sums = {name: FisherSums.of(module, elements=fisher == "elements", gram_out=dtype if fisher == "kronecker" else None)
            for name, module in listened.items() if fisher}
    samples = 0
    reading: dict[str, tuple[weakref.ref, int]] = {}
    # only where every layer is called exactly once is it certain that nothing comes after the last
    last = max(leaders, key=calls.index) if sorted(calls) == sorted(modules) and not fisher else None

    def before(name: str, x: Tensor) -> None:
        if name == (leader := leaders[name]):
            with torch.no_grad():
                flat = token_rows(name, x.detach(), mask).to(dtype)
                grams[name].addmm_(flat.mT, flat)
            rows[name] += len(flat)
            reading[name] = weakref.ref(x), x._version
        elif reading.get(leader, (lambda: None,))[0]() is not x or reading[leader][1] != x._version:
            raise UnsupportedError(f"{name} read the input of {leader} in the first batch and another one later; "
                                   "calibrate the two apart, with layers=[...]")
        if name == last:
            raise Enough

    for index, batch in enumerate(batches):
        for part in parts(model, batch) if fisher else [batch]:
            mask = part.get("attention_mask")
            with listening(listened, before):
                if fisher:
                    samples += add_fisher(model, part, listened, sums)
                else:
                    _hear(model, part)
        done(index + 1)
    if fisher and not samples:
        raise ArgumentError("fisher: no batch has a label that counts")
    return {name: stats for group in groups for name, stats in
            _collected(group, grams.pop(group.names[0]), rows[group.names[0]], sums, samples).items()}


def _collected(group: Group, gram: Tensor, rows: int, sums: dict[str, FisherSums], samples: int) -> dict[str, Stats]:
    if not all(block.isfinite().all() for block in gram.split(256)):  # at once it would take twice the matrix's memory
        raise NumericsError(f"{group.names[0]}: its inputs hold NaN or infinity, or overflow when squared")
    if not rows:
        log.warning("calibration: %s saw no tokens", ", ".join(group.names))
    gram = gram.float().cpu()
    return {name: Stats(gram, rows, **(sums.pop(name).means(samples) if sums else {})) for name in group.names}


@torch.no_grad()
def _hear(model: nn.Module, batch: Mapping) -> None:
    try:
        forward(model, batch, labels=False)
    except Enough:
        pass


def token_rows(name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """The inputs of all tokens that are not padding.   [rows, k]"""
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or bool(mask.all()):
        return rows
    # the same order, or one that flattening both gives: [b, t] read as [b t], [b, choices, t] as [b choices, t]
    if x.shape[:-1] == mask.shape or (len(rows) == mask.numel() and (x.dim() == 2 or mask.dim() > x.dim() - 1)):
        return rows[mask.to(x.device).reshape(-1) != 0]
    raise UnsupportedError(f"{name}: inputs {list(x.shape)} do not line up with the attention mask {list(mask.shape)}; "
                           "use batches without padding")


def _free(model: nn.Module) -> int:
    """Bytes that may still be allocated where the statistics grow."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if (info := Path("/proc/meminfo")).exists():  # counts caches that the system would give up, too
        available = (line.split()[1] for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
        free = int(next(available, free // 1024)) * 1024
    return free


def _tell(on_progress: Callable | None, total: int, text: str) -> None:
    log.info("calibration: %s", text)
    if on_progress:
        on_progress(0, total, text)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
