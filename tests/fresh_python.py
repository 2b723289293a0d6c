"""A Python process of its own with this checkout."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(program, **environment):
    """Run a program with this checkout; return the finished process."""
    changed = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"} | environment
    return subprocess.run(
        [sys.executable, "-c", program], env=changed, capture_output=True, text=True, check=False, timeout=300
    )
