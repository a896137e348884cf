"""Laws 1 and 2 for words: found in the raw text, they leave the tokens as they are. New ones get a meaning."""

import math
import random
from itertools import chain

import numpy as np
import pytest
import torch
from runs import metrics, run
from texts import CHINESE, ENGLISH, make_lines
from tokenizers import Encoding
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer, pipeline

from data_process import prepare
from mlm.data.chinese import HAN_CHARACTER, make_segmenter
from mlm.data.chunks import take
from mlm.data.tokenizer import learn_tokenizer, read_vocabulary
from mlm.data.words import WordCounts, add_words, cut_text, make_encoders, read_words, tokenize
from mlm.errors import UserError
from mlm.training.checkpoint import save_model
from model import load_model

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LATIN = "##0 met ##form ##in lower ##s blood sugar doesn t it bid ok cafe naive 500 ##mg 3 14 1 000 5 https a cn b x c"
KANA = "ひ ##ら ##か ##な ##て ##す を す"
KOREAN = "안 ##녕 세 ##계"
HAN = "我来到北京清华大学二甲双胍恤和卡拉日本語話糖尿病了增长左右见喝吧工程师服用"
PUNCTUATION = "- , ' ? ， 。 . % : / = + 😀 !"


def hand_made(lower: bool = True) -> BertTokenizer:
    tokens = [*SPECIAL, *LATIN.split(), *KANA.split(), *KOREAN.split(), *HAN, *PUNCTUATION.split()]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=lower)


def tokenized(lines: list[str], tokenizer: BertTokenizer, user_words: tuple = ()):
    """Calls `tokenize`. Returns the words of each line, as lists of tokens, and the ids (tokens,) of all."""
    segmenter = make_segmenter(user_words)
    ids, lengths, starts, *_ = tokenize(lines, make_encoders(tokenizer), read_vocabulary(tokenizer), segmenter)
    tokens, found, place = tokenizer.convert_ids_to_tokens(ids.tolist()), [], 0
    for length in lengths:
        found.append([])
        for token, start in zip(tokens[place : place + length], starts[place : place + length], strict=True):
            if start:
                found[-1].append([])
            found[-1][-1].append(token)  # fails where the first token starts no word
        place += length
    return found, ids


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Metformin lowers blood-sugar, doesn't it?", "met ##form ##in|lower ##s|blood|-|sugar|,|doesn|'|t|it|?"),
        ("我来到北京清华大学", "我|来 到|北 京|清 华 大 学"),
        ("我来到 北 京", "我|来 到|北|京"),  # spaces part words, as the writer wished
        ("服用二甲双胍500mg bid，", "服 用|二 甲|双|胍|500 ##mg|bid|，"),  # the dictionary lacks it
        ("T恤和卡拉OK", "t 恤|和|卡 拉|ok"),  # one word across alphabets, where the dictionary has it
        ("日本語を話す", "日 本|語|を|話|す"),
        ("ひらがなです", "ひ ##ら ##か ##な ##て ##す"),  # kana: what the pre-tokenizer leaves together
        ("糖尿病😀了 ok !", "糖 尿 病|😀|了|ok|!"),
        ("3.14 1,000", "3|.|14|1|,|000"),
        ("增长3.5%左右", "增 长|3|.|5|%|左 右"),
        ("见https://a.cn/b?x=1。", "见|https|:|/|/|a|.|cn|/|b|?|x|=|1|。"),
        ("Café naïve", "cafe|naive"),
        ("喝café吧 喝cafe\u0301吧", "喝|cafe|吧|喝|cafe|吧"),  # one accent composed, one not
        ("糖尿\u200b病", "糖 尿|病"),  # a zero-width space, which the tokenizer drops
        ("豈 糖尿病", "[UNK]|糖 尿 病"),  # a compatibility character, unknown here
        ("", ""),
    ],
)
def test_words_by_hand(line, words):
    expected = [word.split() for word in words.split("|") if word]
    assert tokenized([line], hand_made())[0] == [expected]


