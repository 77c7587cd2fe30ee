"""bench/gpu.sh without a GPU says so and fails; with programs that pretend to be a GPU's, its phases resume, stop and fail."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")

# python of a machine with a GPU: what concerns a GPU is pretended, and told to $FAKE/log; the reports are the real ones
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *get_device_capability*) echo 90 ;;
  *import\\ torch*) ;;
  *gpu_report.py\\ needs*) echo needs >> "$FAKE/log" ;;
  *gpu_report.py\\ installed*) ;;
  *gpu_report.py*|*compare.py*) exec {python} "$@" ;;
  *-m\\ pip*) echo "pip $LOWFAT_CUDA_ARCHS" >> "$FAKE/log" ;;
  *-m\\ pytest*) echo tests >> "$FAKE/log"; last=${*: -1}; cp "$FAKE/tests.xml" "${last#*=}"; exit "$(cat "$FAKE/tests")" ;;
  *\\ doctor) ;;
  *\\ bench\\ low_rank*) echo bench >> "$FAKE/log"; cp "$FAKE/race.json" "${@: -1}.json"; touch "${@: -1}.png" ;;
esac
"""
# compilers make programs that write one case, or the variants' rows, to the file they are given
COMPILER = """#!/usr/bin/env bash
while [ "$1" != -o ]; do shift; done
made=words
[ "${2##*/}" = decode_variants ] && made=variants.json
printf '#!/usr/bin/env bash\\ncp "$FAKE/%s" "$1"\\n' $made > "$2"
chmod +x "$2"
"""
ROW = {"model": "", "layer": "", "k": 4096, "n": 4096, "r": 512, "m": 1, "dtype": "bfloat16", "ran": "kernel (one launch)",
       "us": 4.5, "pair_us": 6.3, "dense_us": 9.0, "compiled_us": 6.75, "faster": 1.4, "faster_low": 1.3, "faster_high": 1.5,
       "floor_us": 1.95, "of_floor": 0.43, "failed_gates": []}
VARIANT = {"k": 4096, "n": 4096, "r": 512, "m": 1, "one_launch_us": 5, "two_launches_us": 4.5, "two_over_one": 0.9, "low": 0.8,
           "high": 1.0, "same_bits": True, "wrong_elements": 0}


@pytest.fixture
def pretended(tmp_path):
    """(run, the folder of fakes): run(*arguments) is the script on a machine that pretends."""
    fake, path = tmp_path / "fake", tmp_path / "bin"
    fake.mkdir()
    path.mkdir()
    for name, text in {"python": PYTHON.replace("{python}", sys.executable), "nvcc": COMPILER, "g++": COMPILER}.items():
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    (fake / "words").write_bytes(b"".join([(4).to_bytes(4, "little"), b"case", (1).to_bytes(4, "little"), b"bits"]))
    (fake / "tests").write_text("0")
    (fake / "tests.xml").write_text('<testsuites><testsuite tests="2" failures="0" errors="0" skipped="1"/></testsuites>')
    (fake / "race.json").write_text(json.dumps({"rows": [ROW], "chains": [ROW], "header": {"op": "low_rank"}, "ceilings": {}}))
    (fake / "variants.json").write_text(json.dumps([VARIANT]))

    def run(*arguments):
        environment = {**os.environ, "PATH": f"{path}:/usr/bin:/bin", "PYTHON": str(path / "python"), "FAKE": str(fake),
                       "LOWFAT_WORK": str(tmp_path / "work"), "CXX": "g++"}
        (fake / "log").write_text("")
        command = ["bash", str(SCRIPT), str(tmp_path / "out"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run, fake


def report():
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "bench" / "gpu_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    done = subprocess.run(["bash", str(SCRIPT), str(tmp_path / "out")], env={**os.environ, "PYTHON": sys.executable,
                          "LOWFAT_WORK": str(tmp_path / "work")}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("not run: no CUDA device\n", 1)
    assert not any((tmp_path / "out").iterdir())


@needs_bash
def test_arguments(tmp_path):
    for arguments in ([], [""], [str(tmp_path), "--phase"], [str(tmp_path), "--phase", "6"], [str(tmp_path), "1"]):
        assert subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True).returncode == 2


@needs_bash
def test_phases_run_once_and_are_reported(pretended, tmp_path):
    run, fake = pretended
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (fake / "log").read_text().split("\n")[:-1] == ["needs", "pip 90a-real", "tests"] + ["bench"] * 7
    assert (tmp_path / "out" / "phases").read_text().split("\n")[:-1] == [f"{i} passed" for i in range(1, 6)]
    assert "conformance: 1 of 1 passed" in done.stdout and "not run: no compute-sanitizer" in done.stdout
    assert "4096 -> 4096, 512" in done.stdout and "two launches were faster in 1 of 1 races" in done.stdout
    assert "MISSED" not in done.stdout
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["tests"] == {"tests": 2, "failures": 0, "errors": 0, "skipped": 1, "failed": []}
    assert found["targets"]["rows"] == [ROW] and found["variants"] == [VARIANT] and found["conformance"][0]["passed"]
    assert len(list((tmp_path / "out").iterdir())) <= 8 and not any(path.is_dir() for path in (tmp_path / "out").iterdir())

    assert run().returncode == 0 and (fake / "log").read_text() == ""  # nothing is left to do
    assert run("--phase", "4").returncode == 0 and (fake / "log").read_text() == "bench\n" * 7


