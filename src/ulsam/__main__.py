import sys

from ulsam.cli import main

if __name__ == "__main__":  # reading processes that are not forked import it, too
    sys.exit(main())
