"""Docstring pairs: the same in every process, no text twice, and the shape that the demo relies on."""
import os
import subprocess
import sys

import pytest

from lowfat.docstrings import FEWEST_WORDS, MOST_WORDS, docstring_pairs, split_docstring
from lowfat.errors import ArgumentError


@pytest.mark.parametrize("source, fewest", [("stdlib", 800), ("libs", 800)])
def test_enough_pairs_and_none_twice(source, fewest):
    pairs = docstring_pairs(source)
    assert len(pairs) >= fewest  # the demo takes 400 of the one and trains on the other; other Pythons have somewhat fewer
    assert len({pair.first.lower() for pair in pairs}) == len(pairs)
    assert all(FEWEST_WORDS <= len(pair.rest.split()) <= MOST_WORDS for pair in pairs)


@pytest.mark.timeout(300)  # two processes that import torch
def test_the_order_does_not_depend_on_the_process():
    # kills an order that comes from a set or from Python's own hash; two children, as pytest itself replaces hooks of sys
    code = "from lowfat.docstrings import docstring_pairs; print(docstring_pairs('stdlib'))"
    printed = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, check=True,
                              stdout=subprocess.PIPE).stdout for seed in "12"}
    assert len(printed) == 1


def test_a_signature_is_no_sentence_and_short_texts_are_left_out():
    rest = "Then the text goes on for as long as it takes to have eight words."
    pair = split_docstring("f", f"f(x, y) -> int\n\nAdds one number to another number.\n\n{rest}")
    assert pair == ("f", "Adds one number to another number.", rest)
    assert split_docstring("f", "Adds one number to another number. Too short.") is None
    assert split_docstring("f", "") is None


def test_an_unknown_source_is_named():
    with pytest.raises(ArgumentError, match="'web' is not one of stdlib, libs"):
        docstring_pairs("web")
