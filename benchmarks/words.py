"""Words over real text: are the tokens untouched, are the words the segmenter's, and what does finding them cost?

    python benchmarks/words.py titles.txt --lines 10000 --column 0

Exceptions, where a segmenter's word that holds a Chinese character is not one word of tokens, are counted by reason.
The cost is that of preparing the text, repeated to so many megabytes, with words and by tokens alone, interleaved.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from itertools import chain, islice, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from data_process import cut_in_memory
from mlm.data import preparation
from mlm.data.chinese import HAN_CHARACTER, make_segmenter
from mlm.data.tokenizer import learn_tokenizer, read_vocabulary
from mlm.data.words import TokenizedLines, make_encoders, tokenize
from mlm.text.lines import read_lines


def check(lines: list[str], tokenizer) -> tuple[int, int, Counter, dict[str, list[str]]]:
    """Numbers of words and of the segmenter's Chinese ones, and the exceptions: counts and examples by reason."""
    vocabulary, segmenter = read_vocabulary(tokenizer), make_segmenter([])
    encoders = make_encoders(tokenizer)
    tokens, lengths, starts_word, *_ = tokenize(lines, encoders, vocabulary, segmenter)
    plain = [tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"] for line in lines]
    assert tokens.tolist() == list(chain.from_iterable(plain)), "words changed the tokens"

    chinese, reasons, examples = 0, Counter(), defaultdict(list)
    for line, end, length in zip(lines, np.cumsum(lengths), lengths, strict=True):
        spans = encoders.any_line.encode(line, add_special_tokens=False).offsets
        assert len(spans) == length
        starts = np.flatnonzero(starts_word[end - length : end]).tolist()
        assert not length or starts[0] == 0, "a token belongs to no word"
        bounds = [*starts, int(length)]
        found = {(spans[first][0], spans[after - 1][1]) for first, after in pairwise(bounds)}
        assert all(one[1] <= other[0] for one, other in pairwise(sorted(found))), "words overlap"
        for word, first, after in segmenter.tokenize(line):
            if not HAN_CHARACTER.search(word):
                continue
            chinese += 1
            if (first, after) not in found:
                reason = why(line, first, after, spans)
                reasons[reason] += 1
                examples[reason].append(word)
    return int(starts_word.sum()), chinese, reasons, examples


def why(line: str, first: int, after: int, spans: list[tuple[int, int]]) -> str:
    inside = [(start, end) for start, end in spans if start < after and end > first]
    if not inside:
        return "the tokenizer drops it"
    if inside[0][0] < first or inside[-1][1] > after:
        return "a token reaches over the segmenter's cut"
    if any(not character.isalnum() for character in line[first:after]):
        return "punctuation inside"
    return "a letter or digit beside it that the pre-tokenizer does not part from it"


def prepare_s(lines: list[str], tokenizer, with_words: bool) -> float:
    """Seconds to prepare the lines, without caches."""

    def by_tokens(texts, encoders, vocabulary, segmenter):
        encoded = encoders.any_line.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.array([len(encoding) for encoding in encoded])
        tokens = np.fromiter(chain.from_iterable(encoding.ids for encoding in encoded), np.int64)
        starts = vocabulary.word_starts(tokens, lengths)
        return TokenizedLines(tokens, lengths, starts, starts, [])

    preparation.tokenize = tokenize if with_words else by_tokens
    began = time.perf_counter()
    cut_in_memory(lines, tokenizer, 128)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--lines", type=int, default=10_000, help="that are not blank, from the beginning")
    parser.add_argument("--column", type=int, help="of tab-separated ones; the whole line where not given")
    parser.add_argument("--megabytes", type=float, default=20)
    given = parser.parse_args()

    lines = (line for line in read_lines(given.files) if line)
    if given.column is not None:
        lines = (line.split("\t")[given.column] for line in lines)
    lines = list(islice(lines, given.lines))
    tokenizer = learn_tokenizer(lambda: iter(lines), 21128)
    names = ("tokenizers", "rjieba", "numpy")
    print(platform.platform(), f"{os.cpu_count()} cores", *(f"{name} {version(name)}" for name in names), sep=", ")

    words, chinese, reasons, examples = check(lines, tokenizer)
    print(f"{len(lines):,} lines: the token ids are those without words; {words:,} words, each of whole tokens")
    print(f"of {chinese:,} Chinese words of the segmenter's {reasons.total():,} are not one word of tokens:")
    for reason, count in reasons.most_common():
        print(f"  {count:>6,}  {reason}: {' '.join(dict.fromkeys(examples[reason][:40]))}")

    size = sum(len(line.encode()) + 1 for line in lines) / 1e6
    repeated = lines * max(1, round(given.megabytes / size))
    seconds = defaultdict(list)
    for _ in range(3):
        for with_words in (False, True):
            seconds[with_words].append(prepare_s(repeated, tokenizer, with_words))
    plain, ours = (statistics.median(seconds[with_words]) for with_words in (False, True))
    megabytes = size * len(repeated) / len(lines)
    print(
        f"{megabytes:.1f} MB: {megabytes / plain:.2f} MB/s by tokens alone, {megabytes / ours:.2f} with words; "
        f"medians of 3: {plain / ours:.2f} of the speed"
    )


if __name__ == "__main__":
    main()
