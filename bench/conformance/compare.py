"""The same bits from a GPU as from the emulator? `python bench/conformance/compare.py GPU_FILE EMULATOR_FILE [--out JSON]`"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np


def read(path: Path) -> dict[str, np.ndarray]:
    """case -> words, of a file that bench/conformance/conformance.cu wrote. A file that was cut off raises ValueError."""
    data, at, cases = path.read_bytes(), 0, {}

    def take(size: int) -> bytes:
        nonlocal at
        piece = data[at:at + size]
        if len(piece) != size:
            raise ValueError(f"{path}: cut off after {len(cases)} cases")
        at += size
        return piece

    while at < len(data):
        name = take(int.from_bytes(take(4), "little")).decode()
        cases[name] = np.frombuffer(take(4 * int.from_bytes(take(4), "little")), "<u4")
    return cases


def compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[dict]:
    """One row for each case: passed, or what differs; None where the GPU did not run it."""
    rows = []
    for name in [*expected, *(found.keys() - expected.keys())]:
        passed, why = None, "not run on this GPU"
        if name in found and name in expected:
            why = difference(found[name], expected[name])
            passed = not why
        elif name in found:
            passed, why = False, "not in the emulator's file"
        rows.append({"case": name, "words": len(expected.get(name, [])), "passed": passed, "why": why})
    return rows


def difference(found: np.ndarray, expected: np.ndarray) -> str:
    if len(found) != len(expected):
        return f"{len(found)} words, expected {len(expected)}"
    wrong = np.flatnonzero(found != expected)
    if not len(wrong):
        return ""
    first = wrong[0]
    return f"{len(wrong)} of {len(found)} words differ; word {first} is {found[first]:#010x}, expected {expected[first]:#010x}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("found", type=Path)
    parser.add_argument("expected", type=Path)
    parser.add_argument("--out", type=Path, help="writes the rows as JSON")
    options = parser.parse_args()
    rows = compare(read(options.found), read(options.expected))
    for row in rows:
        print({True: "pass", False: "FAIL", None: "----"}[row["passed"]], row["case"], row["why"])
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    ran = [row for row in rows if row["passed"] is not None]
    print(f"{sum(row['passed'] for row in ran)} of {len(ran)} passed, {len(rows) - len(ran)} not run")
    return 0 if ran and all(row["passed"] for row in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
