"""``python -m cumoe``: see cumoe/cli."""

import sys

from cumoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
