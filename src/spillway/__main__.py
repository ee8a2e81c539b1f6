"""``python -m spillway``: the same as the console script."""

import sys

from spillway.cli import main

if __name__ == "__main__":
    sys.exit(main())
