"""Makes the hosts and loops of ``tests/growing.py`` and the launcher of this folder importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
