"""Work for several processes, in a file that imports little, as each helper imports it."""

import os
import time
from pathlib import Path

from mlm.errors import UserError
from mlm.runtime.together import Place, do_all

TASKS = 20


def take_turns(slow_s: float, wrong: int | None, folder: Path, place: Place) -> None:
    """Each task writes who did it. The first process waits until others do theirs; one of these finds a task wrong."""

    def do(task: int, path: Path) -> None:
        while place.number == 0 and len(list((folder / "whole").glob("[0-9]*"))) < 2 * (wrong is None):
            time.sleep(0.01)
        if task == wrong and place.number:
            raise UserError(f"task {task} is wrong")
        time.sleep(slow_s)
        path.write_text(str(os.getpid()))

    do_all("", folder / "whole", [1] * TASKS, do, place)
