"""Makes the sweeps of test_run_sweep.py, whose workers run nothing, importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
