"""`python -m fedloom`: the command `fedloom`, by whichever Python."""

import sys

from fedloom.cli import main

if __name__ == "__main__":
    sys.argv[0] = "fedloom"  # what records call the command
    main()
