"""Text lines -> token chunks (cached, memory-mapped) -> masked, packed batches.

A *line* is one example of the user's text. A *chunk* is a line, or a part of a line too long for `sen_max_length`.
Stored tokens are the text's alone: [CLS] and [SEP] are put around each chunk when a batch is packed.
"""

import codecs
import gzip
import hashlib
import json
import math
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, DownloadConfig, load_dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from Config import Config, UserError
from hub import locate
from storage import whole_file, whole_folder

IGNORED = -100  # the label of a position where nothing is predicted, as in transformers
CACHE_FORMAT = 1  # raise when what the cache holds changes
WIKITEXT = "Salesforce/wikitext"
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# ---------------------------------------------------------------------------------------------- files -> lines


class Text(NamedTuple):
    """The lines of both splits, each call reading them anew, and a digest of everything that decides them."""

    train: Callable[[], Iterator[str]]
    test: Callable[[], Iterator[str]]
    digest: str


def find_text(config: Config) -> Text:
    """The training and test lines under `path_datasets`.

    Without test*.txt a seeded random share of the distinct lines is held out, so that a repeated line never falls on
    both sides. The default folder, when it holds no text, is first filled with WikiText-2 from the Hub.
    Raises UserError where there is no text, or none to hold out.
    """
    folder = Path(config.path_datasets)
    train, test = (_text_files(folder, split) for split in ("train", "test"))
    if not train and not test and config.path_datasets == Config.path_datasets and not any(folder.glob("*.txt*")):
        _fetch_wikitext(folder)
        train, test = (_text_files(folder, split) for split in ("train", "test"))
    if not train:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) if folder.is_dir() else ""
        state = f"holds no train*.txt{f' (but {found})' if found else ''}" if folder.is_dir() else "is no folder"
        raise UserError(f"path_datasets: {folder} {state}; put your text into {folder / 'train.txt'}, one example a line")
    digest = hashlib.blake2b(digest_size=16)
    for path in train + [None] + test:
        digest.update(b"|" if path is None else _file_digest(path))
    if test:
        return Text(partial(read_lines, train), partial(read_lines, test), digest.hexdigest())

    salt = config.seed.to_bytes(8, "little")
    hashes = np.unique(array("Q", (_line_hash(line, salt) for line in read_lines(train) if line)))
    if len(hashes) < 2:
        raise UserError(
            f"path_datasets: {folder} holds {len(hashes)} distinct line(s) in train*.txt and no test*.txt; "
            "one line to train on and one to test on are needed"
        )
    held_out = min(max(1, round(len(hashes) * config.test_fraction)), len(hashes) - 1)
    last_held_out = int(hashes[held_out - 1])
    digest.update(salt + last_held_out.to_bytes(8, "little"))

    def lines(of_test: bool) -> Iterator[str]:
        return (line for line in read_lines(train) if (_line_hash(line, salt) <= last_held_out) == of_test)

    return Text(partial(lines, False), partial(lines, True), digest.hexdigest())


def _text_files(folder, split):
    return sorted(path for ending in ("txt", "txt.gz") for path in folder.glob(f"{split}*.{ending}") if path.is_file())


def _line_hash(line, salt=b""):
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8, salt=salt).digest(), "little")


def _file_digest(path):
    with _plain_read_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def read_lines(files: list[Path]) -> Iterator[str]:
    """The lines of UTF-8 text files (`.gz` too), without surrounding whitespace. Only `\\n` and `\\r\\n` end a line.

    Raises UserError, naming file and line, for bytes that are not UTF-8 and for files that cannot be read.
    """
    for path in files:
        with _plain_read_errors(path), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                try:
                    line = raw.decode("utf-8")
                    if raw.count(0) * 4 > len(raw):  # UTF-16 that happens to be valid UTF-8
                        raise UnicodeError
                except UnicodeError:
                    encoding = _likely_encoding(raw + file.read(1 << 16))
                    raise UserError(
                        f"path_datasets: {path}, line {number} is not UTF-8; it looks like {encoding}. Convert the file:\n"
                        f"  iconv -f {encoding} -t UTF-8 {path.name} > converted.txt"
                    ) from None
                yield line.strip()


