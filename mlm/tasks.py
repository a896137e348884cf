"""A task: labelled texts in three splits that share no text, and the classes to be told apart."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from Config import DownstreamConfig
from mlm.errors import UserError
from mlm.labelled import Example, Kind, LabelledFile, read_labelled
from mlm.storage import digest

ENDINGS = ("tsv", "csv", "jsonl", "json", "ndjson", "txt", "conll", "bio", "iob", "iob2")
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "valid", "validation", "eval"), "test": ("test",)}


class Task(NamedTuple):
    """What is to be learned, and on what it is tested."""

    name: str
    kind: Kind
    classes: list[str]  # labels, or tags of words
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    notes: list[str]  # what was left out, and what to beware of, for people

    @property
    def digest(self) -> str:
        return digest(self.kind, self.classes, self.train, self.dev, self.test)


def load_task(config: DownstreamConfig) -> Task:
    """The task of one file, split by `seed` with each class's share in every split, or of a folder's files.

    Raises UserError where there is too little to train, choose and test on, or nothing to tell apart.
    """
    path = Path(config.task)
    files = {split: read_labelled(file, config) for split, file in _find_files(path).items()}
    kinds = {file.kind for file in files.values()}
    if len(kinds) > 1:
        raise UserError(f"task: the files of {path} hold different kinds of examples: {', '.join(sorted(kinds))}")
    [kind] = kinds
    _check_labels(kind, [example for file in files.values() for example in file.examples], path)
    splits, notes = _split(files, kind, config)
    splits, shared = _without_shared_texts(splits)
    empty = sum(file.empty for file in files.values())
    if empty:
        notes.append(f"left out, as text or label is empty: {empty:,}")
    for split, number in sorted(shared.items(), reverse=True):
        if number:
            notes.append(f"left out of {split}, as their texts are in a later split: {number:,}")
    for split, examples in splits.items():
        if not examples:
            raise UserError(f"task: {path} leaves no text for {split}; it holds too few, or repeats a few")
    counts = {
        split: Counter(label for example in examples for label in example.labels) for split, examples in splits.items()
    }
    if len(counts["train"]) == 1:
        raise UserError(f"task: all training texts of {path} have the label {next(iter(counts['train']))}")
    classes = sorted(set().union(*counts.values()))
    notes += _notes_on_classes(kind, counts["train"], counts["test"])
    return Task(path.name.partition(".")[0] or path.resolve().name, kind, classes, **splits, notes=notes)


def _find_files(path: Path) -> dict[str, Path]:
    """The one file as "all", or the folder's files by split. Raises UserError where there is none."""
    if path.is_file():
        return {"all": path}
    if not path.is_dir():
        raise UserError(f"task: there is no file or folder {path}")
    found = {}
    for split, names in SPLIT_NAMES.items():
        candidates = [
            file for name in names for ending in ENDINGS for file in sorted(path.glob(f"{name}.{ending}*"))
            if file.suffix in (f".{ending}", ".gz")
        ]  # fmt: skip
        if candidates:
            found[split] = candidates[0]
    missing = {"train", "test"} - found.keys()
    if missing:
        raise UserError(
            f"task: {path} has no {' and no '.join(sorted(missing))} file, such as train.tsv and test.tsv; or name one "
            "file, which is then split"
        )
    return found


# --------------------------------------------------------------------------------------------------------------- split


def _split(
    files: dict[str, LabelledFile], kind: Kind, config: DownstreamConfig
) -> tuple[dict[str, list[Example]], list[str]]:
    """The splits, and notes about them; what the files do not split is split by `seed`."""
    notes = []
    if "all" in files:
        distinct = list({text_of(example): example for example in reversed(files["all"].examples)}.values())[::-1]
        repeated = len(files["all"].examples) - len(distinct)
        if repeated:
            notes.append(f"left out, as they repeat an earlier text: {repeated:,}")
        rest, test = _hold_out(distinct, config.test_fraction, kind, config.seed)
        dev_share = config.dev_fraction / (1 - config.test_fraction)
    else:
        rest, test, dev_share = files["train"].examples, files["test"].examples, config.dev_fraction
    if "dev" in files:
        return {"train": rest, "dev": files["dev"].examples, "test": test}, notes
    train, dev = _hold_out(rest, dev_share, kind, config.seed + 1)
    return {"train": train, "dev": dev, "test": test}, notes


