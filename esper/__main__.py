"""``python -m esper`` is the console script ``esper``."""

import sys

from esper.app import main

sys.exit(main())
