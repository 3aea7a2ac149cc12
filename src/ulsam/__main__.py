import sys

from ulsam.cli import main

sys.exit(main())
