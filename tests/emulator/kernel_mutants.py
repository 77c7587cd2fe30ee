"""Plants the bugs of planted/ one by one: `python tests/emulator/kernel_mutants.py [WORD...]` prints the score, with arguments
of those mutants whose name or test contains one of them."""
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import building  # noqa: E402  (beside this file)
from planted import MUTANTS  # noqa: E402
from planted.mutant import Mutant  # noqa: E402


def outcome(mutant: Mutant) -> str:
    """What became of one mutant: 'killed', 'survived', or why it is no mutant at all."""
    source = building.ROOT / mutant.file
    text = source.read_text()
    if text.count(mutant.old) != 1:
        return f"the text occurs {text.count(mutant.old)} times"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("csrc", "tests/emulator"):
            shutil.copytree(building.ROOT / part, root / part)
        (root / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        built = building.build(mutant.test, root / "test", building.FAST, root)
        if built.returncode:
            return "does not compile: " + built.stderr[-800:]
        done = building.run(root / "test", "--until-failure")
    if done.returncode == 0:
        return "survived"
    if done.returncode == 1 and "FAIL" in done.stdout:
        return "killed"
    return f"died with {done.returncode}: {done.stderr[-400:]}"


def main(words: list[str]) -> None:
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name or word in mutant.test for word in words)]
    outcomes = []
    for mutant in chosen:
        outcomes.append(outcome(mutant))
        print(f"{outcomes[-1]:10} {mutant.test:20} {mutant.name}", flush=True)
    print(f"{outcomes.count('killed')} of {len(chosen)} killed")


if __name__ == "__main__":
    main(sys.argv[1:])
