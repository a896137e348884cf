"""A task: labelled texts in three splits that share no text, and their classes."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from Config import DownstreamConfig
from mlm.downstream.task_files import ENDINGS, Example, Kind, LabelledFile, read_labelled
from mlm.errors import UserError
from mlm.storage import digest

DEV_NAMES = ("dev", "devel", "val", "valid", "validation", "eval")
SPLIT_NAMES = {"train": ("train",), "dev": DEV_NAMES, "test": ("test",)}

Item = TypeVar("Item")


class Task(NamedTuple):
    """A classification task, of texts, pairs of texts, or words."""

    name: str
    kind: Kind
    classes: list[str]  # labels, or tags of words
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    notes: list[str]  # what was left out, and what to beware of, for people
    read: str = ""  # the columns, and where each split is from, for people

    @property
    def digest(self) -> str:
        return digest(self.kind, self.classes, self.train, self.dev, self.test)

    def targets(self, examples: list[Example]) -> list[int]:
        """Returns the class ids of the examples' labels, one example after the other."""
        class_ids = {name: number for number, name in enumerate(self.classes)}
        return [class_ids[label] for example in examples for label in example.labels]


def load_task(config: DownstreamConfig) -> Task:
    """Reads the task from one file, which is split by `seed` with stratification, or from a folder's files.

    Raises UserError where there is too little to train, choose and test on, or nothing to tell apart.
    """
    path = Path(config.task)
    found, sources = _find_files(path)
    files = {split: read_labelled(file, config) for split, file in found.items()}
    kinds = {file.kind for file in files.values()}
    if len(kinds) > 1:
        raise UserError(f"task: the files of {path} hold different kinds of examples: {', '.join(sorted(kinds))}")
    [kind] = kinds
    read = "; ".join([*dict.fromkeys(file.columns for file in files.values()), sources])
    _check_labels(kind, [example for file in files.values() for example in file.examples], path, read)

    # The splits, of which none shares a text with another.
    splits, left_out = _split(files, kind, config)
    left_out = {"as text or label is empty": sum(file.empty for file in files.values()), **left_out}
    notes = [f"left out, {reason}: {number:,}" for reason, number in left_out.items() if number]
    for split, examples in splits.items():
        if not examples:
            raise UserError(f"task: {path} leaves no text for {split}. {'. '.join([f'Read: {read}', *notes])}")

    train, dev, test = (
        Counter(label for example in examples for label in example.labels) for examples in splits.values()
    )
    if len(train) == 1:
        raise UserError(f"task: all training texts of {path} have the label {next(iter(train))}. Read: {read}")
    if not train.keys() & test.keys():
        raise UserError(f"task: no label of the training texts of {path} is one of the test texts'")
    notes += _notes_on_labels(kind, train, test)
    name = path.name.partition(".")[0] or path.resolve().name
    return Task(name, kind, sorted({*train, *dev, *test}), **splits, notes=notes, read=read)


def _find_files(path: Path) -> tuple[dict[str, Path], str]:
    """Returns the one file as "all", or the folder's files by split, and says which they are.

    Raises UserError where there is none, or where it is unclear which one is meant.
    """
    if path.is_file():
        return {"all": path}, f"train, dev and test drawn from {path.name}"
    if not path.is_dir():
        raise UserError(f"task: there is no file or folder {path}")
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    found: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        wanted = {f"{name}.{ending}{packed}" for name in names for ending in ENDINGS for packed in ("", ".gz")}
        candidates = [file for file in files if file.name.lower() in wanted]
        if len(candidates) > 1:
            raise UserError(f"task: {path} has more than one file to {split}: {', '.join(map(str, candidates))}")
        if candidates:
            found[split] = candidates[0]
    others = [file.name for file in files if file not in found.values()]
    has_other_dev = any({*re.split(r"[^a-z]+", name.lower())} & {*DEV_NAMES} for name in others)
    missing = ({*SPLIT_NAMES} if has_other_dev else {"train", "test"}) - found.keys()
    if missing:
        raise UserError(
            f"task: {path} has no {' and no '.join(sorted(missing))} file, such as train.tsv, dev.tsv and test.tsv; it "
            f"holds {list_names([file.name for file in files])}. Name them so; or name one file, which is then split"
        )
    sources = [f"{split} from {found[split].name if split in found else 'train'}" for split in SPLIT_NAMES]
    return found, ", ".join(sources) + (f" (not read: {list_names(others)})" if others else "")


def _split(
    files: dict[str, LabelledFile], kind: Kind, config: DownstreamConfig
) -> tuple[dict[str, list[Example]], dict[str, int]]:
    """Returns the splits, and how many examples were left out for each reason. Splits without a file are drawn."""
    left_out = {}
    if "all" in files:
        given = files["all"].examples
        first = {normalize_text(example): example for example in reversed(given)}  # of each text
        distinct = list(first.values())[::-1]
        left_out["as they repeat an earlier text"] = len(given) - len(distinct)
        contradictions = sum(first[normalize_text(example)].labels != example.labels for example in given)
        left_out["among these with another label than the earlier one"] = contradictions
        rest, test = _stratified_split(distinct, config.test_fraction, kind, config.seed)
        dev_share = config.dev_fraction / (1 - config.test_fraction)
    else:
        rest, test, dev_share = files["train"].examples, files["test"].examples, config.dev_fraction
    if "dev" in files:
        train, dev = rest, files["dev"].examples
    else:
        train, dev = _stratified_split(rest, dev_share, kind, config.seed + 1)

    # A text in two splits stays in the later one, so that a published test set stays what it is.
    kept_train, kept_dev = _without(train, [*dev, *test]), _without(dev, test)
    left_out["as they train on a text of dev or test"] = len(train) - len(kept_train)
    left_out["as they are of dev and of test"] = len(dev) - len(kept_dev)
    return {"train": kept_train, "dev": kept_dev, "test": test}, left_out


