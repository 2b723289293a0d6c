#!/usr/bin/env bash
# The GPU half of the tests, 10,000 random layers and the demo, from the source tree, on this machine's GPU.
# With the folder of `tests/checkpoint_oracles.py make .oracle`, layers of all families are compared with their modules.
# Usage: [PYTHON=python3.12] [RECORDS=folder] [FUZZ_CASES=10000] [SANITIZE=1] .ci/gpu.sh [arguments of pytest]
# SANITIZE=1 adds the tests at small shapes under the four tools of compute-sanitizer, SANITIZE=only is that alone. Each
# tool runs every test once, in as many processes side by side as SANITIZE_SHARDS says ("racecheck=10 memcheck=2"; a tool
# that is not named is left out). They start no test after SANITIZE_SECONDS=500 and are ended 100 s later. The table of
# what was tried comes last, and behind it what a tool had no time for and what took longest.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH=$PWD:$PWD/tests PYTHONDONTWRITEBYTECODE=1
python=${PYTHON:-python3}
records=${RECORDS:-$(mktemp -d)}
mkdir -p "$records"

"$python" - <<'PYTHON'
import sys

import cumoe
from cumoe.gpu.compile import gpu_is_there

print(cumoe.show_config(mode="dicts")["GPU"])
sys.exit(not gpu_is_there())
PYTHON
"$python" -m cumoe config

failed=0
if [ "${SANITIZE:-}" != only ]; then
  "$python" -m pytest tests -m gpu -q -p no:cacheprovider --junitxml "$records/gpu.xml" "$@" || failed=1
  "$python" tests/fuzz --device gpu --cases "${FUZZ_CASES:-10000}" --jobs 8 --record "$records/fuzz_gpu.json" || failed=1
  "$python" -m cumoe demo
  if [ -d .oracle ]; then
    "$python" tests/checkpoint_oracles.py compare .oracle --device gpu || failed=1
  fi
fi

if [ -n "${SANITIZE:-}" ]; then
  # A core and at most 4 GiB of CuPy's pool for each of 16 processes; racecheck is the slowest by far.
  export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 CUPY_GPU_MEMORY_LIMIT=$((4 << 30))
  seconds=${SANITIZE_SECONDS:-500}
  parts=() processes=()
  for word in ${SANITIZE_SHARDS:-racecheck=10 memcheck=2 initcheck=2 synccheck=2}; do
    tool=${word%%=*} count=${word#*=}
    [[ $word == *=* ]] || { printf 'SANITIZE_SHARDS: expected tool=number, got %s\n' "$word" >&2; exit 2; }
    rm -f "$records/$tool"-*of*.*
    for ((i = 1; i <= count; i++)); do
      part=$records/$tool-${i}of$count
      # An allocation that fails is a test here, no error. What a tool finds goes into its log, tests into their own.
      SANITIZER=$tool SHARD=$i/$count SECONDS_OF_TESTS=$seconds timeout -k 10 $((seconds + 100)) \
        compute-sanitizer --tool "$tool" --error-exitcode 9 --report-api-errors no --log-file "$part.log" \
        "$python" -m pytest -p small_shapes -m gpu -q -p no:cacheprovider --junitxml "$part.xml" "$@" tests \
        >"$part.txt" 2>&1 &
      parts+=("$part") processes+=($!)
    done
  done
  for i in "${!parts[@]}"; do
    status=0
    wait "${processes[$i]}" || status=$?
    printf '== %s: exit status %s\n' "${parts[$i]##*/}" "$status"
    tail -n 1 "${parts[$i]}.txt"
    tail -n 1 "${parts[$i]}.log" || true  # a tool that did not start has none
    if [ "$status" != 0 ]; then
      failed=1
      grep -m 5 -E '^(FAILED|ERROR) ' "${parts[$i]}.txt" || true
    fi
  done
fi

"$python" tests/evidence.py "$records"/*.xml "$records"/*.json "$records"/*check-*.log
exit "$failed"
