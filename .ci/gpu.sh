#!/usr/bin/env bash
# The GPU half of the tests, 10,000 random layers and the demo, from the source tree, on this machine's GPU.
# With the folder of `tests/checkpoint_oracles.py make .oracle`, layers of all families are compared with their modules.
# Usage: [PYTHON=python3.12] [RECORDS=folder] [FUZZ_CASES=10000] [SANITIZE=1] .ci/gpu.sh [arguments of pytest]
# SANITIZE=1 adds the tests at small shapes under the four tools of compute-sanitizer, side by side, each for at most
# SANITIZE_SECONDS=210 of tests; SANITIZE=only is that alone, about five minutes. The table of what was tried comes last.
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
  tools=(memcheck racecheck synccheck initcheck)
  declare -A process
  for tool in "${tools[@]}"; do
    # An allocation that fails is a test here, no error. What a tool finds goes into its log, tests into their own.
    SECONDS_OF_TESTS=${SANITIZE_SECONDS:-210} timeout 540 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --report-api-errors no --log-file "$records/$tool.log" \
      "$python" -m pytest -p small_shapes -m gpu -q -p no:cacheprovider --junitxml "$records/$tool.xml" "$@" tests \
      >"$records/$tool.txt" 2>&1 &
    process[$tool]=$!
  done
  for tool in "${tools[@]}"; do
    status=0
    wait "${process[$tool]}" || status=$?
    printf '== %s: exit status %s\n' "$tool" "$status"
    tail -n 2 "$records/$tool.txt"
    tail -n 3 "$records/$tool.log"
    [ "$status" = 0 ] || failed=1
  done
fi

"$python" tests/evidence.py "$records"/*.xml "$records"/*.json "$records"/*check.log
exit "$failed"
