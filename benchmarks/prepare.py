"""Text preparation: megabytes a second, cache over text, peak memory, and the start of a second run on the same text.

    python benchmarks/prepare.py --megabytes 1000 --text folder/with/train.txt/and/test.txt

Every measurement is a process of its own. *Prepared* is what train.py does before it can train: find the text, load the
tokenizer, tokenize, cut and store. Memory counts from the end of the imports.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

LINES_AT_ONCE = 10_000


def generate(folder: Path, megabytes: int, chinese: bool) -> None:
    """Lines of 3 to 60 words out of 50,000 by Zipf's law, or of 5 to 30 out of 4,000 Chinese characters."""
    draw = np.random.default_rng(0)
    if chinese:
        words = np.array([chr(0x4E00 + i) for i in range(4000)], dtype=object)
        space, shortest, longest = "", 5, 30
    else:
        letters = np.array(list("etaoinshrdlucmfwypvbgk"))
        words = np.array(["".join(draw.choice(letters, draw.integers(2, 12))) for _ in range(50_000)], dtype=object)
        space, shortest, longest = " ", 3, 60
    shares = 1 / np.arange(1, len(words) + 1)
    bounds = np.cumsum(shares) / shares.sum()
    folder.mkdir()
    for split, wanted in (("train", megabytes * 1e6), ("test", megabytes * 1e4)):
        with open(folder / f"{split}.txt", "w", encoding="utf-8", newline="\n") as file:
            while file.tell() < wanted:
                lengths = draw.integers(shortest, longest + 1, LINES_AT_ONCE)
                drawn = words[np.searchsorted(bounds, draw.random(lengths.sum()))].tolist()
                ends = np.cumsum(lengths).tolist()
                starts = [0, *ends[:-1]]
                file.writelines(space.join(drawn[start:end]) + "\n" for start, end in zip(starts, ends, strict=True))


def one(text: Path, tokenizer: Path, output: Path) -> dict[str, float]:
    """Prepares the text as train.py does; seconds, and the peak of memory above what the imports took."""
    from Config import Config
    from data_process import prepare
    from mlm.data.tokenizer import load_tokenizer, read_vocabulary
    from mlm.text.files import find_text

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, the highest so far
    began = time.perf_counter()
    config = Config(
        path_datasets=str(text), path_model_save=str(output), initial_pretrain_model="scratch:mini",
        initial_pretrain_tokenizer=str(tokenizer),
    )  # fmt: skip
    found = find_text(config)
    loaded = load_tokenizer(config, found.train, found.digest)
    prepare(config, found, loaded, read_vocabulary(loaded))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imported) / 1024}


def measure(*arguments: Path) -> dict:
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of generated English; a tenth of it in Chinese")
    parser.add_argument("--text", type=Path, help="a folder of real text to measure too")
    parser.add_argument("--json", type=Path, default=Path("prepare.json"), help="receives every measurement")
    parser.add_argument("--one", nargs=3, type=Path, help=argparse.SUPPRESS)  # measure() calls it
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*given.one)))
        return

    from itertools import islice

    from mlm.data.tokenizer import learn_tokenizer
    from mlm.text.lines import read_lines

    names = ("tokenizers", "datasets", "numpy")
    print(platform.platform(), f"{os.cpu_count()} cores", *(f"{name} {version(name)}" for name in names), sep=", ")
    print("\n| text | MB | MB/s | cache / text | peak memory above the imports, MiB | second start, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        generate(folder / "generated words", given.megabytes, chinese=False)
        generate(folder / "generated Chinese lines", max(1, given.megabytes // 10), chinese=True)
        texts = [folder / "generated words", folder / "generated Chinese lines", *([given.text] if given.text else [])]
        for text in texts:
            files = sorted(text.glob("*.txt"))
            megabytes = sum(file.stat().st_size for file in files) / 1e6
            lines = list(islice(read_lines(files), 20_000))
            tokenizer, output = (folder / f"{text.name} {kind}" for kind in ("tokenizer", "output"))
            learn_tokenizer(lambda lines=lines: iter(lines), 30522).save_pretrained(tokenizer)
            first, second = measure(text, tokenizer, output), measure(text, tokenizer, output)
            cache = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / 1e6
            print(
                f"| {text.name} | {megabytes:,.1f} | {megabytes / first['seconds']:.1f} | {cache / megabytes:.2f} "
                f"| {first['mib']:,.0f} | {second['seconds']:.1f} |",
                flush=True,
            )
            found.append({"text": text.name, "megabytes": megabytes, "cache": cache, "first": first, "second": second})
    given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
