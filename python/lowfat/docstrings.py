"""Real English text that is wherever Python and torch are: pairs of a docstring's first sentence and how it goes on."""
from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import warnings
from typing import NamedTuple

from .errors import ArgumentError

MODULES = {
    # about 1,200 pairs, for evaluation
    "stdlib": """
        argparse ast asyncio base64 bisect calendar codecs collections concurrent.futures configparser
        contextlib copy csv ctypes dataclasses datetime decimal difflib email enum fractions ftplib functools
        gzip hashlib heapq html http.client imaplib inspect io ipaddress itertools json locale logging mailbox
        math mimetypes multiprocessing operator os pathlib pickle platform plistlib poplib pprint queue random
        re sched secrets selectors shelve shlex shutil smtplib socket sqlite3 ssl statistics string struct
        subprocess sys tarfile tempfile textwrap threading time tokenize trace traceback types typing unittest
        urllib.parse uuid wave weakref xml.dom.minidom xml.etree.ElementTree zipfile zlib""",
    # about 1,400 pairs, for calibration and distillation
    "libs": """
        torch torch.nn torch.nn.functional torch.linalg torch.optim torch.distributions
        numpy numpy.linalg numpy.fft numpy.ma""",
}
# an optional signature, one sentence of 25 to 160 characters, then something that starts like another sentence
FIRST_SENTENCE = re.compile(r"(?:[\w.]+\([^)]*\)(?: -> [^ ]+)? )?(.{25,160}?[.!?])\s+(?=[A-Z`'\"])(.*)")
FEWEST_WORDS, MOST_WORDS = 8, 45  # of a continuation


class DocstringPair(NamedTuple):
    name: str
    first: str  # sentence
    rest: str  # the next 8 to 45 words


def docstring_pairs(source: str) -> list[DocstringPair]:
    """The docstring pairs of "stdlib" or "libs" without repeats, in the order of their names' hashes.

    Deterministic for one version of Python, torch and numpy; another version shifts a few texts.
    """
    if source not in MODULES:
        raise ArgumentError(f"source: {source!r} is not one of {', '.join(MODULES)}")
    found: dict[str, DocstringPair] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated members warn when they are looked at
        for module in MODULES[source].split():
            for name, member in public_members(module):
                pair = split_docstring(name, inspect.getdoc(member) or "")
                if pair:
                    found.setdefault(pair.first.lower(), pair)
    return sorted(found.values(), key=lambda pair: hashlib.sha256(pair.name.encode()).hexdigest())


def public_members(module: str):
    """(qualified name, object) of a module's public functions and classes, and of these classes' own public attributes."""
    try:
        namespace = vars(importlib.import_module(module))
    except ImportError:
        return  # not on this platform (sqlite3, ctypes), or numpy is not installed
    for name, member in sorted(namespace.items()):
        if name.startswith("_") or not callable(member):
            continue
        yield f"{module}.{name}", member
        if inspect.isclass(member):
            for attribute, value in sorted(vars(member).items()):
                if not attribute.startswith("_"):
                    yield f"{module}.{name}.{attribute}", getattr(value, "__func__", value)


def split_docstring(name: str, docstring: str) -> DocstringPair | None:
    match = FIRST_SENTENCE.match(re.sub(r"\s+", " ", docstring))
    words = match[2].split() if match else []
    return DocstringPair(name, match[1], " ".join(words[:MOST_WORDS])) if len(words) >= FEWEST_WORDS else None