def test_korean_words_are_those_between_spaces():
    assert tokenized(["안녕 세계"], hand_made(lower=False))[0] == [[["안", "##녕"], ["세", "##계"]]]


def test_user_words_are_kept_whole_but_never_with_punctuation():
    lines = ["服用二甲双胍500mg", "C++工程师和T恤"]
    [first, second], _ = tokenized(lines, hand_made(), ("二甲双胍 20 nz", "C++工程师"))
    assert first == [["服", "用"], ["二", "甲", "双", "胍"], ["500", "##mg"]]
    assert second == [["c"], ["+"], ["+"], ["工", "程", "师"], ["和"], ["t", "恤"]]


def random_lines(number: int) -> list[str]:
    """Snippets of several scripts, joined with and without spaces."""
    draw = random.Random(5)
    snippets = [*ENGLISH, *CHINESE, "二甲双胍", "高血压", "T恤", "B超", "3.5%", "500mg", "日本語を", "안녕", "[MASK]"]
    snippets += ["é", "e\u0301", "😀", "\u200b", "\x00", "·", "https://a.cn", "C++", "Ａ", "\u3000", "𠮷", "豈"]
    return ["".join(draw.choice(snippets) + draw.choice(["", "", " "]) for _ in range(30)) for _ in range(number)]


@pytest.fixture(scope="module")
def mixed_lines() -> list[str]:
    return [*make_lines(300, seed=6), *random_lines(300), ""]


def test_finding_words_changes_no_token(tokenizer, mixed_lines):
    encoder = make_encoders(tokenizer).any_line
    expected = [encoder.encode(line, add_special_tokens=False).ids for line in mixed_lines]
    assert tokenized(mixed_lines, tokenizer)[1].tolist() == list(chain.from_iterable(expected))


def reference_words(line: str, encoding: Encoding, segmenter) -> list[list[str]]:
    """The words of one line, token by token: by the segmenter beside Chinese, else by the pre-tokenizer."""
    cuts = {start for _, start, _ in segmenter.tokenize(line)}
    words = []
    for i, (start, _) in enumerate(encoding.offsets):
        end = encoding.offsets[i - 1][1]  # of the token before
        if i and HAN_CHARACTER.search(line[end - 1] + line[start]):
            starts_word = end != start or start in cuts or not all(map(is_word_character, line[end - 1] + line[start]))
        else:
            starts_word = not i or encoding.word_ids[i] != encoding.word_ids[i - 1]
        if starts_word:
            words.append([])
        words[-1].append(encoding.tokens[i])
    return words


def is_word_character(character: str) -> bool:
    return bool(HAN_CHARACTER.match(character)) or (character.isascii() and character.isalnum())


def test_words_are_those_of_a_reference_of_one_line(tokenizer, mixed_lines):
    encoder, segmenter = make_encoders(tokenizer).any_line, make_segmenter([])
    words, _ = tokenized(mixed_lines, tokenizer)
    for line, found in zip(mixed_lines, words, strict=True):
        assert found == reference_words(line, encoder.encode(line, add_special_tokens=False), segmenter), line


def test_long_chinese_lines_are_cut_at_words_and_masked_by_them(tmp_path, settings, text_of, tokenizer, vocabulary):
    line = "患者服用药物治疗糖尿病和高血压医生随访三个月后血糖下降明显" * 20
    config = settings(path_datasets=str(tmp_path), sen_max_length=13)
    train, _, _ = prepare(config, text_of(tmp_path, line.encode()), tokenizer, vocabulary)
    tokens, lengths, starts_word = take(train, np.arange(len(train)))
    assert tokens.tolist() == tokenizer(line, add_special_tokens=False)["input_ids"]
    assert starts_word[np.cumsum(lengths) - lengths].all()
    words = make_segmenter([]).cut(line)
    assert np.flatnonzero(starts_word).tolist() == [0, *np.cumsum([len(word) for word in words])[:-1]]


