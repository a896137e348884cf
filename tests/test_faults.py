"""Law 5 under a short campaign of random faults. The long one: python benchmarks/faults.py --faults 200"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_run_is_lost_or_changed_by_faults():
    command = [sys.executable, "benchmarks/faults.py", "--faults", "20", "--rank-faults", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    print(done.stdout)  # the seed is in its first line
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | 2" in done.stdout and done.stdout.rstrip().endswith("| 0 | 0 |")
