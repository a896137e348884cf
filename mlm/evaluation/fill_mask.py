"""What a model fills in for hidden tokens: its guesses for hidden words, which people look at, and predictions.csv."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm.data.chinese import HAN_CHARACTER, LocatedText, find_word_starts
from mlm.data.chunks import Chunks, Corpus, chunk_bounds, cut_line, take
from mlm.data.masking import BERT_RULE, content_keys, mask
from mlm.data.tokenizer import Vocabulary, is_wordpiece
from mlm.data.words import make_encoders
from mlm.storage import write_csv

HIDDEN = "[MASK]"
READ_LINES = 2000  # of the test text
HIDDEN_WORDS = 12  # in the report; the log shows the first few of them
COUNTED_CHUNKS = 1 << 15  # of the training text, to see which words are frequent there
FUNCTION_WORD_SHARE = 0.5  # of a text: its most frequent tokens, which are function words and punctuation marks
MIN_OCCURRENCES = 5  # in these chunks, of a word that a model could learn
MIN_ASSOCIATION = 0.2  # P(word given neighbour) of a word that its neighbour gives away
LINE_TOKENS = range(8, 41)  # enough for a person to guess from, few enough to read
MAX_LINE_CHARACTERS = 120
MOST_CHARACTERS_OF_A_TOKEN = 100  # with the white space beside it: longer words are one [UNK] to BERT
MOST_LINES = 100  # of predictions.csv
# Every chosen token becomes [MASK]: a reader would not see that one which stays as it is was chosen.
ALL_BECOME_MASK = BERT_RULE._replace(mask_share=1.0, random_share=0.0)


class HiddenWord(NamedTuple):
    """A line with one of its words hidden, for people and for a model."""

    line: str  # with HIDDEN in the place of the word, whatever the tokenizer's mask is called
    word: str
    input_ids: np.ndarray  # (positions,) int64, with [CLS] and [SEP]: the line as it is tokenized with its word
    position: int  # of the word, which is one token, and masked


class Guess(NamedTuple):
    """A word that a model thinks likely at the masked place of a line."""

    word: str
    probability: float

    @property
    def percent(self) -> str:
        """The probability as text."""
        return "<1%" if not self.probability >= 0.005 else f"{self.probability:.0%}"


def hide_words(
    lines: Iterable[str],
    train: Chunks,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    max_tokens: int = LINE_TOKENS[-1],
) -> list[HiddenWord]:
    """Returns at most `HIDDEN_WORDS` different words, each with its line, that a person and a trained model could know.

    They are chosen by counts of the training text, and by no model: content words that are often beside the same
    neighbour, as 'pressure' behind 'blood'. Where a text has too few of these, others fill up. The lines have at most
    `max_tokens` tokens, beside [CLS] and [SEP]; where all are longer than a person would read, they are cut.
    """
    encoder, bigrams = make_encoders(tokenizer).any_line, _Bigrams(train, vocabulary)
    most_tokens = min(max_tokens, LINE_TOKENS[-1])
    cut = slice(MOST_CHARACTERS_OF_A_TOKEN * most_tokens)  # a line may be a book
    beginnings = [line[cut] for line in islice(lines, READ_LINES)]
    found: dict[str, tuple[float, HiddenWord]] = {}
    for beginning in [line for line in beginnings if len(line) <= MAX_LINE_CHARACTERS] or beginnings:
        line, ids, spans, starts_word = first_chunk(beginning, most_tokens, encoder, vocabulary)
        if len(ids) not in LINE_TOKENS or HIDDEN in line or vocabulary.unk_id in ids:
            continue
        associations = bigrams.associations(ids)
        candidates = [(associations[place], place) for place in _whole_words(spans, line, starts_word)]
        if candidates:
            association, place = max(candidates)
            start, end = spans[place]
            input_ids = np.array([vocabulary.cls_id, *ids, vocabulary.sep_id])
            input_ids[1 + place] = vocabulary.mask_id
            hidden = HiddenWord(line[:start] + HIDDEN + line[end:], line[start:end], input_ids, 1 + place)
            found.setdefault(hidden.word.lower(), (association, hidden))  # each word once
    associated = [hidden for association, hidden in found.values() if association >= MIN_ASSOCIATION]
    places = np.linspace(0, len(associated) - 1, min(len(associated), HIDDEN_WORDS)).round().astype(int)
    strongest_first = sorted(found.values(), key=lambda each: -each[0])
    others = [hidden for association, hidden in strongest_first if association < MIN_ASSOCIATION]
    return [*(associated[place] for place in places), *others][:HIDDEN_WORDS]


def first_chunk(
    line: str, most_tokens: int, encoder: Tokenizer, vocabulary: Vocabulary
) -> tuple[str, np.ndarray, list[tuple[int, int]], np.ndarray]:
    """Returns the beginning of a line that is a chunk of at most so many tokens, their ids (tokens,) int64, where each
    stands in it: from which character to which, and whether each starts a word (tokens,) bool, Chinese ones aside."""
    line = line[: MOST_CHARACTERS_OF_A_TOKEN * most_tokens]
    encoded = encoder.encode(line, add_special_tokens=False)
    ids, spans = np.array(encoded.ids, dtype=np.int64), [_without_spaces(line, *span) for span in encoded.offsets]
    if is_wordpiece(encoder):
        starts_word = vocabulary.word_starts(ids, np.array([len(ids)]))
    else:
        starts_word = find_word_starts(LocatedText.of([line], [encoded]))
    if len(ids) > most_tokens:
        kept = cut_line(starts_word, most_tokens)[0]
        ids, spans, starts_word, line = ids[:kept], spans[:kept], starts_word[:kept], line[: spans[kept - 1][1]]
    return line, ids, spans, starts_word


def _without_spaces(line: str, start: int, end: int) -> tuple[int, int]:
    """Returns a token's span in a line without the white space that some tokenizers count to it."""
    start += len(line[start:end]) - len(line[start:end].lstrip())
    return start, start + len(line[start:end].rstrip())


