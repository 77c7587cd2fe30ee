"""Pieces of one job in several processes, each with its share of the threads."""
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from queue import Empty
from typing import TypeVar

import torch

Item = TypeVar("Item")


def threads_of(jobs: int) -> int:
    """Of each of so many processes."""
    return max(1, torch.get_num_threads() // jobs)


def worked_out(run: Callable, items: Sequence[Item], jobs: int, tell: Callable) -> Iterator[tuple[Item, object]]:
    """(item, run(item, on_step)) as they are finished, so many at a time; in this process where jobs is 1.

    run and the items are sent to other processes. on_step(step, ...) becomes tell(item, step) here. No process outlives
    this one, however it ends."""
    if jobs == 1 or not items:
        for item in items:
            yield item, run(item, lambda step, *_: tell(item, step))
        return
    from transformers.utils.logging import is_progress_bar_enabled

    context = multiprocessing.get_context("spawn")
    steps = context.Queue()
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start,
                             initargs=(threads_of(jobs), steps, os.getpid(), is_progress_bar_enabled())) as pool:
        item_of = {pool.submit(_run, run, item): item for item in items}
        try:
            waiting = set(item_of)
            while waiting:
                finished, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield item_of[future], future.result()
                _hear(steps, tell)
        finally:
            pool.shutdown(cancel_futures=True)


def _hear(steps, tell: Callable) -> None:
    try:
        while True:
            tell(*steps.get_nowait())
    except Empty:
        pass


# --- in the other processes ---

def _start(threads: int, steps, parent: int, has_bars: bool) -> None:
    global _steps
    _steps = steps
    steps.cancel_join_thread()  # a process may end with messages that nobody will read
    if not has_bars:
        from transformers.utils import logging

        logging.disable_progress_bar()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed job must leave no process behind that still writes to its folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(run: Callable, item):
    return run(item, lambda step, *_: _steps.put((item, step)))