def _without(examples: list[Example], others: list[Example]) -> list[Example]:
    """Returns the examples whose text is of none of the others."""
    texts = {*map(normalize_text, others)}
    return [example for example in examples if normalize_text(example) not in texts]


def _stratified_split(
    examples: list[Example], share: float, kind: Kind, seed: int
) -> tuple[list[Example], list[Example]]:
    """Returns what is left and what is held out, about `share` of each class, both in the examples' order.

    Of a class of three or more one example at least is held out, and one at least is left of every class. (scikit-learn
    refuses to stratify by a class that has one example.)
    """
    order = np.random.default_rng([seed, 1]).permutation(len(examples)).tolist()
    held_out: set[int] = set()
    spare = []  # what may be held out beside that, where rounding leaves too few
    for members in group_by(order, lambda index: stratum(examples[index], kind)).values():
        wanted = round(share * len(members))
        number = min(max(wanted, 1) if len(members) >= 3 else wanted, len(members) - 1)
        held_out.update(members[:number])
        spare += members[number:-1]
    held_out.update(spare[: max(0, round(share * len(examples)) - len(held_out))])
    left = [example for index, example in enumerate(examples) if index not in held_out]
    return left, [examples[index] for index in sorted(held_out)]


def normalize_text(example: Example) -> str:
    """Returns an example's text with plain white space, by which it is recognised in another split."""
    return "\t".join(" ".join(part.split()) for part in example.parts)


def sample_per_class(task: Task, size: str, seed: int) -> list[int]:
    """Returns the indices of `size` training examples of each class ("all": of all examples), by the seed.

    Of a task with entities, `size` sentences times the types of entities.
    """
    if size == "all":
        return list(range(len(task.train)))
    order = np.random.default_rng([seed, 2]).permutation(len(task.train)).tolist()
    if task.kind == "entities":
        return order[: int(size) * len(entity_types(task.classes))]
    by_class = group_by(order, lambda index: task.train[index].labels[0])
    return [index for members in by_class.values() for index in members[: int(size)]]


def stratum(example: Example, kind: Kind) -> str:
    """Returns the class that an example is drawn with; sentences with entities are all of one stratum."""
    return "" if kind == "entities" else example.labels[0]


def group_by(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Returns the items by key, in their order; keys come in the order of their first items."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def entity_types(tags: list[str]) -> list[str]:
    """Returns the types of entities in some tags: drug for B-drug and I-drug."""
    return sorted({tag.partition("-")[2] for tag in tags if tag != "O"})


def _check_labels(kind: Kind, examples: list[Example], path: Path, read: str) -> None:
    """Raises UserError where there is nothing to tell apart, or labels look like texts, scores or lists."""
    labels = {label for example in examples for label in example.labels}
    if len(labels) == 1:
        raise UserError(f"task: all texts of {path} have the label {labels.pop()}: nothing to tell apart. Read: {read}")
    numbers = [label for label in labels if re.fullmatch(r"[-+]?\d+(?:[.,]\d+)*|\[.*\]", label)]  # or lists
    odd = sorted(label for label in numbers if re.search(r"[.,]0*[1-9]|\[", label))
    are_texts = len(labels) > max(10, 0.8 * len(examples))
    if kind != "entities" and (are_texts or (odd and len(numbers) > 0.9 * len(labels))):
        raise UserError(
            f"task: {path} has {len(labels):,} different labels for {len(examples):,} texts, such as "
            f"{(odd or sorted(labels))[0][:40]!r}; is the label in another column? (--label_column) A text has one "
            "class here: no score (regression), no list of labels"
        )


def _notes_on_labels(kind: Kind, train: Counter[str], test: Counter[str]) -> list[str]:
    """Returns notes on names that look alike, classes that cannot be learned or tested, and one that nearly all have.

    train, test: how often each label occurs.
    """
    folded = Counter(label.casefold() for label in train.keys() | test.keys())
    named = {"labels that differ in case alone": {label for label, number in folded.items() if number > 1}}
    if kind != "entities":
        named["classes in the test that training never shows, so always missed"] = test.keys() - train.keys()
        named["classes that are never tested"] = train.keys() - test.keys()
    notes = [f"{what}: {list_names(sorted(labels))}" for what, labels in named.items() if labels]
    [(largest, occurrences)] = test.most_common(1)
    share = occurrences / test.total()
    if kind != "entities" and 0.8 < share < 1:
        notes.append(
            f"{share:.0%} of the test texts are {largest}, so always saying that has this accuracy; --metric macro_f1 "
            "weighs classes alike"
        )
    return notes


def list_names(names: list[str], most: int = 10) -> str:
    shown = ", ".join(re.sub(r"\s+", " ", name)[:40] for name in names[:most]).encode(errors="replace").decode()
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")
