"""Running a few lines of Python in an interpreter of their own: a broken package can end that one, not this one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cumoe.doctor.finding import one_line

HOME = Path(__file__).resolve().parent.parent.parent
"""The folder that this very cumoe is imported from."""

MARK = "cumoe doctor: "


def ask(code: str, timeout: float = 120, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run `code`, in which ``answer`` is a dict to fill, in a fresh interpreter.

    Parameters
    ----------
    code : str
        Python; what it prints is ignored.
    timeout : float
        Seconds after which the interpreter is ended.
    environment : dict, optional
        Variables that it gets besides those of this process.

    Returns
    -------
    dict
        ``answer``, with "error" in it if the code raised, the interpreter crashed or was too slow.
    """
    program = (
        "answer = {}\n"
        "try:\n" + "".join(f"    {line}\n" for line in code.splitlines()) + "except BaseException as error:\n"
        "    answer['error'] = f'{type(error).__name__}: {error}'\n"
        "import json, sys\n"
        f"sys.stdout.write('\\n{MARK}' + json.dumps(answer) + '\\n')\n"
        "sys.stdout.flush()\n"
    )
    path = os.pathsep.join(filter(None, (str(HOME), os.environ.get("PYTHONPATH", ""))))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": path} | (environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout:g} s"}
    except OSError as error:
        return {"error": f"{sys.executable} does not start: {error}"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            found = json.loads(line.removeprefix(MARK))
            return found if isinstance(found, dict) else {"error": one_line(found)}
    return {"error": f"Python ended with {done.returncode}: {one_line(done.stderr[-300:])}"}
