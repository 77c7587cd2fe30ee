"""What a planted bug is."""
from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str  # from the root of the repository
    old: str  # occurs exactly once
    new: str
    test: str  # the executable that must fail
