"""Dry runs against the runs that they predict: time, memory and disk.

    python benchmarks/dry_run.py -- --demo
    python benchmarks/dry_run.py -- --initial_pretrain_model scratch:mini --initial_pretrain_tokenizer corpus

What is behind -- goes to train.py. The text is prepared first, as a dry run predicts the run with its text prepared.
Prints what was predicted and what came, and their ratios; meant for an otherwise idle machine.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
UNITS = {"MB": 1e6, "GB": 1e9}


def measure(flags: list[str]) -> tuple[str, float, int]:
    """What train.py printed, its seconds and the most memory it held, in bytes."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, out
    return out, time.perf_counter() - began, usage.ru_maxrss * 1024


def amount(text: str) -> float:
    """The seconds or bytes that a line of the dry run begins with: 03:20, 1:03:20, 1.8 GB."""
    clock, size = re.match(r"[\d:]+:\d\d", text), re.match(r"([\d.]+) (MB|GB)", text)
    if clock:
        return sum(60**place * int(part) for place, part in enumerate(reversed(clock[0].split(":"))))
    assert size, text
    return float(size[1]) * UNITS[size[2]]


def main() -> None:
    """Prepares, predicts, runs, compares."""
    flags = sys.argv[sys.argv.index("--") + 1 :]
    with tempfile.TemporaryDirectory() as output:
        flags += [f"--path_model_save={output}", "--run_name=whole"]
        measure([*flags, "--check_only"])
        screen, seconds, _ = measure([*flags, "--dry_run"])
        print(screen, f"(the dry run took {seconds:.0f} s)\n", flush=True)
        predicted = {
            what: amount(rest) for what, rest in re.findall(r"^(time|memory|disk) +(.*)$", screen, re.MULTILINE)
        }
        _, seconds, memory = measure(flags)
        size = sum(file.stat().st_size for file in Path(output, "whole").rglob("*") if file.is_file())
    for what, came in (("time", seconds), ("memory", memory), ("disk", size)):
        unit, name = (1, "s") if what == "time" else (1e6, "MB")
        both = f"predicted {predicted[what] / unit:8,.0f}, came {came / unit:8,.0f} {name}"
        print(f"{what:<8} {both}: predicted / came = {predicted[what] / came:.2f}")


if __name__ == "__main__":
    main()
