#!/usr/bin/env bash
# Everything that only a GPU can show, in under nine minutes: builds in place, calls every kernel of each set that the GPU runs (sm80, and
# on Hopper sm90 and sm90patch) once, then measures with sm90 (or what ran of it and sm80; sm90patch stands beside it layer by layer):
# layers beside cuDNN, some of them in TF32, networks, memory, predicted against measured. With what time is left it runs a network in
# TF32, the tests on the device and compute-sanitizer over every kernel; the steps that found no time are a second run's:
# scripts/gpu_check.sh --only 'build|kernel|inference-tf32|errors|layouts|numbers|runtime|check$' OUT_DIR
# Needs no network: Python with torch's CUDA build, nvcc and pytest must be there.
#
#     scripts/gpu_check.sh [--dry] [--only REGEX] OUT_DIR
#
# --dry prints the steps with the seconds that they are expected to take (estimates: no GPU was there to time them) and may take, and
# their commands; --only runs the steps whose names match. OUT_DIR gets one log a step, results.json (name, outcome, seconds and last
# line of every step), environment.json, and the figures under results/<device>, written group by group: what benchmarks/results/<device>
# holds. No failure stops the rest; the exit status is 0 only if every step passed whose tool is there. PYTHON names the interpreter,
# CHECK_SECONDS the time for everything (520).
set -uo pipefail
cd "$(dirname "$0")/.."

dry= only=.
while [[ ${1-} == --* ]]; do
  case $1 in
    --dry) dry=1 ;;
    --only) only=${2:?--only needs a regular expression}; shift ;;
    *) echo "expected --dry, --only REGEX or OUT_DIR, got $1" >&2; exit 2 ;;
  esac
  shift
done
if [[ $# -ne 1 ]]; then
  echo "usage: scripts/gpu_check.sh [--dry] [--only REGEX] OUT_DIR" >&2
  exit 2
fi

mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
python=$(command -v "${PYTHON:-python}") || { echo "PYTHON: expected an interpreter, got ${PYTHON:-python}" >&2; exit 2; }
PATH=$(dirname "$python"):$PATH # ninja lies beside it
SECONDS=0 deadline=${CHECK_SECONDS:-520}
export VGGFAST_CUDA_PLAN=sm80 PYTHONPATH=$PWD PYTHONFAULTHANDLER=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
names=() outcomes=() seconds=() details=()

write_results() {
  for i in "${!names[@]}"; do
    printf '%s\t%s\t%s\t%s\n' "${names[i]}" "${outcomes[i]}" "${seconds[i]}" "${details[i]}"
  done | "$python" -c '
import json, sys
rows = [line.rstrip("\n").split("\t") for line in sys.stdin]
keys = ("step", "outcome", "seconds", "detail")
json.dump([dict(zip(keys, row)) | {"seconds": int(row[2])} for row in rows], open(sys.argv[1], "w"), indent=1)
' "$out/results.json"
}

# step NAME EXPECTED LIMIT {any|gpu} COMMAND...: in seconds; with "gpu" only where there is one.
step() {
  local name=$1 expected=$2 limit=$3 needs=$4 start=$SECONDS outcome detail
  shift 4
  [[ $name =~ $only ]] || return 0
  if [[ $dry ]]; then
    printf '%-22s %4ss %4ss  %-3s  %s\n' "$name" "$expected" "$limit" "$needs" "$*"
    return 0
  fi
  printf '\n==== %s (%ss so far)\n' "$name" "$SECONDS"
  local left=$((deadline - SECONDS)) log=$out/$name.log
  if [[ $needs == gpu && $gpu != found* ]]; then
    outcome="no GPU" detail=$gpu
    echo "not run: $gpu" | tee "$log"
  elif ((left < 5)); then
    outcome="no time" detail="nothing is left of ${CHECK_SECONDS:-520} s"
    echo "$detail" | tee "$log"
  else
    timeout --kill-after=5 $((limit < left ? limit : left)) "$@" >"$log" 2>&1
    local status=$?
    case $status in
      0) outcome=passed ;;
      124 | 137) outcome="timed out" ;;
      77) outcome="not there" ;;
      *) outcome="failed ($status)" ;;
    esac
    detail=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '\t' ' ' | cut -c 1-160)
    tail -n 5 "$log"
  fi
  names+=("$name") outcomes+=("$outcome") seconds+=($((SECONDS - start))) details+=("$detail")
  write_results
}

find_gpu() {
  "$python" - <<'PYTHON' 2>&1 || echo "no GPU was found: $python has no torch that could use one"
import torch

capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
seen = torch.cuda.get_device_name() if torch.cuda.is_available() else f"torch {torch.__version__} sees none"
capability = "%d.%d" % torch.cuda.get_device_capability() if capable else ""
print(f"found {capability}" if capable else f"no GPU of compute capability 8.0 or more was found: {seen}")
PYTHON
}

environment() {
  nvidia-smi || echo "nvidia-smi: not there"
  nvcc --version || echo "nvcc: not there"
  "$python" -m pip list 2>/dev/null
  "$python" - "$out/environment.json" <<'PYTHON'
import json, os, platform, shutil, subprocess, sys

import torch

facts = {
    "python": sys.version,
    "platform": platform.platform(),
    "cpus": os.cpu_count(),
    "torch": torch.__version__,
    "cuda_of_torch": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    "nvcc": shutil.which("nvcc"),
    "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    "gpus": [str(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())],
}
json.dump(facts, open(sys.argv[1], "w"), indent=1)
print(f"torch {facts['torch']}, GPUs: {', '.join(facts['gpus']) or 'none'}")
PYTHON
}

