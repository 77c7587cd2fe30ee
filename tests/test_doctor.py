"""`lowfat doctor` without the hardware: the probes are faked, the advice is judged on the facts they would give."""
import copy
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from rich.console import Console

from lowfat import _native, doctor, show

H200 = {"name": "NVIDIA H200", "driver": "580.65.06", "arch": "9.0", "memory": "143771 MiB"}
HEALTHY = {
    "versions": {"python": "3.12.1", "torch": "2.13.0+cu130", "lowfat": "0.1.0", "transformers": "5.23.0", "rich": "15.0.0"},
    "needs": {"torch": "2.11", "transformers": "5.17", "rich": ""},
    "library": "/site-packages/lowfat/liblowfat_ops.so",
    "why_not": None,
    "kernels": {"low_rank": {"cpu": ["avx512_bf16", "avx2_fma", "scalar"], "cuda": ["sm_80", "sm_90a", "compute_90"]}},
    "build": {"version": "0.1.0", "torch": "2.13.0+cpu", "cuda": "13.0.88", "cuda_archs": ["sm_80", "sm_90a", "compute_90"]},
    "cpu": {"name": "Some CPU", "level": "avx512_bf16", "threads": 2},
    "gpus": None,
    "cuda": {"built": None, "devices": [], "fault": None},
    "environment": {},
}
WITH_GPU = {"gpus": [H200], "cuda": {"built": "13.0", "devices": [{"name": "NVIDIA H200", "arch": 90, "memory": 1}]}}
UNTRIED = "have not run on a GPU yet"


def facts(**changes) -> dict:
    """HEALTHY with changes; a dict in changes is merged into the one it changes."""
    known = copy.deepcopy(HEALTHY)
    for key, value in changes.items():
        known[key] = known[key] | value if isinstance(value, dict) and isinstance(known[key], dict) else value
    return known


def test_nothing_to_say_about_a_healthy_machine():
    assert doctor.advice(facts()) == []
    (only,) = doctor.advice(facts(**WITH_GPU))
    assert UNTRIED in only


@pytest.mark.parametrize("changes, said", [
    # kernels
    ({"library": None, "why_not": "LOWFAT_DISABLE_KERNELS=1"}, ["unset it"]),
    ({"library": None, "why_not": "/a/liblowfat_ops.so does not load with torch 2.13 (undefined symbol: y)"},
     ["undefined symbol: y", "plain torch reference", "pip install"]),
    ({"build": {"version": "0.0.9"}}, ["0.0.9", "0.1.0", "again"]),
    # versions
    ({"versions": {"transformers": "5.3.1"}}, ["transformers is 5.3.1", "5.17", "pip install -U transformers"]),
    ({"versions": {"transformers": None}}, ["transformers is not installed", "transformers>=5.17"]),
    ({"versions": {"rich": None}}, ["'rich'"]),
    # processor
    ({"cpu": {"level": "avx2_fma"}, "environment": {"LOWFAT_CPU_LEVEL": "avx2_fma"}}, ["held at avx2_fma", "unset"]),
    ({"cpu": {"level": "avx2_fma"}, "environment": {"LOWFAT_CPU_LEVEL": "avx512_bf16"}},
     ["asks for avx512_bf16", "has avx2_fma"]),
    # GPU
    ({"gpus": [H200]}, ["NVIDIA H200", "no CUDA", "pytorch.org"]),
    ({"gpus": [H200], "cuda": {"built": "13.0"}, "environment": {"CUDA_VISIBLE_DEVICES": ""}},
     ["CUDA_VISIBLE_DEVICES=''", "NVIDIA H200"]),
    ({"gpus": [H200 | {"driver": "550.54"}], "cuda": {"built": "13.0"}}, ["driver is 550.54", "CUDA 13.0", "580"]),
    ({"gpus": [H200], "cuda": {"built": "13.0"}}, ["does not see NVIDIA H200", "580.65.06"]),
    (WITH_GPU | {"build": {"cuda": "", "cuda_archs": []}}, ["without CUDA kernels", "nvcc"]),
    (WITH_GPU | {"gpus": [H200 | {"driver": "570.1"}]}, ["driver is 570.1", "13.0.88", "580"]),
    ({"gpus": [H200], "cuda": {"built": "13.0", "devices": [{"name": "T4", "arch": 75, "memory": 1}]}},
     ["built for sm_80, sm_90a, compute_90; T4 is sm_75", "LOWFAT_CUDA_ARCHS=75-real"]),
    ({"gpus": [H200], "cuda": {"built": "13.0", "fault": "CUDA error: unspecified launch failure"}},
     ["unspecified launch failure", "restart the process"]),
])
def test_each_problem_is_named_with_what_to_do(changes, said):
    (advice,) = [line for line in doctor.advice(facts(**changes)) if UNTRIED not in line]
    assert all(part in advice for part in said), advice