@contextmanager
def _plain_read_errors(path):
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"path_datasets: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _likely_encoding(sample: bytes) -> str:
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or sample.count(0) * 4 > len(sample):
        return "UTF-16"
    try:
        beyond_ascii = [c for c in codecs.getincrementaldecoder("gb18030")().decode(sample) if c > "\x7f"]
    except UnicodeDecodeError:
        return "WINDOWS-1252"
    chinese = sum("\u3000" <= c <= "\u9fff" or "\uff00" <= c <= "\uffef" for c in beyond_ascii)
    return "GBK" if chinese * 2 > len(beyond_ascii) else "WINDOWS-1252"


def _fetch_wikitext(folder):
    offline = locate(WIKITEXT, "path_datasets", file="README.md", repo_type="dataset")
    print(f"{folder} holds no text: fetching WikiText-2 (raw) from the Hub into it")
    config = DownloadConfig(local_files_only=offline)
    for split in ("train", "test"):
        rows = load_dataset(WIKITEXT, "wikitext-2-raw-v1", split=split, download_config=config)
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / f"{split}.txt") as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(row.rstrip("\n") + "\n" for row in rows["text"])


# ------------------------------------------------------------------------------------------ tokenizer and its ids


class Vocabulary(NamedTuple):
    """What cutting, masking and packing need to know of a tokenizer."""

    size: int  # the highest token id + 1
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    ordinary_ids: np.ndarray  # (ordinary,) int64: what a chosen token may be replaced by: no special or unused token
    continues_word: np.ndarray  # (size,) bool: a piece such as ##ing


def load_tokenizer(config: Config, text: Text) -> PreTrainedTokenizerBase:
    """The tokenizer that `initial_pretrain_tokenizer` names, or a WordPiece vocabulary learned from the training lines.

    Raises UserError where it is missing, or is not one that BERT's masking and packing can work with.
    """
    name = config.initial_pretrain_tokenizer
    if name == "corpus":
        key = hashlib.blake2b(f"{CACHE_FORMAT} {text.digest} {config.vocab_size}".encode(), digest_size=16).hexdigest()
        folder = _cache(config) / f"vocabulary-{key}"
        if not folder.exists():
            with whole_folder(folder) as beside:
                _learn_vocabulary(text.train, config.vocab_size).save_pretrained(beside)
        return AutoTokenizer.from_pretrained(folder)
    offline = locate(name, "initial_pretrain_tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline)
    except Exception as error:  # transformers raises whatever the file at fault made it raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"initial_pretrain_tokenizer: {name} holds no tokenizer that loads: {reason}") from None
    if not (tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.model, models.WordPiece)):
        raise UserError(f"initial_pretrain_tokenizer: {name} is not a WordPiece tokenizer, so it is not BERT's")
    missing = [kind for kind in ("pad", "unk", "cls", "sep", "mask") if getattr(tokenizer, f"{kind}_token_id") is None]
    if missing:
        raise UserError(f"initial_pretrain_tokenizer: {name} has no {', '.join(missing)} token, which BERT needs")
    return tokenizer