def test_other_user_words_are_other_words_of_the_same_text(tmp_path, settings, text_of, tokenizer, vocabulary):
    text, file = text_of(tmp_path, "服用二甲双胍片\n".encode()), tmp_path / "user.txt"
    found = []
    for words in ("二甲双胍", "二甲双胍片", "二甲双胍"):  # found in the cache or not
        file.write_text(words, encoding="utf-8")
        chunks, _, _ = prepare(settings(user_words=str(file)), text, tokenizer, vocabulary)
        found.append(np.flatnonzero(take(chunks, np.arange(1))[2]).tolist())
    assert found == [[0, 2, 6], [0, 2], [0, 2, 6]]


@pytest.mark.parametrize("size", [2**15, 2**15 + 1, 2**16 + 1])
def test_vocabularies_of_any_size_keep_tokens_and_word_starts(tmp_path, settings, text_of, size):
    tokens = [*SPECIAL, *(f"w{i}" for i in range(size - 7)), "metform", "##in"]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})
    text = text_of(tmp_path, f"metformin w0 w{size - 8} metform".encode())
    chunks, _, _ = prepare(settings(), text, tokenizer, read_vocabulary(tokenizer))
    ids, _, starts_word = take(chunks, np.arange(1))
    assert ids.tolist() == [size - 2, size - 1, 5, size - 3, size - 2]
    assert starts_word.tolist() == [True, False, True, True, True]
    assert chunks.tokens.dtype == (np.uint16 if size <= 2**15 else np.uint32)


