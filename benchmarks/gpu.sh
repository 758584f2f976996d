#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call of at most 9 minutes and without a network.
#
#   benchmarks/gpu.sh [--dry-run] [build] [tests] [sanitizer] [bench [SUITE ...]]
#
# No section named: all of them. A section that fails or runs out of its time does not stop the
# rest. Logs, a summary and the benchmark rows go to $OUT, or to benchmarks/results/. --dry-run does
# the same on a CPU, at the smallest sizes, to find typing errors before a GPU is paid for.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
export LOKI_KERNELS_RESULTS="$OUT"

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=--dry-run
  shift
fi
sections=" ${*:-build tests sanitizer bench} "
summary="$OUT/gpu-summary.txt"
: > "$summary"

note() { echo "$*" | tee -a "$summary"; }

section() { # name, seconds, command ...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout --kill-after=10 "$limit" "$@" > "$OUT/gpu-$name.log" 2>&1
  status=$?
  case $status in
    0) note "$name: passed in $((SECONDS - start)) s" ;;
    124 | 137) note "$name: out of its $limit s" ;;
    *) note "$name: FAILED ($status) after $((SECONDS - start)) s" ;;
  esac
  tail -n 4 "$OUT/gpu-$name.log" | sed 's/^/    /' | tee -a "$summary"
}

wants() { [[ $sections == *" $1 "* ]]; }

if [ -z "$dry" ]; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$summary"
fi

if wants build; then
  if [ -n "$dry" ]; then
    work=$(mktemp -d)
    section build 120 "$PYTHON" -m pip wheel -q --no-build-isolation --no-deps -w "$work" .
    rm -rf "$work"
  else
    section build 90 env LOKI_KERNELS_FORCE_CUDA=1 \
      "$PYTHON" -m pip install --no-build-isolation --no-deps -v -e .
  fi
  "$PYTHON" -m loki_kernels.cli env > "$OUT/gpu-environment.txt" 2>&1
fi

if wants tests; then
  if [ -n "$dry" ]; then
    section tests 60 "$PYTHON" -m pytest -q tests/ops/test_gather_columns.py
  else
    section tests 150 "$PYTHON" -m pytest -q tests/ops tests/ops \
      tests/attribution tests/training/test_patching.py
  fi
fi

if wants sanitizer; then
  if [ -n "$dry" ]; then
    section sanitizer 60 "$PYTHON" -m benchmarks.ops.self_check
  elif ! command -v compute-sanitizer > /dev/null; then
    note "sanitizer: not run, compute-sanitizer is not installed"
  else
    for tool in memcheck racecheck; do
      section "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$PYTHON" -m benchmarks.ops.self_check cuda
    done
  fi
fi

if wants bench; then
  suites=${sections##*" bench "}
  # the large shapes, no growth curves; with the sections before them 510 s
  for suite in ${suites:-attribution row_masked_linear training_step selection memory}; do
    limit=30
    [ "$suite" = attribution ] && limit=70
    [ -n "$dry" ] && limit=120
    section "bench-$suite" "$limit" "$PYTHON" -m benchmarks "$suite" ${dry:---quick}
  done
fi

echo
cat "$summary"
! grep -q "FAILED\|out of its" "$summary"
