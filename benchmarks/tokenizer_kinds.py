"""Tokenizing with words, by the kind of tokenizer: megabytes a second, beside the tokenizers library alone.

    python benchmarks/tokenizer_kinds.py wikitext-2/train.txt

Each kind learns 30,522 tokens from the text. *With words* is `mlm.data.words.tokenize`, what preparation does of a line
before it cuts it; *alone* is the library's own fastest call, which finds no words. In turns, one process.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from encoders import LLAMAS, ROBERTAS, byte_level, finished, gemma, sentencepiece

from mlm.data.chinese import make_segmenter
from mlm.data.tokenizer import learn_tokenizer, read_vocabulary
from mlm.data.words import make_encoders, tokenize
from mlm.text.lines import read_lines

SIZE = 30_522
BLOCK_CHARACTERS = 1 << 19  # tokenized at once, as in preparation


def blocks(lines: list[str]) -> list[list[str]]:
    """Blocks of lines of about BLOCK_CHARACTERS."""
    found, size = [[]], 0
    for line in lines:
        if size >= BLOCK_CHARACTERS:
            found.append([])
            size = 0
        found[-1].append(line)
        size += len(line)
    return found


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    lines = list(filter(None, read_lines(given.files)))
    megabytes = sum(len(line.encode()) + 1 for line in lines) / 1e6

    def text():
        return iter(lines)

    gemmas = ROBERTAS._replace(separators=1)
    kinds = {
        "WordPiece, as BERT's": learn_tokenizer(text, SIZE),
        "byte-level BPE, as RoBERTa's": finished(byte_level(ROBERTAS, SIZE, text=text), ROBERTAS),
        "byte-level BPE, as EuroBERT's": finished(byte_level(LLAMAS, SIZE, llama=True, text=text), LLAMAS),
        "Unigram, as XLM-R's": finished(sentencepiece(ROBERTAS, SIZE, text=text), ROBERTAS),
        "BPE, as mmBERT's": finished(gemma(gemmas, SIZE, text=text), gemmas),
    }
    names = ("tokenizers", "numpy")
    print(platform.platform(), f"{os.cpu_count()} cores", *(f"{name} {version(name)}" for name in names), sep=", ")
    print(f"\n{megabytes:.1f} MB, {sum(map(str.isascii, lines)) / len(lines):.0%} of the lines in ASCII alone\n")
    print("| kind | tokens | alone, MB/s | with words, MB/s | of WordPiece's |\n| --- | ---: | ---: | ---: | ---: |")
    of_wordpiece = 0.0
    for kind, tokenizer in kinds.items():
        encoders, vocabulary, segmenter = make_encoders(tokenizer), read_vocabulary(tokenizer), make_segmenter([])

        def alone(encoders=encoders):
            for block in blocks(lines):
                encoders.any_line.encode_batch_fast(block, add_special_tokens=False)

        def with_words(encoders=encoders, vocabulary=vocabulary, segmenter=segmenter):
            return [tokenize(block, encoders, vocabulary, segmenter) for block in blocks(lines)]

        tokens = sum(len(part.tokens) for part in with_words())  # which also warms the library's caches
        times = [(seconds(alone), seconds(with_words)) for _ in range(given.repeats)]
        speeds = [megabytes / statistics.median(each) for each in zip(*times, strict=True)]
        of_wordpiece = of_wordpiece or speeds[1]
        print(
            f"| {kind} | {tokens:,} | {speeds[0]:.1f} | {speeds[1]:.1f} | {speeds[1] / of_wordpiece:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
