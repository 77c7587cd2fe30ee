#!/usr/bin/env bash
# What a machine with an NVIDIA GPU is asked, once there is one:   bench/gpu.sh OUT [--phase N]
#
#   1 build without a network, and conformance of the emulator    2 the tests marked gpu    3 sanitizers
#   4 ceilings and benches                                        5 the race of decode's two ways to launch
#
# A phase takes at most 8 minutes and is not repeated once it has passed (OUT/phases says which have); --phase N runs just
# that one, again if need be. OUT gets gpu.json with all that was found, log.txt and pictures; what is built stays in build/gpu.
# PYTHON: the interpreter that has torch. LOWFAT_WHEELS: a folder of wheels to install first; a lowfat wheel among them is
# used instead of building one. LOWFAT_WORK: another folder than build/gpu.
set -uo pipefail

usage() { echo "usage: bench/gpu.sh OUT [--phase N], N from 1 to 5" >&2; exit 2; }
[ $# -eq 1 ] || { [ $# -eq 3 ] && [ "$2" = --phase ] && [[ $3 =~ ^[1-5]$ ]]; } || usage
[ -n "$1" ] || usage
only=${3:-}
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
mkdir -p "${LOWFAT_WORK:=build/gpu}" || exit 2
work=$(cd "$LOWFAT_WORK" && pwd)
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 COLUMNS=100
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

"$python" -c 'import torch' 2> /dev/null || { echo "not run: $python has no torch (set PYTHON)"; exit 1; }
if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2> /dev/null; then
  echo "not run: no CUDA device"
  exit 1
fi
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
[ "$arch" = 90 ] && arch=90a  # wgmma and setmaxnreg
gencode=-gencode=arch=compute_$arch,code=sm_$arch

lowfat() { "$python" -c 'from lowfat.cli import main; main()' "$@"; }

# Installs from what is here alone, and says what is missing.
build() {
  rm -rf "$work/site"
  if [ -n "${LOWFAT_WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --upgrade --target "$work/site" "$LOWFAT_WHEELS"/*.whl || return 1
  fi
  "$python" bench/gpu_report.py needs || return 1
  compgen -G "$work/site/lowfat/liblowfat_ops.so" > /dev/null ||
    LOWFAT_CUDA=ON LOWFAT_CUDA_ARCHS=$arch-real CUDAFLAGS=-lineinfo \
      "$python" -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target "$work/site" . || return 1
  "$python" bench/gpu_report.py installed "$work" && lowfat doctor
}

conformance() {
  local includes=(-Icsrc -Itests/emulator -std=c++17)
  nvcc "${includes[@]}" -O1 -lineinfo "$gencode" bench/conformance/conformance.cu -o "$work/conformance" || return 1
  "${CXX:-g++}" "${includes[@]}" -O1 -Wno-psabi -rdynamic -x c++ bench/conformance/conformance.cu -o "$work/emulated" -ldl || return 1
  "$work/emulated" "$work/emulated.bin" 2> /dev/null || return 1
  local first=0 last
  until timeout 60 "$work/conformance" "$work/conformance.bin" "$first" 2> "$work/conformance.txt"; do
    tail -n 2 "$work/conformance.txt"
    last=$(sed -n 's/^case \([0-9]*\) .*/\1/p' "$work/conformance.txt" | tail -n 1)
    { [ -n "$last" ] && [ "$last" -ge "$first" ]; } || return 1
    first=$((last + 1))  # the case that crashed or hung has no words, and fails the comparison
  done
  "$python" bench/conformance/compare.py "$work/conformance.bin" "$work/emulated.bin" --out "$work/conformance.json"
}

tests() { "$python" -m pytest -q -m "gpu and not nightly" --junitxml="$work/tests.xml"; }

variants() { nvcc -std=c++17 -O3 -lineinfo -Icsrc "$gencode" bench/decode_variants.cu -o "$work/decode_variants"; }

# One line each: what was run, and 9 where the tool found something.
sanitized() {
  local tool=$1 name=$2
  shift 2
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_LAUNCH_BLOCKING=1 timeout 200 "$sanitizer" --tool "$tool" --error-exitcode 9 \
    --target-processes application-only "$@" > "$work/sanitizer.txt" 2>&1
  local code=$?
  tail -n 3 "$work/sanitizer.txt"
  echo "$tool,$name,$code" | tee -a "$work/sanitizers.csv"
}

sanitizers() {
  : > "$work/sanitizers.csv"
  if ! sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer); then
    echo "not run: no compute-sanitizer"
    return 0
  fi
  nvcc -std=c++17 "$gencode" bench/planted_faults.cu -o "$work/planted_faults" && variants || return 1
  sanitized memcheck "planted write past the end" "$work/planted_faults" out-of-bounds
  sanitized racecheck "planted race" "$work/planted_faults" race
  for tool in memcheck racecheck; do
    sanitized $tool "each kernel" "$python" bench/each_kernel_once.py
    sanitized $tool "low_rank, both ways to launch" "$work/decode_variants" --once
  done
  "$python" bench/gpu_report.py sanitizers "$work"
}

benches() {
  local status=0
  lowfat bench low_rank --device cuda --shapes 4096:4096:512,4096:14336:1024,768:768:192 --rows 1,4,8,16,64,256,1024,4096 \
    --out "$work/targets" || status=1
  lowfat bench low_rank --device cuda --shapes llama-8b,bert-base --rows 1,4,8,16,64,256 --out "$work/models" || status=1
  lowfat bench low_rank_group --device cuda --compiled --shapes 4096:4096:512 --rows 1,8,16 --out "$work/group" || status=1
  lowfat bench low_rank_swiglu --device cuda --compiled --shapes 4096:14336:1024 --rows 1,8,16 --out "$work/swiglu" || status=1
  lowfat bench low_rank_backward --device cuda --shapes 768:768:96,4096:4096:128 --rows 256,4096 --out "$work/backward" ||
    status=1
  lowfat bench monarch --device cuda --compiled --blocks 64 --shapes 4096:4096:1 --rows 1,256,4096 \
    --out "$work/monarch_64" || status=1
  lowfat bench monarch --device cuda --compiled --blocks 4 --shapes 4096:4096:256,768:768:48 --rows 4096 \
    --out "$work/monarch_4" || status=1
  lowfat bench sparse24 --device cuda --shapes 4096:4096:2 --rows 1,16,64,1024,4096 --out "$work/sparse24" || status=1
  lowfat bench dictionary --device cuda --shapes 4096:4096:2048 --rows 1,16 --out "$work/dictionary" || status=1
  lowfat bench low_rank_sparse --device cuda --shapes 4096:4096:512 --rows 1,16,256,4096 --out "$work/low_rank_sparse" ||
    status=1
  timeout 200 "$python" -c 'from lowfat.cli import main; main()' bench low_rank --device cuda --compiled \
    --shapes 4096:4096:512,768:768:192 --rows 1,64 --out "$work/compiled" || status=1
  cp "$work"/{targets,models,compiled}.png "$out" 2> /dev/null
  return $status
}

race() { variants && "$work/decode_variants" "$work/variants.json"; }

run_phase() {
  case $1 in
    1) build && conformance ;;
    2) tests ;;
    3) sanitizers ;;
    4) benches ;;
    5) race ;;
  esac
}

limited() {  # a phase, in a process group that can be ended with all it has started
  set -m
  run_phase "$1" &
  local job=$! left=480
  while kill -0 "$job" 2> /dev/null; do
    sleep 1
    left=$((left - 1))
    [ $left -eq 0 ] && echo "phase $1: stopped after 8 minutes" && kill -TERM -- "-$job"
    [ $left -eq -10 ] && kill -KILL -- "-$job"
  done
  wait "$job"
}

for phase in ${only:-1 2 3 4 5}; do
  [ -z "$only" ] && grep -qx "$phase passed" "$out/phases" 2> /dev/null && continue
  echo "== phase $phase"
  said=failed
  limited "$phase" && said=passed
  { grep -v "^$phase " "$out/phases" 2> /dev/null; echo "$phase $said"; } | sort > "$out/phases.new"
  mv "$out/phases.new" "$out/phases"
  [ "$phase $said" = "1 failed" ] && break  # nothing to test
done 2>&1 | tee -a "$out/log.txt"
"$python" bench/gpu_report.py report "$work" "$out" | tee -a "$out/log.txt"
if grep -q failed "$out/phases"; then exit 1; fi
