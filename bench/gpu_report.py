"""What bench/gpu.sh has found so far, as one JSON file and a table; and what it needs before it can start.

    python bench/gpu_report.py needs | installed WORK | sanitizers WORK | report WORK OUT"""
import argparse
import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = ("nvcc", "g++", "cmake", "ninja")
RACES = ("targets", "models", "compiled", "group", "swiglu", "backward", "monarch_64", "monarch_4",
         "sparse24", "dictionary", "low_rank_sparse")
TO_TEST = ("pytest", "pytest-timeout", "hypothesis")
# H200, bf16: (op, k, n, r) -> {m: (microseconds or None, times as fast as the better of pair and compiled pair)}
TARGETS = {
    ("low_rank", 4096, 4096, 512): {1: (5.0, 1.35), 4: (5.0, 1.35), 8: (5.0, 1.35), 16: (5.0, 1.35), 64: (6.0, 1.3),
                                    256: (7.5, 1.25), 1024: (16.5, 1.15)},
    ("low_rank", 4096, 14336, 1024): {1: (12.8, 1.12), 256: (18, 1.15), 1024: (66, 1.05)},
    ("low_rank", 768, 768, 192): {1: (3.3, 1.4), 4: (3.3, 1.4), 8: (3.3, 1.4), 16: (3.3, 1.4), 64: (3.3, 1.4),
                                  4096: (7.8, 1.25)},
    ("low_rank_group", 4096, 4096, 512): {1: (9.8, 1.6)},
    ("low_rank_swiglu", 4096, 14336, 1024): {1: (23.5, 1.3)},
    ("low_rank_backward", 768, 768, 96): {4096: (None, 1.15)},
    ("low_rank_backward", 4096, 4096, 128): {4096: (None, 1.15)},
    ("monarch", 4096, 4096, 1): {1: (3.2, 3), 256: (4.5, 2.5), 4096: (22, 2.5)},  # 64 blocks; the others 4
    ("monarch", 4096, 4096, 256): {4096: (112, 1.25)},
    ("monarch", 768, 768, 48): {4096: (6.5, 2)},
    ("sparse24", 4096, 4096, 2): {1: (7, 1.45), 16: (7, 1.45), 64: (7, 1.45), 1024: (None, 1.25),
                               4096: (None, 1.25)},  # the pair: the dense layer; and as fast as torch's 2:4
    ("low_rank_sparse", 4096, 4096, 512): {1: (5.8, 4), 4096: (None, 1.1)},  # 3 % of entries; the pair: the published method
}


