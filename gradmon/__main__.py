"""`python -m gradmon` is the command `gradmon`."""

import sys

from gradmon.cli import main

sys.exit(main())
