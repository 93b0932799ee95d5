"""The command line: `python -m jaxhandler`."""

import sys

from jaxhandler.inference.cli import main

if __name__ == "__main__":
    sys.exit(main())