@pytest.mark.parametrize("lower", [True, False])
def test_ascii_lines_have_the_tokenizers_own_tokens(lower):
    tokenizer, draw = hand_made(lower), random.Random(0)
    add_words(tokenizer, ["Metformin", "café", "pro-drug"])
    known = [*tokenizer.get_vocab(), "MetFormin", "cafe", "[MASK]", "é"]
    pieces = [*map(chr, range(10)), *map(chr, range(11, 128)), " ", *(piece.removeprefix("##") for piece in known)]
    lines = ["".join(draw.choices(pieces, k=20)) for _ in range(300)]
    lines += [line.encode("ascii", "ignore").decode() for line in lines]
    assert 300 <= sum(map(str.isascii, lines)) < 600
    ids = [tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"] for line in lines]
    assert tokenized(lines, tokenizer)[1].tolist() == list(chain.from_iterable(ids))


# ------------------------------------------------------------------------------------------ words split into subwords


def test_split_words_are_those_counted_by_hand():
    tokenizer, counts = hand_made(), WordCounts()
    vocabulary, segmenter = read_vocabulary(tokenizer), make_segmenter(["二甲双胍", "北京"])
    for lines in (
        ["Metformin lowers 500mg 50000", "metformin 服用二甲双胍"],
        ["我来到北京 metforms", "二甲双胍，ひらがな", "饕餮"],
    ):
        found = tokenize(lines, make_encoders(tokenizer), vocabulary, segmenter)
        counts.update(found.tokens, found.starts_spaced, vocabulary, found.segmented)
    found = counts.split_words(tokenizer.backend_tokenizer, vocabulary, 10)
    kana = ["ひ", "##ら", "##か", "##な"]
    assert sorted(found, key=lambda split: split.word) == [
        ("metformin", 2, ["met", "##form", "##in"]),
        ("metforms", 1, ["met", "##form", "##s"]),
        ("ひらかな", 1, kana),
        ("二甲双胍", 2, ["二", "甲", "双", "胍"]),  # a rare character
        ("饕餮", 1, ["[UNK]", "[UNK]"]),
    ]
    assert [count for _, count, _ in found] == [2, 2, 1, 1, 1]  # the most frequent first
    assert counts.split_words(tokenizer.backend_tokenizer, vocabulary, 1) == found[:1]


def test_word_counts_stay_small_and_keep_the_frequent(monkeypatch, vocabulary):
    monkeypatch.setattr("mlm.data.words.COUNTED_WORDS", 100)
    counts = WordCounts()
    nothing = np.empty(0, dtype=np.int64)
    for block in range(50):
        counts.update(nothing, nothing.astype(bool), vocabulary, ["常"] + [f"{block}-{i}" for i in range(90)])
        assert len(counts.chinese) <= 191
    assert counts.chinese["常"] == 50


@pytest.mark.parametrize("limit", [1, 10, 100])
def test_a_line_in_pieces_is_the_same_tokens_and_words(tokenizer, monkeypatch, limit):
    """Long lines of both languages between short ones; nothing but a space is where a piece ends."""
    lines = make_lines(60)
    lines = [*lines[:9], " ".join(lines[9:40]), "", lines[40], "\u3000".join(lines[41:]), "x" * 300]
    rest = (make_encoders(tokenizer), read_vocabulary(tokenizer), make_segmenter([]))
    whole = tokenize(lines, *rest)
    assert all("".join(cut_text(line, limit)) == line for line in lines)
    assert max(len(cut_text(line, limit)) for line in lines) > 5
    monkeypatch.setattr("mlm.data.words.PIECE_CHARACTERS", limit)
    pieces = tokenize(lines, *rest)
    assert np.array_equal(pieces.tokens, whole.tokens) and np.array_equal(pieces.lengths, whole.lengths)
    assert (pieces.starts_word != whole.starts_word).mean() < 0.01  # the segmenter may see a word's context cut


# ------------------------------------------------------------------------------------------------ added words


def test_added_words_are_one_token_wherever_they_stand_alone(tmp_path, tokenizer):
    tokenizer = learn_tokenizer(lambda: iter(make_lines(400)), 300)
    before = len(tokenizer)
    lines = ["Glimepiride", "glimepiride", "二甲双胍", "B超", "㗎", "patient", "heart attack", "", "[MASK]"]
    (tmp_path / "words.txt").write_text("\n".join(lines), encoding="utf-8")
    words = read_words(str(tmp_path / "words.txt"), "add_words")
    expected = {
        word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in lines[:1] + lines[2:5] + lines[6:7]
    }
    assert list(add_words(tokenizer, words).items()) == list(expected.items())
    assert len(tokenizer) == before + 5 and add_words(tokenizer, words) == {}
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    new = range(before, before + 5)
    for line, found in [
        ("the GLIMEPIRIDE, glimepiride", [0, 0]),
        ("glimepirides", []),
        ("服用二甲双胍glimepiride治疗", [1, 0]),
        ("做B超 b超", [2, 2]),
        ("㗎heart attack。", [3, 4]),
    ]:
        ids, again = (each(line, add_special_tokens=False)["input_ids"] for each in (tokenizer, loaded))
        assert [index - before for index in ids if index in new] == found, line
        assert ids == again
    assert tokenizer.decode(new[1]) == tokenizer.convert_ids_to_tokens(new[1]) == "二甲双胍"
    vocabulary = read_vocabulary(loaded)
    assert vocabulary.size == before + 5 and set(new) <= set(vocabulary.regular_ids.tolist())


@pytest.mark.parametrize("spare", [0, 2, 64])
def test_added_words_start_as_the_mean_of_their_subwords(tmp_path, settings, spare):
    tokenizer = learn_tokenizer(lambda: iter(make_lines(400)), 300)
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    start = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer) + spare, **shape))
    torch.nn.init.normal_(start.cls.predictions.bias)
    save_model(tmp_path, start, tokenizer)
    known = len(tokenizer)
    added = list(add_words(tokenizer, ["glimepiride", "二甲双胍", "sulfonylurea"]).values())
    config = settings(initial_pretrain_model=str(tmp_path), initial_pretrain_tokenizer=str(tmp_path))
    by_id = dict(enumerate(added, start=known))
    model, _ = load_model(config, known + 3, 0, added=by_id)
    rows, bias = model.bert.embeddings.word_embeddings.weight, model.cls.predictions.bias
    old_rows, old_bias = start.bert.embeddings.word_embeddings.weight, start.cls.predictions.bias
    assert len(rows) == len(bias) == model.config.vocab_size == max(known + spare, known + 3)
    assert model.cls.predictions.decoder.weight is rows and model.cls.predictions.decoder.bias is bias
    assert torch.equal(rows[:known], old_rows[:known]) and torch.equal(bias[:known], old_bias[:known])
    for row, subwords in enumerate(added, start=known):
        torch.testing.assert_close(rows[row], torch.stack([old_rows[i] for i in subwords]).mean(0))
        torch.testing.assert_close(bias[row], old_bias[subwords].mean())
    ids = torch.randint(5, known, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, old_logits = model.eval()(ids).logits, start.eval()(ids).logits  # (3, 12, vocabulary)
    torch.testing.assert_close(logits[..., :known], old_logits[..., :known])  # what is known is guessed as before
    for row, subwords in enumerate(added, start=known):  # and the new as likely as its subwords
        torch.testing.assert_close(logits[..., row], old_logits[..., subwords].mean(-1))
    save_model(tmp_path / "saved", model, tokenizer)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.cls.predictions.decoder.weight, rows)
    assert (tmp_path / "saved" / "vocab.txt").read_text(encoding="utf-8").splitlines()[known] == "glimepiride"
    again, _ = load_model(config, known + 3, 0, tmp_path / "saved", by_id)  # a checkpoint has them already
    assert torch.equal(again.bert.embeddings.word_embeddings.weight, rows)


