#!/usr/bin/env bash
# The GPU half of the tests and the demo, from the source tree, on this machine's GPU.
# Usage: [PYTHON=python3.12] [SANITIZE=1] .ci/gpu.sh [arguments of pytest]
# SANITIZE=1 runs a part of them under each tool of compute-sanitizer as well, about three minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH=$PWD
python=${PYTHON:-python3}

"$python" - <<'EOF'
import sys

import cumoe
from cumoe.gpu.compile import gpu_is_there

print(cumoe.show_config(mode="dicts")["GPU"])
sys.exit(not gpu_is_there())
EOF
"$python" -m cumoe config
"$python" -m pytest tests -m gpu -q "$@"
"$python" -m cumoe demo

if [ -n "${SANITIZE:-}" ]; then
  for tool in memcheck racecheck synccheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -m gpu -q -p no:cacheprovider \
      tests/test_moe.py tests/test_group.py tests/test_route.py tests/test_activation.py \
      -k "tiles or strided or many or homogeneous or ties or every_time or test_gated and stacked"
    # The Hopper kernels: every form of every tile, both orders of weights; and every epilogue on the smallest tile.
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -m gpu -q -p no:cacheprovider \
      tests/test_tiles.py -k "few_rows and bfloat16 or activations and woven"
  done
fi
