"""Law 5 under a short campaign of random faults. The long one: python benchmarks/faults.py --faults 200"""

import subprocess
import sys

import pytest
from runs import ROOT


@pytest.mark.slow
def test_no_run_is_lost_or_changed_by_faults():
    """Twenty faults, in two campaigns at the same time."""
    command = [sys.executable, "benchmarks/faults.py", "--faults", "10", "--rank-faults", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    campaigns = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    for campaign in campaigns:
        out, err = campaign.communicate(timeout=300)
        print(out)  # the seed is in its first line
        assert campaign.returncode == 0, out + err
        assert "| all | 1" in out and out.rstrip().endswith("| 0 | 0 |")
