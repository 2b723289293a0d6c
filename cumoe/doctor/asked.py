"""Whether this process is the doctor: a file of its own, since every import of the package asks."""

from collections.abc import Sequence
from pathlib import PurePath


def is_asked_for(argv: Sequence[str], original: Sequence[str]) -> bool:
    """Return whether this process is ``python -m cumoe doctor`` or ``cumoe doctor``, while the package is imported.

    Parameters
    ----------
    argv, original : sequence of str
        ``sys.argv``, whose first item is ``-m`` as long as the module is being located, and ``sys.orig_argv``.
    """
    if argv[1:2] != ["doctor"]:
        return False
    if argv[0] == "-m":
        return original[-len(argv)] in ("cumoe", "-mcumoe")
    return PurePath(argv[0]).name in ("cumoe", "cumoe.exe")