@needs_bash
def test_a_failed_phase_fails_the_run_and_comes_again(pretended, tmp_path):
    run, fake = pretended
    (fake / "tests").write_text("1")
    done = run()
    assert done.returncode == 1 and "2 failed" in (tmp_path / "out" / "phases").read_text()
    assert (fake / "log").read_text().count("bench") == 7  # the others go on
    (fake / "tests").write_text("0")
    assert run().returncode == 0 and (fake / "log").read_text() == "tests\n"


@needs_bash
def test_a_conformance_case_that_crashes_does_not_hide_the_others(pretended, tmp_path):
    run, fake = pretended
    (fake / "words").write_text("")
    (fake.parent / "bin" / "nvcc").write_text("""#!/usr/bin/env bash
while [ "$1" != -o ]; do shift; done
printf '#!/usr/bin/env bash\\necho "$2" >> "$FAKE/log"; echo "case $(($2 + 4)) x" >&2; [ "$2" -ge 10 ]\\n' > "$2"
chmod +x "$2"
""")
    assert run("--phase", "1").returncode == 1  # nothing to compare
    assert (fake / "log").read_text() == "needs\npip 90a-real\n0\n5\n10\n"


@needs_bash
def test_after_a_failed_build_nothing_runs(pretended, tmp_path):
    run, fake = pretended
    (fake.parent / "bin" / "nvcc").write_text("#!/usr/bin/env bash\nexit 1\n")
    assert run().returncode == 1
    assert (tmp_path / "out" / "phases").read_text() == "1 failed\n" and "tests" not in (fake / "log").read_text()


def test_targets_are_compared_with_the_better_pair():
    module, targets = report(), {"rows": [ROW], "chains": [ROW], "header": {"op": "low_rank"}}
    assert [row["met"] for row in module.target_rows({"targets": targets, "compiled": None})] == [True]
    slower = {"rows": [ROW | {"compiled_us": 5.0}]}  # of the compiled pair, 1.11 times
    assert [row["met"] for row in module.target_rows({"targets": targets, "compiled": slower})] == [False]
    for change in ({"us": 5.1}, {"faster": 1.3}, {"failed_gates": ["G3"]}):
        missed = targets | {"rows": [ROW | change]}
        assert [row["met"] for row in module.target_rows({"targets": missed, "compiled": None})] == [False]


def test_a_target_without_a_time_and_a_race_without_a_chain():
    """Backward has a ratio alone to reach; against a compiled composition in its own race, if that is the better one."""
    module = report()
    row = {name: value for name, value in ROW.items() if name != "compiled_us"} | {"k": 768, "n": 768, "r": 96, "m": 4096}
    for change, met in (({}, True), ({"faster": 1.1}, False), ({"compiled_us": 4.6}, False)):
        race = {"header": {"op": "low_rank_backward"}, "rows": [row | change], "chains": []}
        [found] = module.target_rows({"backward": race, "compiled": None})
        assert (found["met"], found["target_us"], found["chain"]) == (met, None, None)


@pytest.mark.parametrize("name, row", [("monarch_64", {"r": 1}), ("monarch_4", {"r": 256, "m": 4096, "us": 110})])
def test_monarch_has_targets_by_its_blocks(name, row):
    race = {"header": {"op": "monarch"}, "rows": [ROW | {"us": 3, "faster": 3.0, "compiled_us": 900} | row], "chains": []}
    [found] = report().target_rows({name: race, "compiled": None})
    assert found["met"] and found["target_ratio"] > 1


def test_prefill_by_2_of_4_has_to_be_as_fast_as_torchs_own():
    row = {name: value for name, value in ROW.items() if name != "compiled_us"} | {"r": 2, "m": 1024, "us": 33}
    for change, met in (({}, True), ({"semi_structured_us": 33.0}, True), ({"semi_structured_us": 32.9}, False),
                        ({"faster": 1.2}, False)):
        race = {"header": {"op": "sparse24"}, "rows": [row | change], "chains": []}
        assert [found["met"] for found in report().target_rows({"sparse24": race, "compiled": None})] == [met]


def test_sanitizers_must_find_what_was_planted(tmp_path):
    (tmp_path / "sanitizers.csv").write_text("memcheck,planted write,9\nracecheck,planted race,0\nmemcheck,low_rank, each,0\n"
                                             "racecheck,low_rank,9\nracecheck,low_rank,124\n")
    assert [row["passed"] for row in report().sanitizer_rows(tmp_path)] == [True, False, True, False, False]
    assert report().sanitizer_rows(tmp_path / "none") == []


def test_a_missing_or_old_package_is_named(monkeypatch):
    module = report()
    versions = {"pybind11": "2.13.6", "scikit-build-core": "0.12.1", "torch": "2.11.0+cu130"}
    monkeypatch.setattr(module.metadata, "version", lambda name: versions[name] if name in versions else missing(name))

    def missing(name):
        raise module.metadata.PackageNotFoundError(name)

    found = module.missing()
    assert "pybind11>=3.0 (found 2.13.6)" in found and "typer" in found and "transformers>=5.17" in found
    assert not any(name.startswith(("scikit-build-core", "torch")) for name in found)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(300)
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("name", ["decode_variants", "planted_faults"])
def test_nvcc_compiles(name, tmp_path):
    built = subprocess.run(["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-gencode=arch=compute_90a,code=sm_90a",
                            str(ROOT / "bench" / f"{name}.cu"), "-o", str(tmp_path / name)], capture_output=True, text=True)
    assert built.returncode == 0 and "warning" not in built.stderr, built.stderr
