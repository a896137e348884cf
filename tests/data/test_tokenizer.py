"""Laws 5 and 8: the vocabulary learned from the text is the same in every run; where there is none, it is said."""

import os
import subprocess
import sys

import pytest
from runs import ROOT
from texts import CHINESE, ENGLISH, make_lines
from transformers import BertConfig

from mlm.data.tokenizer import learn_tokenizer, load_tokenizer
from mlm.errors import UserError


@pytest.mark.slow
def test_the_same_text_gives_the_same_vocabulary_in_every_process():
    program = "import pydoc_data.topics as t; from mlm.data.tokenizer import learn_tokenizer as learn;"
    program += "lines = lambda: (line for topic in t.topics.values() for line in topic.splitlines());"
    program += "learned = learn(lines, 3000).backend_tokenizer.to_str()"
    here = {}
    exec(program, here)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # here it is another, most likely a random one
    environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-c", f"{program}; print(learned)"]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert there == f"{here['learned']}\n" and len(there) > 3000


def test_a_learned_vocabulary_covers_its_text_and_lowers_case():
    tokenizer = learn_tokenizer(lambda: iter(make_lines(400)), 300)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert set(tokenizer.get_vocab().values()) == set(range(len(tokenizer)))
    for text in (" ".join(ENGLISH).upper(), CHINESE, "😀"):
        assert tokenizer.unk_token not in tokenizer.tokenize(text)
    assert tokenizer.tokenize("PATIENT was") == ["patient", "was"]


def test_a_folder_without_a_vocabulary_is_said_plainly(tmp_path, settings):
    BertConfig().save_pretrained(tmp_path)
    config = settings(initial_pretrain_model=str(tmp_path), initial_pretrain_tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="has no vocabulary"):
        load_tokenizer(config, None, "")
