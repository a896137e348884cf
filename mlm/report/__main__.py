"""`python -m mlm.report RUN [RUN ...]`: writes the page of a run again, or one that sets several side by side."""

import sys
from pathlib import Path

from mlm.errors import UserError, plain_errors
from mlm.report.page import MOST_RUNS, render_runs, write_report
from mlm.report.summary import read_summary
from mlm.storage import write_text


def main() -> None:
    """Writes the page of one run into its folder, or one of several beside them. Raises UserError."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders or any(str(folder).startswith("-") for folder in folders):
        raise UserError(f"name one run's folder or up to {MOST_RUNS}: python -m mlm.report output/a output/b")
    if len(folders) > MOST_RUNS:
        raise UserError(f"a page has room for {MOST_RUNS} runs, not {len(folders)}")
    runs = [read_summary(folder) for folder in folders]
    if len(runs) == 1:
        path = folders[0] / "report.html"
        write_report(runs[0])
    else:
        path = folders[0].parent / f"report-of-{len(runs)}-runs.html"
        write_text(path, render_runs(runs))
    print(path)


if __name__ == "__main__":
    with plain_errors():
        main()