def test_an_untied_output_row_is_the_mean_of_its_subwords_too(tmp_path, settings):
    tokenizer = learn_tokenizer(lambda: iter(make_lines(400)), 300)
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    start = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **shape))
    save_model(tmp_path, start, tokenizer)
    known = len(tokenizer)
    [subwords] = add_words(tokenizer, ["glimepiride"]).values()
    config = settings(initial_pretrain_model=str(tmp_path), initial_pretrain_tokenizer=str(tmp_path))
    model, _ = load_model(config, known + 1, 0, added={known: subwords})
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    old_inputs, old_outputs = start.get_input_embeddings().weight, start.get_output_embeddings().weight
    assert not torch.equal(inputs, outputs)
    for new, old in ((inputs, old_inputs), (outputs, old_outputs)):
        assert torch.equal(new[:known], old)
        torch.testing.assert_close(new[known], old[subwords].mean(0))


def test_a_word_that_the_vocabulary_has_is_not_added(tmp_path, settings):
    """Though the tokenizer never makes it of text: its row stays what it was, and every other word gets its own."""
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        "...",
        "gmail.com",
        "gm",
        "##ail",
        "com",
        "##com",
        "ins",
        "##ulin",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    save_model(tmp_path, BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), **shape)), tokenizer)
    (tmp_path / "words.txt").write_text("...\ninsulin\ngmail.com\n##com\n[MASK]\ninscom\n", encoding="utf-8")
    (tmp_path / "train.txt").write_text("insulin ... gmail.com ins com\ninscom gm\n", encoding="utf-8")
    start = str(tmp_path)
    folder = run(
        settings(
            initial_pretrain_model=start, initial_pretrain_tokenizer=start, path_datasets=start, max_steps=1,
            add_words=str(tmp_path / "words.txt"), learning_rate=1e-9,
        )
    )  # fmt: skip
    saved = AutoTokenizer.from_pretrained(folder / "final").get_vocab()
    assert saved.keys() - set(vocabulary) == {"insulin", "inscom"} and len(saved) == len(vocabulary) + 2
    old, new = (
        BertForMaskedLM.from_pretrained(path).get_input_embeddings().weight for path in (tmp_path, folder / "final")
    )
    for index in range(len(vocabulary)):
        torch.testing.assert_close(new[index], old[index], atol=1e-6, rtol=0)
    for word, subwords in (("insulin", ("ins", "##ulin")), ("inscom", ("ins", "##com"))):
        mean = old[[saved[subword] for subword in subwords]].mean(0)
        torch.testing.assert_close(new[saved[word]], mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("setting", ["add_words", "user_words"])
def test_missing_or_undecodable_files_of_words_are_refused(tmp_path, setting):
    with pytest.raises(UserError, match=f"{setting}: there is no file"):
        read_words(str(tmp_path / "none.txt"), setting)
    (tmp_path / "gbk.txt").write_bytes("二甲双胍\n高血压\n".encode("gbk"))
    with pytest.raises(UserError, match=f"{setting}: .*gbk.txt, line 1 is not UTF-8"):
        read_words(str(tmp_path / "gbk.txt"), setting)


def test_a_run_adds_the_words_most_often_split_and_saves_them(tmp_path, settings, capsys):
    tokenizer = learn_tokenizer(lambda: iter(make_lines(400)), 300)
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    save_model(tmp_path / "start", BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape)), tokenizer)
    for split in ("train", "test"):
        lines = [f"{line} 服用二甲双胍 gdtfh gtm" if i % 2 else f"gtm {line}" for i, line in enumerate(make_lines(120))]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "user.txt").write_text("二甲双胍 20 nz\n", encoding="utf-8")
    start = str(tmp_path / "start")
    names = {"initial_pretrain_model": start, "initial_pretrain_tokenizer": start, "path_datasets": str(tmp_path)}
    folder = run(settings(**names, add_words="auto:3", user_words=str(tmp_path / "user.txt"), num_epochs=1))
    assert "added to the vocabulary\n   gtm, gdtfh, 二甲双胍\n" in capsys.readouterr().out  # by count, then by name
    saved = AutoTokenizer.from_pretrained(folder / "final")
    ids = saved("GTM 服用二甲双胍 gdtfh", add_special_tokens=False)["input_ids"]
    known = len(tokenizer)
    assert [index - known for index in ids if index >= known] == [0, 2, 1]
    [first, *_] = metrics(folder)
    assert math.isfinite(float(first["eval_loss"])) and first["step"] == "0"
    [guess] = pipeline("fill-mask", str(folder / "final"), top_k=1)("服用[MASK]。")
    assert 0 <= guess["token"] < known + 3


