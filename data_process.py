"""The data's whole story: lines of text -> chunks of tokens (cached, memory-mapped) -> masked batches.

A *chunk* is a line, or a part of a line too long for `sen_max_length` (mlm/data/chunks.py). Each epoch visits the
chunks in an order of its own (randomness.py), masks some of their tokens (masking.py) and puts [CLS] and [SEP] around
each (packing.py, which also packs them for the model).
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from Config import Config
from mlm.data.chinese import make_segmenter
from mlm.data.chunks import (
    Chunks,
    Corpus,
    GeneralText,
    chunk_bounds,
    steps_per_epoch,
    take,
)
from mlm.data.masking import BERT_RULE, MaskRule, content_keys, mask
from mlm.data.packing import Sequences, frame, join, slice_shares
from mlm.data.preparation import Recipe, Tally, Tools, cut_lines, write_chunks
from mlm.data.text_stats import SplitStats, TextStats, text_warnings
from mlm.data.tokenizer import Vocabulary, load_tokenizer, read_vocabulary
from mlm.data.words import add_words, make_encoders, read_words
from mlm.errors import UserError
from mlm.randomness import epoch_order, general_seed, mask_keys
from mlm.runtime.together import build_together
from mlm.storage import digest
from mlm.text.files import Text, find_text, without_training_text
from mlm.text.selection import hash_lines
from mlm.text.units import in_blocks

CACHE_FORMAT = 8  # raise when what the cache holds changes
MASKED_AT_ONCE = 1 << 15  # tokens: enough that numpy's calls cost little, few enough for the processor's cache
EVALUATION_CHUNKS = 256  # chunks masked and packed together in an evaluation


def load_corpus(config: Config) -> Corpus:
    """Finds the text and the tokenizer, and cuts the text into chunks of tokens. Raises UserError where it cannot."""
    text = find_text(config)
    tokenizer = load_tokenizer(config, text.train, text.digest)
    if config.automatic_words is None:
        words = read_words(config.add_words, "add_words")
    else:  # those of the text that are most often split into subwords
        _, _, stats = prepare(config, text, tokenizer, read_vocabulary(tokenizer))
        words = [split.word for split in stats.split_words[: config.automatic_words]]
    added_words = add_words(tokenizer, words)
    vocabulary = read_vocabulary(tokenizer)
    if config.evaluate_only:  # of the training text nothing is scored or shown
        text = without_training_text(text)
    train, test, stats = prepare(config, text, tokenizer, vocabulary)
    corpus = Corpus(text, tokenizer, added_words, vocabulary, train, test, stats)
    return _add_general_text(config, corpus) if config.path_general else corpus


def _add_general_text(config: Config, corpus: Corpus) -> Corpus:
    """Returns the corpus with the text of `path_general`, found and cut as the domain's is, by the domain's tokenizer.

    Raises UserError where it cannot be read, or has too few chunks to replay.
    """
    assert config.path_general
    is_replayed = config.general_chunks > 0 and not config.evaluate_only
    like_the_domain = replace(
        config,
        path_datasets=config.path_general,
        demo=False,
        dry_run=False,
        resume=False,
        evaluate_only=not is_replayed,
    )
    try:
        text = find_text(like_the_domain)
        text = text if is_replayed else without_training_text(text)
        general = GeneralText(text.digest, *prepare(like_the_domain, text, corpus.tokenizer, corpus.vocabulary))
    except UserError as error:
        raise UserError(str(error).replace("path_datasets:", "path_general:")) from error
    if is_replayed and len(general.train) < config.general_chunks:
        raise UserError(
            f"replay_fraction: the training text of {config.path_general} has {len(general.train)} chunks, fewer than "
            f"the {config.general_chunks} of it that each step takes"
        )
    warnings = text_warnings(general.stats, config.initial_pretrain_tokenizer, only_test=not is_replayed)
    notes = [f"general text: {line}" for line in (*text.notes, *warnings)]
    return corpus._replace(text=corpus.text._replace(notes=[*corpus.text.notes, *notes]), general=general)


def prepare(
    config: Config, text: Text, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> tuple[Chunks, Chunks, TextStats]:
    """Returns the chunks of the training and the test text, and their statistics.

    They are made once for each text, tokenizer, words and `sen_max_length`, on all cores of all machines that ask for
    them, and kept on disk. Where the test text is alone, it stands for both. Raises UserError where a split holds no
    token.
    """
    encoders = make_encoders(tokenizer)
    user_words = read_words(config.user_words, "user_words")
    versions = [version(name) for name in ("tokenizers", "rjieba")]
    key = digest(CACHE_FORMAT, versions, text.digest, config.sen_max_length, encoders.any_line.to_str(), user_words)

    recipe = Recipe(config.sen_max_length - 2, encoders.describe(), user_words, vocabulary)  # without [CLS] and [SEP]
    path = Path(config.path_model_save) / ".cache" / f"text-{key}"
    folder = build_together(path, text.size_bytes, partial(write_chunks, text.selection, recipe, text.count_lines()))
    train, test = (Chunks.read(folder / split) for split in (text.selection.splits[0], "test"))
    return train, test, TextStats.from_dict(json.loads((folder / "stats.json").read_text()))


def cut_in_memory(
    lines: list[str], tokenizer: PreTrainedTokenizerBase, sen_max_length: int
) -> tuple[Chunks, SplitStats]:
    """Returns lines as chunks of tokens, and their statistics; nothing is kept on disk."""
    tools = Tools(sen_max_length - 2, make_encoders(tokenizer), make_segmenter([]), read_vocabulary(tokenizer))
    cuts, tally = [], Tally.of_nothing(tools)
    for block in in_blocks(lines):
        cut, tally = cut_lines(block, hash_lines(block), tools, tally)
        cuts.append(cut)
    tokens, lengths, of_lines = map(np.concatenate, zip(*cuts, strict=True))
    return Chunks(tokens, chunk_bounds(lengths), of_lines), tally.stats


def training_rule(config: Config) -> MaskRule:
    """Returns how tokens are masked in training, by a resolved configuration."""
    assert config.mlm_probability, "`resolve` has set it"
    return MaskRule(
        probability=config.mlm_probability,
        mask_share=config.mask_replace_prob,
        random_share=config.random_replace_prob,
        whole_words=config.whole_words_mask,
        spans=config.mask_span,
        probability_end=config.mlm_probability_end,
        steps=cast(int, config.max_steps),
    )


def replaying_batches(config: Config, corpus: Corpus, first_step: int, rank: int, ranks: int) -> Iterator[Sequences]:
    """Yields a rank's share of a run's batches from step `first_step` on, without end, by a resolved configuration.

    Where `replay_fraction` is set, general text is another stream of `training_batches`, with its own order, masks and
    epochs, and a step has a batch of each.
    """
    rule, place = training_rule(config), (first_step, rank, ranks)
    batches = training_batches(corpus.train, corpus.vocabulary, rule, config.seed, config.domain_chunks, *place)
    if not (corpus.general and config.general_chunks):
        return batches
    seed, train = general_seed(config.seed), corpus.general.train
    return map(join, batches, training_batches(train, corpus.vocabulary, rule, seed, config.general_chunks, *place))


def training_batches(
    chunks: Chunks,
    vocabulary: Vocabulary,
    rule: MaskRule,
    seed: int,
    batch_size: int,
    first_step: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Sequences]:
    """Yields a rank's share of each batch of training, without end, from step `first_step` of all epochs on.

    Each epoch has its own order and its own masks. Of a batch's `batch_size` chunks the ranks have as even shares as
    whole chunks allow; the work for one does not depend on how many there are. The shares of many steps are masked at
    once, as numpy's calls cost more than their work on a few short lines.
    """
    epoch_steps = steps_per_epoch(len(chunks), batch_size)
    chunks_at_once = MASKED_AT_ONCE * len(chunks) // len(chunks.tokens)
    steps_at_once = max(1, chunks_at_once * ranks // batch_size)
    epoch, step_of_epoch = divmod(first_step, epoch_steps)
    while True:
        for start in range(step_of_epoch, epoch_steps, steps_at_once):
            steps = np.arange(start, min(start + steps_at_once, epoch_steps))  # (steps,)
            chunks_in_batch = np.minimum(batch_size, len(chunks) - steps * batch_size)
            first, after = (steps * batch_size + chunks_in_batch * number // ranks for number in (rank, rank + 1))
            bounds = chunk_bounds(after - first)  # (steps + 1,) of each step's share among those of all
            places = np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], after - first)  # (n,) in the epoch's order
            indices = epoch_order(seed, epoch, len(chunks), places)
            tokens, lengths, starts_word = take(chunks, indices)
            rule_now = rule.at(epoch * epoch_steps + np.repeat(steps, after - first))
            masked = mask(tokens, lengths, mask_keys(seed, epoch, indices), vocabulary, rule_now, starts_word)
            yield from slice_shares(frame(*masked, lengths, vocabulary), bounds)
        epoch, step_of_epoch = epoch + 1, 0


def evaluation_batches(
    chunks: Chunks, vocabulary: Vocabulary, sample: np.ndarray, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[np.ndarray, Sequences]]:
    """Yields a rank's part of a sample of chunks, by their indices (n,), masked, with their places in the sample.

    The ranks take chunks in turn. Masked by BERT's rule as each chunk's own tokens decide.
    """
    own_places = np.arange(rank, len(sample), ranks)
    for start in range(0, len(own_places), EVALUATION_CHUNKS):
        places = own_places[start : start + EVALUATION_CHUNKS]  # (n,)
        tokens, lengths, _ = take(chunks, sample[places])
        masked = mask(tokens, lengths, content_keys(tokens, lengths), vocabulary, BERT_RULE)
        yield places, frame(*masked, lengths, vocabulary)