@pytest.mark.parametrize("changes, said", [
    ({}, ["CPU runs lowfat's avx512_bf16 kernels", "CUDA kernels are compiled", "cannot be used here because",
          "2.13.0+cpu, is built without CUDA", "pytorch.org", "never run on a GPU"]),
    ({"cuda": {"built": "13.0"}}, ["torch sees no GPU", "an NVIDIA GPU and its driver"]),
    ({"build": {"cuda": "", "cuda_archs": []}}, ["CPU runs lowfat's avx512_bf16 kernels."]),
    (WITH_GPU, ["NVIDIA H200 the CUDA kernels", "never run on a GPU"]),
    ({"cuda": {"built": "13.0", "devices": [{"name": "T4", "arch": 75, "memory": 1}]}}, ["on T4 every op runs its plain"]),
    ({"library": None, "why_not": "LOWFAT_DISABLE_KERNELS=1"}, ["Every op runs its plain torch reference"]),
])
def test_one_sentence_says_what_runs_and_what_cannot(changes, said):
    summary = doctor.summary(facts(**{"versions": {"torch": "2.13.0+cpu"}} | changes))
    assert summary.endswith(".") and summary.count(". ") == 0
    assert all(part in summary for part in said), summary


@pytest.mark.parametrize("changes", [
    {"gpus": [H200]},  # torch without CUDA
    {"gpus": [H200], "cuda": {"built": "13.0"}, "environment": {"CUDA_VISIBLE_DEVICES": ""}},
    {"gpus": [H200], "cuda": {"built": "13.0", "fault": "CUDA error: unspecified launch failure"}},
    {"cuda": {"built": "13.0", "fault": "CUDA error: unspecified launch failure"}},
    WITH_GPU | {"cuda": WITH_GPU["cuda"] | {"fault": "CUDA error: unspecified launch failure"}}])
def test_where_a_gpu_is_the_cause_is_left_to_the_advice(changes):
    known = facts(**changes)
    summary = doctor.summary(known)
    assert "cannot be used here before the problem named in the advice" in summary and doctor.advice(known)
    assert "need" not in summary and "sees no GPU" not in summary and "the CUDA kernels, which" not in summary


def test_a_compiled_library_needs_no_second_installation_for_another_torch():
    # one library serves every torch from 2.11 on: only where it has no CUDA kernels is there something to build
    assert "lowfat again" not in doctor.advice(facts(gpus=[H200]))[0]
    assert "lowfat again" in doctor.advice(facts(gpus=[H200], build={"cuda": "", "cuda_archs": []}))[0]


@pytest.mark.parametrize("width", [40, 80])
def test_no_word_is_cut(monkeypatch, capsys, width):
    known = facts(library="/home/a-long-name/" + "some-environment/" * 5 + "liblowfat_ops.so", why_not=None)
    monkeypatch.setattr(show, "out", Console(width=width))  # COLUMNS counts only where it was not set before the import
    show.show_doctor(known, doctor.summary(known), ["a piece of advice about " + known["library"] + " and more words"])
    shown = capsys.readouterr().out
    assert set(doctor.summary(known).split()) | {known["library"]} <= set(shown.split())
    assert all(len(line) <= width or len(line.split()) <= 2 for line in shown.splitlines())


@pytest.mark.parametrize("archs, device, runs", [
    (["sm_80"], 80, True), (["sm_80"], 86, True), (["sm_86"], 80, False), (["sm_80"], 90, False), (["sm_90a"], 90, True),
    (["sm_90a"], 100, False), (["sm_90"], 100, False), (["compute_90"], 90, True), (["compute_90"], 120, True),
    (["compute_90"], 89, False), (["sm_80", "compute_90"], 103, True), ([], 80, False)])
def test_which_device_runs_which_code(archs, device, runs):
    """Machine code holds within one major version, `a` code on one device, PTX on everything newer (CUDA's own rules)."""
    assert doctor.runs_on(archs, device) is runs


def test_facts_of_this_machine_are_json_and_complete():
    known = doctor.facts()
    assert json.loads(json.dumps(known)) == known
    assert known.keys() == HEALTHY.keys()
    assert known["versions"]["torch"] == torch.__version__ and known["kernels"] == _native.kernels()
    assert all(isinstance(line, str) for line in doctor.advice(known))


def test_driver_probe(monkeypatch):
    def smi(command, **_):
        assert command[0] == "nvidia-smi"
        lines = "NVIDIA H200, 580.65.06, 9.0, 143771 MiB\nT4, 580.65.06, 7.5, 15360 MiB\n"
        return types.SimpleNamespace(returncode=0, stdout=lines)

    monkeypatch.setattr(subprocess, "run", smi)
    assert doctor.gpus() == [H200, {"name": "T4", "driver": "580.65.06", "arch": "7.5", "memory": "15360 MiB"}]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=9, stdout="no driver"))
    assert doctor.gpus() is None


@pytest.mark.parametrize("error", [FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 20)])
def test_no_driver_is_a_fact_not_an_error(monkeypatch, error):
    def absent(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", absent)
    assert doctor.gpus() is None


def test_a_faulty_device_is_reported(monkeypatch):
    def fault(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fault)
    assert doctor.cuda()["fault"] == "CUDA error: an illegal memory access was encountered"


def test_versions_import_nothing():
    """Reading facts must not import transformers: two seconds, and it may be what is broken."""
    code = "import sys; from lowfat import doctor; doctor.facts(); print('transformers' in sys.modules)"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "False\n", done.stderr
