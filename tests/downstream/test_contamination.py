"""Test texts that a model was pre-trained on are counted."""

import json

import pytest

from mlm.downstream import contamination
from mlm.downstream.contamination import count_contaminated
from mlm.downstream.task import Task
from mlm.downstream.task_files import Example
from mlm.text.files import find_text


def test_test_texts_in_the_pre_training_text_of_a_run_are_counted(tmp_path, settings, text_folder):
    text_folder.joinpath("train.txt").write_text("The patient took << metformin >>.\nAnother line.\nA third one.\n")
    output = tmp_path / "output" / "mine"
    output.mkdir(parents=True)
    recorded = {"path_datasets": str(text_folder), "path_model_save": str(tmp_path / "output"), "removed_setting": 1}
    text_digest = find_text(settings()).digest
    output.joinpath("settings.json").write_text(json.dumps({"settings": recorded, "text_digest": text_digest}))
    examples = [Example((text,), ("x",)) for text in ("the patient took metformin", "A third", "a third one", "new")]
    task = Task("t", "text", ["x"], [], [], examples, [])
    assert count_contaminated(str(output / "final"), task) == 2
    pairs = task._replace(kind="pair", test=[Example(("new", "A third one!"), ("x",))])
    assert count_contaminated(str(output / "final"), pairs) == 1
    words = task._replace(kind="entities", test=[Example(("another", "line", "."), ("O", "O", "O"))])
    assert count_contaminated(str(output / "final"), words) == 1
    assert count_contaminated(str(tmp_path), task) is None
    reads = []
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(contamination, "find_text", lambda config: reads.append(config) or find_text(config))
        for part in ("final", "best", "final"):
            assert count_contaminated(str(output / part), task._replace(test=examples[:1])) == 1
    assert len(reads) == 1  # once for all models of a run
    contamination._find_in_training_text.cache_clear()
    with text_folder.joinpath("train.txt").open("a") as file:  # no longer the text that it was trained on
        file.write("One more.\n")
    assert count_contaminated(str(output / "final"), task) is None
    contamination._find_in_training_text.cache_clear()
    text_folder.joinpath("train.txt").unlink()
    assert count_contaminated(str(output / "final"), task) is None
    for damaged in ("[]", '{"settings": []}', '{"settings": null}', "{"):
        output.joinpath("settings.json").write_text(damaged)
        contamination._find_in_training_text.cache_clear()
        assert count_contaminated(str(output / "final"), task) is None
