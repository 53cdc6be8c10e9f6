"""`python -m p2pinfer`: the same as the console script."""

import sys

from p2pinfer.cli import main

if __name__ == "__main__":
    sys.exit(main())