def _hold_out(examples: list[Example], share: float, kind: Kind, seed: int) -> tuple[list[Example], list[Example]]:
    """What is left and what is held out, about `share` of each class; of a class of three or more, one at least.

    Both in the examples' order. A class with one example is not held out. (scikit-learn refuses such classes.)
    """
    draw = np.random.default_rng(seed)
    by_class: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_class.setdefault("" if kind == "entities" else example.labels[0], []).append(index)
    held_out: set[int] = set()
    for members in by_class.values():
        wanted = round(share * len(members))
        number = max(wanted, 1) if len(members) >= 3 else min(wanted, len(members) - 1)
        held_out.update(draw.permutation(members)[:number].tolist())
    left = [example for index, example in enumerate(examples) if index not in held_out]
    return left, [examples[index] for index in sorted(held_out)]


def text_of(example: Example) -> str:
    """An example's text, by which it is recognised in another split."""
    return "\t".join(" ".join(part.split()) for part in example.parts)


def _without_shared_texts(splits: dict[str, list[Example]]) -> tuple[dict[str, list[Example]], dict[str, int]]:
    """The splits without the texts that stand in a later one too (train, dev, test), and how many left each."""
    later: set[str] = set()
    kept, removed = {}, {}
    for split in ("test", "dev", "train"):
        kept[split] = [example for example in splits[split] if text_of(example) not in later]
        removed[split] = len(splits[split]) - len(kept[split])
        later.update(map(text_of, splits[split]))
    return {split: kept[split] for split in ("train", "dev", "test")}, removed


def draw_few(task: Task, size: str, seed: int) -> list[int]:
    """The indices of `size` training examples of each class ("all": of all there are), drawn anew for each seed.

    Of a task with entities, so many sentences times the kinds of entities.
    """
    if size == "all":
        return list(range(len(task.train)))
    order = np.random.default_rng(seed).permutation(len(task.train)).tolist()
    if task.kind == "entities":
        return order[: int(size) * len(entity_kinds(task.classes))]
    drawn: dict[str, list[int]] = {}
    for index in order:
        of_class = drawn.setdefault(task.train[index].labels[0], [])
        if len(of_class) < int(size):
            of_class.append(index)
    return [index for of_class in drawn.values() for index in of_class]


def entity_kinds(tags: list[str]) -> list[str]:
    """The kinds of entities that some tags speak of."""
    return sorted({tag.partition("-")[2] for tag in tags if tag != "O"})


# ------------------------------------------------------------------------------------------------------------- classes


def _check_labels(kind: Kind, examples: list[Example], path: Path) -> None:
    """Raises UserError where there is nothing to tell apart, or labels look like texts."""
    labels = {label for example in examples for label in example.labels}
    if len(labels) == 1:
        raise UserError(f"task: all texts of {path} have the label {labels.pop()}: nothing to tell apart")
    if kind != "entities" and len(labels) > len(examples) / 2 and len(labels) > 10:
        raise UserError(
            f"task: {path} has {len(labels):,} different labels for {len(examples):,} texts; is the label in another "
            "column? (--label_column)"
        )


def _notes_on_classes(kind: Kind, train: Counter[str], test: Counter[str]) -> list[str]:
    """Classes that cannot be learned or tested, and one that nearly all texts have."""
    if kind == "entities":
        return []
    notes = []
    unseen = sorted(test.keys() - train.keys())
    untested = sorted(train.keys() - test.keys())
    if unseen:
        notes.append(f"classes in the test that training never shows, so always missed: {_list(unseen)}")
    if untested:
        notes.append(f"classes that are never tested, as they are too rare: {_list(untested)}")
    [(largest, occurrences)] = test.most_common(1)
    share = occurrences / test.total()
    if share > 0.8:
        notes.append(
            f"{share:.0%} of the test texts are {largest}, so always saying that has this accuracy; --metric macro_f1 "
            "weighs classes alike"
        )
    return notes


def _list(names: list[str], most: int = 10) -> str:
    shown = ", ".join(re.sub(r"\s+", " ", name)[:40] for name in names[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")
