#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one and no network: build, test suite, compute-sanitizer, benchmarks.
#
#   benchmarks/gpu_check.sh [--dry-run] [STEP ...]     steps: build tests sanitizer bench report; all by default
#
# --dry-run  does what can be done without a GPU, in less time, so that the script itself can be tried.
# PYTHON     the interpreter (python3)            OUT      where logs and results go (benchmarks/results)
# LIMIT      seconds in all (530)                 WORKERS  test processes (three quarters of the cores, at most 12)
# TESTS      what pytest is given (tests)         BENCH    the same of the benchmarks (benchmarks)
# Where a command may take ten minutes: "build tests sanitizer" first, "bench report" in a second one.
# A failing step does not stop the next one. The exit status is 0 where every step passed or had nothing to do.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
LIMIT=${LIMIT:-530}
TESTS=${TESTS:-tests}
BENCH=${BENCH:-benchmarks}
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
WORKERS=${WORKERS:-$((cores >= 16 ? 12 : cores >= 4 ? cores * 3 / 4 : 1))}

dry_run=0
steps=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 ;;
    build | tests | sanitizer | bench | report) steps+=("$argument") ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
  esac
done
[ ${#steps[@]} -gt 0 ] || steps=(build tests sanitizer bench report)

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
log=$OUT/gpu_check.log
: >"$log"
summary=()
failed=0
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

has_gpu() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$log"; }
has_module() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
left() { echo $((LIMIT - SECONDS)); }
note() { summary+=("$(printf '%-22s %-8s %5ss  %s' "$1" "$2" "$3" "$4")"); }

# step NAME SECONDS COMMAND...: runs it within its own limit and what is left of LIMIT, and notes how it ended.
step() {
  local name=$1 allowed=$2 begun=$SECONDS status
  shift 2
  [ "$(left)" -lt "$allowed" ] && allowed=$(left)
  if [ "$allowed" -lt 5 ]; then
    note "$name" skipped 0 "no time left of $LIMIT s"
    failed=1
    return 1
  fi
  echo "== $name: $*" | tee -a "$log"
  # pytest answers an interrupt with the summary of what it has done.
  timeout --signal=INT --kill-after=20 "$allowed" "$@" >>"$log" 2>&1
  status=$?
  local last
  last=$(grep -a -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-150)
  case $status in
    0) note "$name" ok $((SECONDS - begun)) "$last" ;;
    124 | 137) note "$name" FAILED $((SECONDS - begun)) "stopped after $allowed s" ;;
    *) note "$name" FAILED $((SECONDS - begun)) "exit status $status: $last" ;;
  esac
  [ $status -eq 0 ] || failed=1
  return $status
}

# For the GPU at hand alone: nvcc takes as long again for each further architecture.
build() {
  if [ $gpu -eq 1 ] && [ -z "${FASTIB_CUDA_ARCHS:-}" ]; then
    FASTIB_CUDA_ARCHS=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    export FASTIB_CUDA_ARCHS
  fi
  command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
  step build 170 "$PYTHON" -m pip install --disable-pip-version-check --no-index --no-build-isolation --no-deps -e .
}

# The cases that need a GPU; all others, those of the interpreter and of machine code too, run in `make test`.
tests() {
  local parallel=()
  [ "$WORKERS" -gt 1 ] && has_module xdist && parallel=(-n "$WORKERS" --dist worksteal)
  OMP_NUM_THREADS=1 \
    step tests "$1" "$PYTHON" -m pytest $TESTS -m gpu -q -rs --tb=short --durations=20 \
    --continue-on-collection-errors -p no:cacheprovider ${parallel[@]+"${parallel[@]}"}
}

sanitizer() {
  local found=0 source op checks check
  for source in kernels/cuda/*.cu; do
    op=$(basename "$source" .cu)
    [ -e "benchmarks/bench_$op.py" ] || continue
    found=1
    if [ $gpu -eq 0 ]; then
      note "sanitizer $op" skipped 0 "no GPU"
    elif ! command -v compute-sanitizer >/dev/null; then
      note "sanitizer $op" skipped 0 "no compute-sanitizer on the path"
    else
      # Each tensor by itself: between those of the caching allocator an access out of bounds finds other tensors.
      checks=("memcheck contiguous" "memcheck channels_last" "racecheck channels_last")
      for check in "${checks[@]}"; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "${check% *} $op ${check#* }" 60 \
          compute-sanitizer --tool "${check% *}" --error-exitcode 9 "$PYTHON" -m benchmarks.small_case "$op" "${check#* }"
      done
    fi
  done
  [ $found -eq 1 ] || note sanitizer skipped 0 "no CUDA kernel in kernels/cuda"
}

bench() {
  local options=(--benchmark-only -q -rs -p no:cacheprovider --bench-results "$OUT") budget=$1
  if ! has_module pytest_benchmark; then
    note bench FAILED 0 "pytest-benchmark is not installed"
    failed=1
    return
  fi
  [ $dry_run -eq 1 ] && options+=(--quick -k "D16 and not memory or host")
  [ $gpu -eq 1 ] && options+=(--bench-seconds 0.5)  # a round is short there; building the compiled peers is not
  # A case that has begun is finished: what it may still take stays out of the budget.
  step bench "$budget" "$PYTHON" -m pytest $BENCH "${options[@]}" --bench-budget $((budget > 120 ? budget - 40 : budget * 2 / 3))
}

report() {
  local results=()
  for file in "$OUT"/*.json; do
    [ "$file" -nt "$started" ] && results+=("$file")
  done
  if [ ${#results[@]} -eq 0 ]; then
    note report skipped 0 "no results of this run in $OUT"
    return
  fi
  "$PYTHON" -m benchmarks.report "${results[@]}" | tee -a "$log"
  [ "${PIPESTATUS[0]}" -eq 0 ] && note report ok 0 "${results[*]}" || { note report FAILED 0 "see $log"; failed=1; }
}

started=$(mktemp)
trap 'rm -f "$started"' EXIT
gpu=1
has_gpu || gpu=0
{
  "$PYTHON" --version
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, "cuda", torch.version.cuda)'
  has_module triton && "$PYTHON" -c 'import triton; print("triton", triton.__version__)'
  [ $gpu -eq 1 ] && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,temperature.gpu --format=csv
} 2>&1 | tee -a "$log"
if [ $gpu -eq 0 ]; then
  echo "gpu_check: torch finds no CUDA device here." | tee -a "$log"
  if [ $dry_run -eq 0 ]; then
    echo "Nothing was checked. With --dry-run the steps that need no GPU are run." | tee -a "$log"
    exit 1
  fi
fi

# Seconds that the steps after the tests keep: those of them that were asked for.
kept=5
for name in "${steps[@]}"; do
  case $name in
    sanitizer) kept=$((kept + 60)) ;;
    bench) kept=$((kept + 180)) ;;
    report) kept=$((kept + 10)) ;;
  esac
done

for name in "${steps[@]}"; do
  case $name in
    build) build ;;
    tests) tests $(($(left) > 2 * kept ? $(left) - kept : $(left) / 2)) ;;
    sanitizer) sanitizer ;;
    bench) bench $(($(left) > 40 ? $(left) - 20 : $(left))) ;;
    report) report ;;
  esac
done

echo
{
  echo "gpu_check$([ $dry_run -eq 1 ] && echo ' (dry run)') in $SECONDS s, log: $log"
  printf '%s\n' "${summary[@]}"
} | tee -a "$log"
exit $failed