build() {
  "$python" -m pip install --no-build-isolation --no-deps -e . || {
    # A setuptools that is too old for pyproject.toml does not see it from elsewhere.
    local root=$PWD elsewhere
    elsewhere=$(mktemp -d)
    (cd "$elsewhere" && "$python" "$root/setup.py" build_ext --build-lib "$root" --build-temp "$root/build/gpu_check")
  }
  "$python" -c 'from vggfast import _C; print(_C.build_info()); assert _C.build_info()["cuda"], "built without CUDA"'
}

# sanitizer TOOL: over every kernel once.
sanitizer() {
  local tool
  tool=$(command -v compute-sanitizer || ls "$(dirname "$(command -v nvcc)")/compute-sanitizer" /usr/local/cuda/bin/compute-sanitizer 2>/dev/null | head -n 1)
  if [[ -z $tool ]]; then
    echo "compute-sanitizer: not there"
    return 77
  fi
  "$tool" --tool "$1" --error-exitcode 9 "$python" scripts/gpu_kernels.py
}

export -f environment build sanitizer
export out python
gpu="found 9.0"
[[ $dry ]] || gpu=$(find_gpu | tail -n 1)
plans=(sm80) # the kernels that this GPU runs
[[ $gpu == "found 9.0" ]] && plans+=(sm90 sm90patch)

tests=("$python" -m pytest -q -p no:cacheprovider --no-header -o faulthandler_timeout=60)
record=("$python" benchmarks/record.py --device cuda --quick-rounds --output "$out/results")
steps=" (forward|grad_input|grad_weight) bf16 batch"
step environment 8 30 any bash -c environment
step build 75 200 any bash -c build
step info 5 30 gpu bash -c '"$python" -m vggfast info --json && "$python" -m vggfast explain vgg16 --device cuda --dtype bf16 --train'
rivals=torch,cudnn,jax
measured=aten # the last set of kernels that all ran, or was not asked to
for plan in "${plans[@]}"; do
  export VGGFAST_CUDA_PLAN=$plan
  step "$plan-every-kernel" 10 40 gpu "$python" scripts/gpu_kernels.py
  [[ " ${names[*]}" == *" $plan-every-kernel" && ${outcomes[-1]} != passed ]] && continue
  [[ $plan == sm90patch ]] && rivals+=,patch || measured=$plan
done
export VGGFAST_CUDA_PLAN=$measured
# What is worth most comes first: a run that is cut off has that.
step layers-batch256 45 80 gpu "${record[@]}" --part layers --only "$steps 256" --against "$rivals" --seconds 70
step predicted-batch256 5 15 gpu bash -c '"$python" benchmarks/predicted.py "$out"/results/*/'
step inference-batch256 45 75 gpu "${record[@]}" --part inference --only "vgg16 .* bf16 batch 256" --against torch,compile,cudagraph,jax
step layers-batch1 35 60 gpu "${record[@]}" --part layers --only "$steps 1$" --against "$rivals" --seconds 50
step inference-batch1 45 75 gpu "${record[@]}" --part inference --only "vgg16 .* bf16 batch 1$" --against torch,compile,cudagraph,jax
step training-batch256 55 90 gpu "${record[@]}" --part training --only "vgg16 .* batch 256" --against torch,compile,cudagraph,jax
step layers-batch32 35 60 gpu "${record[@]}" --part layers --only "$steps 32" --against "$rivals" --seconds 50
step memory 25 60 gpu "${record[@]}" --part memory --only "training .* batch 256" --against torch
step inference-batch32 25 45 gpu "${record[@]}" --part inference --only "vgg16 .* bf16 batch 32" --against torch,cudagraph,jax
step training-batch32 25 45 gpu "${record[@]}" --part training --only "vgg16 .* batch 32" --against torch,cudagraph,jax
step layers-tf32 12 30 gpu "${record[@]}" --part layers --only "conv._2 (forward|grad_input) fp32 batch 32" --against torch,cudnn --seconds 20
step predicted 5 15 gpu bash -c '"$python" benchmarks/predicted.py "$out"/results/*/'
step compiled 45 200 gpu "${record[@]}" --part compiled --seconds 40
step inference-tf32 20 45 gpu "${record[@]}" --part inference --only "vgg16 .* fp32 batch 32" --against torch,cudagraph
for ((i = ${#plans[@]} - 1; i >= 0; --i)); do
  plan=${plans[i]}
  export VGGFAST_CUDA_PLAN=$plan
  step "$plan-errors" 30 60 gpu "${tests[@]}" tests/test_cuda.py -k "errors and not cpu"
  step "$plan-numbers" 20 40 gpu "${tests[@]}" tests/test_cuda.py -k "not errors and not layout and not cpu"
  step "$plan-layouts" 20 40 gpu "${tests[@]}" tests/test_cuda.py -k "layout and not cpu"
  step "$plan-runtime" 40 90 gpu "${tests[@]}" tests/test_cuda_runtime.py -k "not cpu"
  step "$plan-memcheck" 30 45 gpu bash -c "sanitizer memcheck"
  step "$plan-racecheck" 30 45 gpu bash -c "sanitizer racecheck"
done
[[ $dry ]] && exit 0

printf '\n%-18s %-12s %7s  %s\n' step outcome seconds "last line"
failed=0
for i in "${!names[@]}"; do
  printf '%-18s %-12s %7s  %s\n' "${names[i]}" "${outcomes[i]}" "${seconds[i]}" "${details[i]}"
  [[ ${outcomes[i]} == passed || ${outcomes[i]} == "not there" ]] || failed=1
done
exit "$failed"