def _learn_vocabulary(train: Callable[[], Iterator[str]], size: int) -> BertTokenizer:
    """A WordPiece tokenizer as BERT's uncased, learned from the lines.

    The first pass learns the characters alone. Handed to the second in a fixed order they make the vocabulary the same
    in every run; the library's own order, and with it the breaking of ties, changes from run to run.
    """

    def learn(size, first):
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=first, show_progress=False)
        tokenizer.train_from_iterator(train(), trainer)
        return tokenizer.get_vocab()

    characters = sorted(learn(0, SPECIAL_TOKENS).keys() - set(SPECIAL_TOKENS))
    return BertTokenizer(vocab=learn(size, SPECIAL_TOKENS + characters), do_lower_case=True, model_max_length=512)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The ids and tables that masking and packing need, from a WordPiece tokenizer."""
    ids = tokenizer.get_vocab()
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    ordinary = [i for token, i in ids.items() if i not in special and not token.startswith("[unused")]
    continues_word = np.zeros(max(ids.values()) + 1, dtype=bool)
    prefix = tokenizer.backend_tokenizer.model.continuing_subword_prefix
    continues_word[[i for token, i in ids.items() if token.startswith(prefix)]] = True
    return Vocabulary(
        size=len(continues_word),
        pad_id=tokenizer.pad_token_id,
        unk_id=tokenizer.unk_token_id,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        mask_id=tokenizer.mask_token_id,
        ordinary_ids=np.sort(np.array(ordinary, dtype=np.int64)),
        continues_word=continues_word,
    )


# ------------------------------------------------------------------------------------------------ lines -> chunks


class Chunks(NamedTuple):
    """The chunks of one split: chunk i is tokens[offsets[i]:offsets[i + 1]], one token or more."""

    tokens: np.ndarray  # (tokens,) uint16 or uint32, memory-mapped
    offsets: np.ndarray  # (chunks + 1,) int64

    @property
    def number(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].tolist()

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """The tokens in each of the chunks at `indices` (n,): (n,)."""
        return self.offsets[indices + 1] - self.offsets[indices]


class Prepared(NamedTuple):
    """Both splits as chunks, and what was found in the text (see `describe_text`)."""

    train: Chunks
    test: Chunks
    found: dict


def prepare(config: Config, text: Text, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> Prepared:
    """Tokenizes and cuts both splits, once for each text, tokenizer and `sen_max_length`: the result is cached on disk.

    Raises UserError where a split holds no token.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()  # sentence-embedding checkpoints ship both switched on
    encoder.no_padding()
    encoder.encode_special_tokens = True  # text that spells [MASK] is text
    decides = f"{CACHE_FORMAT} {text.digest} {config.sen_max_length} {encoder.to_str()}"
    folder = _cache(config) / f"text-{hashlib.blake2b(decides.encode(), digest_size=16).hexdigest()}"
    if not folder.exists():
        with whole_folder(folder) as beside:
            body_length = config.sen_max_length - 2  # [CLS] and [SEP]
            splits = {
                split: _write_chunks(lines, encoder, vocabulary, body_length, beside / f"{split}.arrow")
                for split, lines in (("train", text.train), ("test", text.test))
            }
            found = {split: counts for split, (counts, _, _) in splits.items()}
            (_, train_hashes, train_counts), (_, test_hashes, test_counts) = splits["train"], splits["test"]
            found["test_lines_in_train"] = int(np.isin(test_hashes, train_hashes).sum())
            found["unigram_perplexity"] = _unigram_perplexity(train_counts, test_counts)
            (beside / "found.json").write_text(json.dumps(found))
    found = json.loads((folder / "found.json").read_text())
    return Prepared(_read_chunks(folder / "train.arrow"), _read_chunks(folder / "test.arrow"), found)


def _cache(config):
    return Path(config.path_model_save) / ".cache"


