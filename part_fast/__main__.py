"""`python -m part_fast` is `part-fast`."""

import sys

from part_fast.cli import main

sys.exit(main())