def missing() -> list[str]:
    """What a build without a network and the tests need and this machine lacks."""
    project = re.findall(r'"([a-z][\w.-]*)(?:>=([\d.]+))?[^"]*"', "".join(
        re.findall(r"^(?:requires|dependencies) = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)))
    found = [lacks(name, least) for name, least in [*project, *((name, "") for name in TO_TEST)]]
    return [one for one in found if one] + [name for name in PROGRAMS if not shutil.which(name) and not importlib.util.find_spec(name)]


def lacks(name: str, least: str) -> str:
    """"" or how a package falls short."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name}>={least}" if least else name
    return f"{name}>={least} (found {version})" if numbers(version) < numbers(least) else ""


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def installed(work: Path) -> int:
    """1 where Python finds another lowfat before the one in work/site, or that one has no kernels for a GPU."""
    import lowfat

    here = Path(lowfat.__file__).resolve().is_relative_to(work.resolve())
    has_kernels = lowfat.kernels().get("low_rank", {}).get("cuda")
    if not here:
        print(f"another lowfat comes first: {lowfat.__file__}; uninstall it")
    elif not has_kernels:
        print("the lowfat that was built has no CUDA kernels")
    return 0 if here and has_kernels else 1


def sanitizer_rows(work: Path) -> list[dict]:
    """A planted fault must be found (exit code 9), in our kernels none."""
    path = work / "sanitizers.csv"
    if not path.exists():
        return []
    rows = []
    for tool, *name, code in csv.reader(path.open()):
        expected = 9 if name[0].startswith("planted") else 0
        rows.append({"tool": tool, "what": ",".join(name), "code": int(code), "passed": int(code) == expected})
    return rows


def report(work: Path, out: Path) -> dict:
    """Everything that the phases left in `work`; nothing where one has not run."""
    found = {"machine": machine(), "commit": commit(), "phases": lines(out / "phases")}
    for name in ("conformance", "variants", *RACES):
        path = work / f"{name}.json"
        found[name] = json.loads(path.read_text()) if path.exists() else None
    found["tests"], found["sanitizers"] = tests(work / "tests.xml"), sanitizer_rows(work)
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def tests(path: Path) -> dict | None:
    if not path.exists():
        return None
    suite = xml.parse(path).getroot().find("testsuite")
    failed = [f"{case.get('classname')}.{case.get('name')}" for case in suite.iter("testcase")
              if case.find("failure") is not None or case.find("error") is not None]
    return {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")} | {"failed": failed}


def machine() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else ""


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def table(found: dict) -> str:
    text = ["", f"{found['machine']}, commit {found['commit']}; " + "; ".join(f"phase {line}" for line in found["phases"])]
    if cases := found["conformance"]:
        wrong = [row["case"] for row in cases if row["passed"] is False]
        ran = sum(row["passed"] is not None for row in cases)
        text.append(f"conformance: {ran - len(wrong)} of {ran} passed" + "".join(f"\n  FAIL {name}" for name in wrong))
    if suite := found["tests"]:
        text.append(f"tests: {suite['tests']}, skipped {suite['skipped']}, failed {len(suite['failed'])}")
        text += [f"  FAIL {name}" for name in suite["failed"]]
    text += [f"{'pass' if row['passed'] else 'FAIL'} {row['tool']}: {row['what']} (exit code {row['code']})"
             for row in found["sanitizers"]]
    rows = target_rows(found)
    if rows:
        text += ["", f"{'op':18}{'k -> n, rank':20}{'m':>5}  {'ran':9}" + "".join(
            f"{title:>8}" for title in ("us", "target", "ratio", "target", "chain", "floor"))]
        for row in rows:
            said = "" if row["met"] else " ".join(["  MISSED", *row["failed_gates"]])
            target_us, chain = (f"{row[name]:8.{digits}f}" if row[name] else f"{'-':>8}"
                                for name, digits in (("target_us", 1), ("chain", 2)))
            text.append(f"{row['op']:18}{row['sizes']:20}{row['m']:>5}  {row['ran']:9}{row['us']:8.2f}{target_us}"
                        f"{row['ratio']:8.2f}{row['target_ratio']:8.2f}{chain}{row['of_floor']:8.0%}{said}")
    if variants := found["variants"]:
        faster = sum(row["two_over_one"] < 1 for row in variants)
        bad = [row for row in variants if not row["same_bits"] or row["wrong_elements"]]
        text.append(f"decode: two launches were faster in {faster} of {len(variants)} races; {len(bad)} with wrong results")
    return "\n".join(text)


def target_rows(found: dict) -> list[dict]:
    """The measured rows that have a target, met where both its time and its ratio are reached."""
    rows = []
    for race in filter(None, (found.get(name) for name in RACES if name not in ("models", "compiled"))):
        op, chains = race["header"]["op"], {key(row): row["faster"] for row in race["chains"]}
        compiled = {key(row): row for row in (found["compiled"] or {"rows": []})["rows"]} if op == "low_rank" else {}
        rows += [judged(op, row, compiled.get(key(row), row), chains.get(key(row))) for row in race["rows"]
                 if row["m"] in TARGETS.get((op, row["k"], row["n"], row["r"]), {})]
    return rows


def key(row: dict) -> tuple:
    return row["k"], row["n"], row["r"], row["m"]


def judged(op: str, row: dict, raced: dict, chain: float | None) -> dict:
    """raced: the row where torch.compile took part, if there is one."""
    target_us, target_ratio = TARGETS[op, row["k"], row["n"], row["r"]][row["m"]]
    ratio = min(row["faster"], raced["compiled_us"] / raced["us"] if "compiled_us" in raced else row["faster"])
    met = ratio >= target_ratio and not row["failed_gates"] and (target_us is None or row["us"] <= target_us)
    met = met and row["us"] <= row.get("semi_structured_us", row["us"])
    return {"op": op, "sizes": f"{row['k']} -> {row['n']}, {row['r']}", "m": row["m"], "ran": row["ran"].split()[0],
            "us": row["us"], "target_us": target_us, "ratio": ratio, "target_ratio": target_ratio, "chain": chain,
            "of_floor": row["of_floor"], "failed_gates": row["failed_gates"], "met": met}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["needs", "installed", "sanitizers", "report"])
    parser.add_argument("folders", nargs="*", type=Path)
    options = parser.parse_args()
    if options.verb == "needs":
        found = missing()
        print("missing: " + ", ".join(found) if found else "all that a build needs is here")
        return 1 if found else 0
    if options.verb == "installed":
        return installed(*options.folders)
    if options.verb == "sanitizers":
        return 0 if all(row["passed"] for row in sanitizer_rows(*options.folders)) else 1
    print(table(report(*options.folders)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
