"""Trials: dev alone chooses, what is finished is not done again, what is changed or damaged is done anew."""

import csv
import json

import pytest
from comparisons import make_rows, read_csv, save_model, write_rows
from runs import environments, finish, fork_program

import downstream


def test_dev_chooses_the_rate_and_test_labels_change_nothing_but_the_scores(tmp_path, compare):
    """The same texts twice, once with other test labels: training, choices and predictions stay."""
    model, rows = save_model(tmp_path / "model"), make_rows(200, 6)
    for name, test in (
        ("right", rows[150:]),
        ("wrong", [(text, {"no": "yes", "yes": "no"}[label]) for text, label in rows[150:]]),
    ):
        (tmp_path / name).mkdir()
        for split, of_split in (("train", rows[:100]), ("dev", rows[100:150]), ("test", test)):
            write_rows(tmp_path / name / f"{split}.tsv", of_split)
    found = {}
    for name in ("right", "wrong"):
        folder = compare(tmp_path / name, model, learning_rates=(1e-5, 3e-3), min_steps=60, num_seeds=2)
        trials = [json.loads(path.read_text()) for path in (folder / "trials").glob("*.json")]
        found[name] = sorted(
            (*trial["trial"].values(), trial["best_step"], trial["dev_score"], trial["predictions"]) for trial in trials
        )
        chosen = {float(row["learning_rate"]) for row in read_csv(folder / "results.csv")}
        assert chosen == {3e-3}  # on dev the better; on the wrong test the worse
    assert found["right"] == found["wrong"] and len(found["right"]) == 3


def count_trials(monkeypatch) -> list:
    """A list that every trial from now on is added to."""
    done = []

    def counted(comparison, trial, fine_tune=downstream.fine_tune_once):
        done.append(trial)
        return fine_tune(comparison, trial)

    monkeypatch.setattr(downstream, "fine_tune_once", counted)
    return done


def test_what_is_finished_is_not_done_again(tmp_path, compare, monkeypatch):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 4))
    models = [save_model(tmp_path / f"model{seed}", seed=seed) for seed in range(3)]
    done = count_trials(monkeypatch)
    folder = compare(task, *models[:2], num_seeds=3, learning_rates=(1e-3, 2e-3))
    assert len(done) == 2 * (2 + 2)  # two rates by the first seed, then two more seeds
    before = (folder / "results.csv").read_text()

    def stop(comparison, trial):
        raise KeyboardInterrupt

    monkeypatch.setattr(downstream, "fine_tune_once", stop)
    assert compare(task, *models[:2], num_seeds=3, learning_rates=(1e-3, 2e-3)) == folder
    assert (folder / "results.csv").read_text() == before
    with pytest.raises(SystemExit) as stopped:
        compare(task, *models, num_seeds=3, learning_rates=(1e-3, 2e-3))
    assert stopped.value.code == 130

    monkeypatch.undo()
    done = count_trials(monkeypatch)
    compare(task, *models, num_seeds=3, learning_rates=(1e-3, 2e-3))
    assert {trial.model for trial in done} == {models[2]} and len(done) == 4
    assert (folder / "results.csv").read_text().startswith(before)


def test_a_changed_model_or_budget_is_tried_anew(tmp_path, compare, monkeypatch):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 4))
    model = save_model(tmp_path / "model")
    done = count_trials(monkeypatch)
    compare(task, model, num_seeds=1)
    compare(task, model, num_seeds=1, min_steps=13)
    compare(task, model, num_seeds=1, metric="macro_f1")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    compare(task, model, num_seeds=1)
    save_model(tmp_path / "model", seed=9)
    compare(task, model, num_seeds=1)
    assert len(done) == 5


@pytest.mark.parametrize("damage", ["", "{", "{}", "[]", "\0\0", '"predictions"', "short", "beyond"])
def test_a_damaged_trial_is_done_again(tmp_path, compare, damage):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 4))
    model = save_model(tmp_path / "model")
    folder = compare(task, model, frozen=True, num_seeds=2)
    before, trial = (folder / "results.csv").read_text(), next((folder / "trials").glob("*.json"))
    content = json.loads(trial.read_text())
    changed = {"short": content["predictions"][1:], "beyond": [2, *content["predictions"][1:]]}
    trial.write_text(json.dumps(content | {"predictions": changed[damage]}) if damage in changed else damage)
    compare(task, model, frozen=True, num_seeds=2)
    without_seconds = [[row | {"seconds": ""} for row in csv.DictReader(text.splitlines())] for text in
                       (before, (folder / "results.csv").read_text())]  # fmt: skip
    assert without_seconds[0] == without_seconds[1]


@pytest.mark.slow
def test_two_ranks_share_the_trials(tmp_path):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 4))
    model = save_model(tmp_path / "model")
    flags = ["--task", str(task), "--models", model, "--num_seeds", "4", "--min_steps", "8", "--num_epochs", "1"]
    flags += ["--examples_per_class", "all", "--learning_rates", "1e-3", "--mixed_precision", "no", "--path_model_save"]
    tables = []
    for ranks in ([{}], environments(2)):
        output = tmp_path / f"{len(ranks)} ranks"
        for process in [fork_program("downstream.py", *flags, str(output), **each) for each in ranks]:
            finish(process)
        [folder] = (output / "downstream").iterdir()
        rows = read_csv(folder / "results.csv")
        assert len(rows) == len(list((folder / "trials").glob("*.json"))) == 4
        tables.append([{name: value for name, value in row.items() if name != "seconds"} for row in rows])
    assert tables[0] == tables[1]