def _write_chunks(lines, encoder, vocabulary, body_length, path):
    """Tokenizes and cuts the lines into an Arrow file: one column, one list of tokens a chunk, all in one record batch.

    One batch makes one flat array to index, so the tokens go to a plain file first: memory stays small for any text.
    Returns the counts to report, the hashes of the lines that are not blank, and how often each token occurs.
    """
    dtype = np.uint16 if vocabulary.size <= 1 << 16 else np.uint32
    counts = dict.fromkeys(("lines", "blank", "dropped", "characters"), 0)
    hashes, lengths = array("Q"), array("q")
    occurrences = np.zeros(vocabulary.size, dtype=np.int64)
    tokens_file = path.with_suffix(".tokens")
    with open(tokens_file, "wb") as file:
        for block in _blocks(lines()):
            texts = [line for line in block if line]
            counts["lines"] += len(block)
            counts["blank"] += len(block) - len(texts)
            counts["characters"] += sum(map(len, texts))
            hashes.extend(map(_line_hash, texts))
            encoded = [encoding.ids for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)]
            counts["dropped"] += sum(not ids for ids in encoded)
            tokens = np.fromiter(chain.from_iterable(encoded), dtype)
            tokens.tofile(file)
            occurrences += np.bincount(tokens, minlength=vocabulary.size)
            starts_word = np.split(~vocabulary.continues_word[tokens], np.cumsum([len(ids) for ids in encoded])[:-1])
            lengths.extend(chain.from_iterable(cut(line, body_length) for line in starts_word))
    if not lengths:
        raise UserError(f"path_datasets: no line of {path.stem}*.txt holds a token to train or test on")
    counts["duplicate"] = len(hashes) - len(np.unique(hashes))
    counts["tokens"] = sum(lengths)
    counts["unknown"] = int(occurrences[vocabulary.unk_id])
    counts["chunks"] = len(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    column = pa.LargeListArray.from_arrays(offsets, np.memmap(tokens_file, dtype, mode="r"))
    table = pa.table({"tokens": column})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    tokens_file.unlink()
    return counts, hashes, occurrences


def _blocks(lines: Iterator[str], characters: int = 1 << 19) -> Iterator[list[str]]:
    """Groups lines into blocks of about so many characters, enough to keep every core busy and memory small."""
    block, size = [], 0
    for line in lines:
        block.append(line)
        size += len(line) + 1
        if size >= characters:
            yield block
            block, size = [], 0
    if block:
        yield block


def cut(starts_word: np.ndarray, limit: int) -> list[int]:
    """The lengths of the chunks that a line is cut into.

    starts_word: (tokens,) bool, whether a token starts a word. A chunk has at most `limit` tokens and ends where a word
    does; only a word that is longer than `limit` by itself is cut inside.
    """
    if len(starts_word) <= limit:
        return [len(starts_word)] if len(starts_word) else []
    word_starts = np.append(np.flatnonzero(starts_word), len(starts_word))
    cuts = [0]
    while cuts[-1] < len(starts_word):
        furthest = cuts[-1] + limit
        word_start = int(word_starts[np.searchsorted(word_starts, furthest, side="right") - 1])
        cuts.append(word_start if word_start > cuts[-1] else furthest)
    return [end - start for start, end in pairwise(cuts)]


def _read_chunks(path: Path) -> Chunks:
    column = Dataset.from_file(str(path)).data.column("tokens").chunk(0)
    return Chunks(column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True))


def _unigram_perplexity(train_counts: np.ndarray, test_counts: np.ndarray) -> float:
    """Perplexity of the test tokens under the training tokens' frequencies, each count raised by one."""
    log_share = np.log((train_counts + 1) / (train_counts + 1).sum())
    return math.exp(-(test_counts @ log_share) / test_counts.sum())


def describe_text(found: dict, tokenizer_name: str) -> str:
    """What `prepare` found, for people: a line a split, then the warnings."""
    lines, warnings = [], []
    for split in ("train", "test"):
        counts = found[split]
        texts = counts["lines"] - counts["blank"]
        unknown = counts["unknown"] / counts["tokens"]
        lines.append(
            f"  {split:<5} {counts['lines']:,} lines ({counts['blank']:,} blank, {counts['duplicate']:,} duplicate, "
            f"{counts['dropped']:,} dropped as without a token), {counts['tokens']:,} tokens "
            f"({counts['tokens'] / texts:.1f} a line, {unknown:.2%} [UNK]), {counts['chunks']:,} chunks"
        )
        if unknown > 0.05:
            warnings.append(
                f"warning: {unknown:.0%} of the {split} tokens are [UNK]. The likely cause: the tokenizer "
                f"{tokenizer_name} is for another language or script (for Chinese set both initial_pretrain_model and "
                "initial_pretrain_tokenizer to bert-base-chinese)"
            )
    overlap = found["test_lines_in_train"]
    lines.append(f"        {overlap:,} test lines are also training lines")
    if overlap:
        warnings.append(f"warning: {overlap:,} test lines are also training lines; the perplexity will flatter the model")
    return "\n".join(lines + warnings)


