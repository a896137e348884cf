"""Law 5 under a short campaign of random faults. The long one: python benchmarks/faults.py --faults 200"""

import pytest
from runs import draw_no_charts, fork_program


@pytest.mark.slow
def test_no_run_is_lost_or_changed_by_faults():
    """Twenty faults, in two campaigns at the same time."""
    command = ["benchmarks/faults.py", "--faults", "10", "--rank-faults", "0"]
    campaigns = [fork_program(*command, before=draw_no_charts) for _ in range(2)]
    for campaign in campaigns:
        out, _ = campaign.communicate()
        print(out)  # the seed is in its first line
        assert campaign.returncode == 0, out
        assert "| all | 1" in out and out.rstrip().endswith("| 0 | 0 |")