def test_special_tokens_that_the_user_added_are_words_and_berts_own_are_text(tmp_path, tokenizer):
    """As entity markers such as [E1]: of these the rows are to be trained."""
    tokenizer.save_pretrained(tmp_path)
    marked = AutoTokenizer.from_pretrained(tmp_path)
    marked.add_special_tokens({"additional_special_tokens": ["[DRUG]", "<e1>"]})
    marked.save_pretrained(tmp_path / "marked")
    marked = AutoTokenizer.from_pretrained(tmp_path / "marked")
    line = "given [DRUG] metformin[DRUG] to <e1>[MASK] [SEP] 患者[DRUG]服用"
    words, ids = tokenized([line], marked)
    assert ids.tolist().count(marked.convert_tokens_to_ids("[DRUG]")) == 3
    assert ids.tolist().count(marked.convert_tokens_to_ids("<e1>")) == 1
    assert not {*ids.tolist()} & {marked.mask_token_id, marked.sep_token_id}
    assert [word for word in words[0] if "[DRUG]" in word] == [["[DRUG]"]] * 3


def test_without_added_tokens_text_is_tokenized_as_ever(tokenizer, mixed_lines):
    expected = tokenizer(mixed_lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenized(mixed_lines, tokenizer)[1].tolist() == list(chain.from_iterable(expected))
