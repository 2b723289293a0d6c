#!/usr/bin/env bash
# The GPU half of the tests and the demo, from the source tree, on this machine's GPU.
# Usage: [PYTHON=python3.12] .ci/gpu.sh [arguments of pytest]
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