def _whole_words(spans: list[tuple[int, int]], line: str, starts_word: np.ndarray) -> list[int]:
    """Returns the places of tokens that are a word by themselves: of four letters or more, or a Chinese character."""
    starts_word = np.append(starts_word, True)
    places = []
    for place, (start, end) in enumerate(spans):
        word = line[start:end]
        is_long_enough = len(word) >= 4 or HAN_CHARACTER.match(word)
        if word.isalpha() and is_long_enough and starts_word[place] and starts_word[place + 1]:
            places.append(place)
    return places


class _Bigrams:
    """Counts of pairs of content words that follow each other in a sample of the training chunks."""

    def __init__(self, train: Chunks, vocabulary: Vocabulary):
        tokens, lengths, _ = take(train, np.arange(0, len(train), max(1, len(train) // COUNTED_CHUNKS)))
        occurrences = np.bincount(tokens, minlength=vocabulary.size)  # (vocabulary,)
        most_frequent_first = np.argsort(-occurrences, kind="stable")
        share_before = (np.cumsum(occurrences[most_frequent_first]) - occurrences[most_frequent_first]) / len(tokens)
        is_content_word = occurrences >= MIN_OCCURRENCES  # (vocabulary,), and no function word
        is_content_word[most_frequent_first[share_before < FUNCTION_WORD_SHARE]] = False

        is_counted = is_content_word[tokens[:-1]] & is_content_word[tokens[1:]]  # (tokens - 1,)
        is_counted[chunk_bounds(lengths)[1:-1] - 1] = False  # the last of one chunk, the first of the next
        bigrams, counts = np.unique((tokens[:-1] * vocabulary.size + tokens[1:])[is_counted], return_counts=True)
        often = counts >= MIN_OCCURRENCES
        self.is_content_word, self.occurrences = is_content_word, occurrences
        # the frequent: first * vocabulary + second, and how often
        self.bigrams = dict(zip(bigrams[often].tolist(), counts[often].tolist(), strict=True))

    def associations(self, ids: np.ndarray) -> np.ndarray:
        """Returns P(word given neighbour) of a line's tokens (n,), the larger of both neighbours; -1 for a word that is
        no content word. It is the share of the neighbour's occurrences in which the word stands on this side of it."""
        pairs = ids[:-1] * len(self.occurrences) + ids[1:]
        together = np.array([self.bigrams.get(pair, 0) for pair in pairs.tolist()])  # (n - 1,)
        occurrences = np.maximum(1, self.occurrences[ids])
        given_left, given_right = np.append(0, together / occurrences[:-1]), np.append(together / occurrences[1:], 0)
        return np.where(self.is_content_word[ids], np.maximum(given_left, given_right), -1)


# ----------------------------------------------------------------------------------------- what a model makes of them


def token_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Returns the ids (tokens,) that a token has, ascending: a model may have rows that no token has."""
    return torch.tensor(sorted(tokenizer.get_vocab().values()))


@torch.no_grad()
def fill_in(model: PreTrainedModel, input_ids: np.ndarray, places: np.ndarray, candidates: Tensor) -> Tensor:
    """Returns the probability (places, candidates) that each candidate, a token's id, stands at a place of a text.

    input_ids: the text, (positions,); places: indices into it, (places,).
    """
    logits = model.eval()(torch.from_numpy(input_ids).to(model.device)[None]).logits  # (1, positions, vocabulary)
    return logits[0, places].float().cpu()[:, candidates].softmax(-1)


def guess(model: PreTrainedModel, hidden: list[HiddenWord], tokenizer: PreTrainedTokenizerBase) -> list[list[Guess]]:
    """Returns the model's three likeliest words for the hidden one of each line."""
    guesses, candidates = [], token_ids(tokenizer)
    for _, _, input_ids, position in hidden:
        [probabilities] = fill_in(model, input_ids, np.array([position]), candidates)
        top = probabilities.topk(3)
        likeliest = zip(candidates[top.indices].tolist(), top.values.tolist(), strict=True)
        guesses.append([Guess(str(tokenizer.decode([token])).strip(), probability) for token, probability in likeliest])
    return guesses


def save_predictions(path: Path, model: PreTrainedModel, corpus: Corpus, sen_max_length: int) -> None:
    """Writes a CSV of the first test lines, or of the first chunk of those that are longer."""
    write_csv(path, ("src", "mask", "pred"), islice(predict(model, corpus, sen_max_length), MOST_LINES))


def predict(model: PreTrainedModel, corpus: Corpus, sen_max_length: int) -> Iterator[dict[str, str]]:
    """Yields each test line, or its first chunk: as it is, with the tokens hidden that evaluations hide, and with the
    model's likeliest tokens in their places."""
    tokenizer, vocabulary, candidates = corpus.tokenizer, corpus.vocabulary, token_ids(corpus.tokenizer)
    encoder = make_encoders(tokenizer).any_line
    for whole_line in corpus.text.test():
        line, tokens, spans, _ = first_chunk(whole_line, sen_max_length - 2, encoder, vocabulary)
        if not len(tokens):
            continue
        lengths = np.array([len(tokens)])
        ids, masked, _ = mask(tokens, lengths, content_keys(tokens, lengths), vocabulary, ALL_BECOME_MASK)
        framed = np.concatenate([[vocabulary.cls_id], ids, [vocabulary.sep_id]])
        likeliest = candidates[fill_in(model, framed, masked + 1, candidates).argmax(-1)].tolist()
        parts: list[tuple[tuple[int, int], list[int]]] = []  # of the line, each with the tokens in its place
        for place, token in zip(masked.tolist(), likeliest, strict=True):
            (start, end), (last_start, last_end) = spans[place], parts[-1][0] if parts else (0, 0)
            if start < last_end:  # another byte of the same character
                parts[-1] = ((last_start, max(last_end, end)), [*parts[-1][1], token])
            else:
                parts.append(((start, end), [token]))
        yield {
            "src": line,
            "mask": _replace(line, [(span, tokenizer.mask_token * len(ids)) for span, ids in parts]),
            "pred": _replace(line, [(span, _spelled(ids, tokenizer)) for span, ids in parts]),
        }


def _spelled(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns tokens as they stand in a text, without the space before them, or without ##."""
    if is_wordpiece(tokenizer.backend_tokenizer):
        return "".join(token.removeprefix("##") for token in tokenizer.convert_ids_to_tokens(ids))
    return str(tokenizer.decode(ids)).strip()


def _replace(line: str, parts: list[tuple[tuple[int, int], str]]) -> str:
    """Returns the line with a part in the place of each span."""
    for (start, end), part in reversed(parts):
        line = line[:start] + part + line[end:]
    return line