# --------------------------------------------------------------------------------------- chunks -> masked batches


class MaskRule(NamedTuple):
    """How tokens are chosen and replaced (Devlin et al., BERT, arXiv 1810.04805, section 3.1 and appendix A.1)."""

    probability: float = 0.15  # that a token, or a word, is chosen
    mask_share: float = 0.8  # of the chosen: become [MASK]
    random_share: float = 0.1  # of the chosen: become a random ordinary token; the rest stay
    whole_words: bool = False


class Batch(NamedTuple):
    """Packed rows: chunks laid end to end, each between its own [CLS] and [SEP]. All (rows, width) int64."""

    input_ids: np.ndarray
    position_ids: np.ndarray  # restart at 0 with every chunk
    sequence_ids: np.ndarray  # 1, 2, ... number the chunks of a row; 0 is padding
    labels: np.ndarray  # the token to predict, or IGNORED


ORDER, MASKS = 1, 2  # streams of random numbers that must not meet
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mix(bits: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit integers: the finaliser of SplitMix64 (Steele, Lea and Flood, doi 10.1145/2660193.2660195)."""
    for shift, factor in MIX:
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def noise(*counters: int | np.ndarray) -> np.ndarray:
    """64 random bits for each tuple of counters, which broadcast against each other. No state: a hash, chained.

    A mask drawn from (seed, epoch, chunk, position) is the same whatever the batch, the device or an interruption.
    """
    bits = np.zeros(1, dtype=np.uint64)
    for counter in counters:
        bits = _mix(bits + np.uint64(0x9E3779B97F4A7C15) + np.asarray(counter).astype(np.uint64))
    return bits


def _uniform(bits: np.ndarray) -> np.ndarray:
    return (bits >> np.uint64(11)) * 2.0**-53  # in [0, 1)


def epoch_order(seed: int, epoch: int, number: int) -> np.ndarray:
    """The order in which an epoch visits the chunks: a permutation (number,) of their indices."""
    return np.argsort(noise(seed, ORDER, epoch, np.arange(number)), kind="stable")


def take(chunks: Chunks, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens (tokens,) int64 of some chunks end to end, and the chunks' lengths (n,)."""
    lengths = chunks.lengths(indices)
    skipped = chunks.offsets[indices] - (np.cumsum(lengths) - lengths)
    return chunks.tokens[np.arange(lengths.sum()) + np.repeat(skipped, lengths)].astype(np.int64), lengths


def mask(
    tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray, vocabulary: Vocabulary, rule: MaskRule
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses tokens to predict and hides them.

    tokens (tokens,) of chunks end to end, their lengths (n,) and their keys (n,), which with a token's position in its
    chunk decide its mask. Each token (word) is chosen with the rule's probability on its own; a chunk where none is, has
    the one with the smallest number chosen. Returns the input ids and the labels, (tokens,) each.
    """
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    own_bits = noise(np.repeat(keys, lengths), positions)
    bits = own_bits
    if rule.whole_words:  # a word's pieces share its first piece's bits, and so its fate
        starts_word = ~vocabulary.continues_word[tokens] | (positions == 0)
        bits = own_bits[np.maximum.accumulate(np.where(starts_word, np.arange(len(tokens)), 0))]
    draw = _uniform(bits)
    smallest = np.repeat(np.minimum.reduceat(draw, starts), lengths)
    chosen = np.flatnonzero((draw < rule.probability) | (draw == smallest))

    labels = np.full(len(tokens), IGNORED)
    labels[chosen] = tokens[chosen]
    fate = _uniform(noise(bits[chosen], 1))
    ordinary = vocabulary.ordinary_ids
    random_ids = ordinary[(_uniform(noise(own_bits[chosen], 2)) * len(ordinary)).astype(np.int64)]
    input_ids = tokens.copy()
    input_ids[chosen] = np.select(
        [fate < rule.mask_share, fate < rule.mask_share + rule.random_share],
        [vocabulary.mask_id, random_ids],
        default=tokens[chosen],
    )
    return input_ids, labels


def content_keys(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mask keys (n,) that depend on each chunk's own tokens alone, for evaluations that compare between runs."""
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    return noise(np.add.reduceat(noise(tokens, positions), starts))


def pack(
    input_ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, row_length: int, vocabulary: Vocabulary
) -> Batch:
    """Lays chunks end to end into as few rows as first-fit-decreasing finds (Krell et al., arXiv 2107.02027).

    input_ids and labels (tokens,) of chunks of the given lengths (n,). Rows hold at most `row_length` tokens, or the
    longest chunk. With no chunk at all the batch is one row of padding.
    """
    needs = lengths + 2  # [CLS] and [SEP]
    row_length = max(row_length, needs.max(initial=1))
    row_of, offset_of, sequence_of = (np.zeros(len(needs), dtype=np.int64) for _ in range(3))
    used, held = [], []  # tokens and chunks in each row so far
    for chunk in np.argsort(-needs, kind="stable"):
        need = needs[chunk]
        row = next((row for row, tokens in enumerate(used) if tokens + need <= row_length), len(used))
        if row == len(used):
            used.append(0)
            held.append(0)
        row_of[chunk], offset_of[chunk] = row, used[row]
        used[row] += need
        held[row] += 1
        sequence_of[chunk] = held[row]

    shape = (max(len(used), 1), max(used, default=1))
    batch = Batch(
        input_ids=np.full(shape, vocabulary.pad_id),
        position_ids=np.zeros(shape, dtype=np.int64),
        sequence_ids=np.zeros(shape, dtype=np.int64),
        labels=np.full(shape, IGNORED),
    )
    first = row_of * shape[1] + offset_of  # where each chunk's [CLS] goes, in the flattened rows
    positions = np.arange(needs.sum()) - np.repeat(np.cumsum(needs) - needs, needs)
    everywhere = np.repeat(first, needs) + positions
    batch.position_ids.reshape(-1)[everywhere] = positions
    batch.sequence_ids.reshape(-1)[everywhere] = np.repeat(sequence_of, needs)
    batch.input_ids.reshape(-1)[first] = vocabulary.cls_id
    batch.input_ids.reshape(-1)[first + needs - 1] = vocabulary.sep_id
    inside = everywhere[(positions > 0) & (positions < np.repeat(needs, needs) - 1)]
    batch.input_ids.reshape(-1)[inside] = input_ids
    batch.labels.reshape(-1)[inside] = labels
    return batch


def masked_batch(
    chunks: Chunks,
    indices: np.ndarray,
    vocabulary: Vocabulary,
    row_length: int,
    rule: MaskRule = MaskRule(),
    draw: tuple[int, int] | None = None,
    part: slice = slice(None),
) -> tuple[Batch, int]:
    """Takes, masks and packs the chunks at `indices` (n,); also returns how many tokens are masked in all of them.

    draw: (seed, epoch) of a training mask, every epoch's its own; None masks for evaluation, by each chunk's own tokens.
    part: which of the chunks to pack, one device's share; the count is of all, so that devices agree on it.
    """
    tokens, lengths = take(chunks, indices)
    keys = content_keys(tokens, lengths) if draw is None else noise(draw[0], MASKS, draw[1], indices)
    input_ids, labels = mask(tokens, lengths, keys, vocabulary, rule)
    packed = np.zeros(len(lengths), dtype=bool)
    packed[part] = True
    inside = np.repeat(packed, lengths)
    batch = pack(input_ids[inside], labels[inside], lengths[packed], row_length, vocabulary)
    return batch, int(np.count_nonzero(labels != IGNORED))
