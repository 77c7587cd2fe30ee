"""Rows and batches: what is read, what is refused and how it is said."""
import json
import pickle

import pytest
import torch

from lowfat.data import IGNORED, batches, examples, label_ids, padded, read_rows, task_for, task_of
from lowfat.errors import ArgumentError, FormatError
from tiny_text import bare_tokenizer, rows, tokenizer


def written(tmp_path, text, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_and_text_files(tmp_path):
    pair = {"text_a": "ä", "text_b": "b", "label": "yes", "id": 7}
    path = written(tmp_path, json.dumps({"text": "a"}) + "\n\n" + json.dumps(pair, ensure_ascii=False) + "\n")
    assert read_rows(path) == [{"text": "a"}, pair]  # other keys stay, empty lines do not count
    assert read_rows(written(tmp_path, "one\n\n two \n", "t.txt")) == [{"text": "one"}, {"text": "two"}]


def test_what_is_wrong_with_a_row_of_a_file_names_its_line(tmp_path):
    """Whichever rows were taken, and in another process too."""
    path = written(tmp_path, '{"text": "the cat", "label": 0}\n\n{"text": "a dog"}\n{"text_a": "a"' + ', "text_b": " "}\n')
    found = pickle.loads(pickle.dumps(read_rows(path)))
    for taken, task, message in ((found[1:2], "classification", r'rows.jsonl:3 has no "label"'),
                                 (found[2:], "embedding", r"rows.jsonl:4: text_b has no tokens")):
        with pytest.raises(ArgumentError, match=message):
            examples(taken, bare_tokenizer(), task)
    found[1]["label"] = 7
    with pytest.raises(ArgumentError, match="rows.jsonl:3 has label 7; the model knows 0 to 1"):
        label_ids(found[:2], {"a": 0, "b": 1})


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"text": 3}', '{"text_a": "a"}', '{"label": 1}',
                                  '{"text": "a", "label": 1.5}', '{"text": "a", "label": true}',
                                  '{"text": "a", "label": [1]}'])
def test_a_bad_line_is_named(tmp_path, line):
    path = written(tmp_path, '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(FormatError, match=r"rows\.jsonl:2: .*(needs|not JSON)"):
        read_rows(path)


@pytest.mark.parametrize("name, text, message", [("none.jsonl", None, "no such file"), ("rows.csv", "a", "needs .jsonl"),
                                                 ("rows.jsonl", "\n", "no rows")])
def test_a_bad_file_is_named(tmp_path, name, text, message):
    path = tmp_path / name if text is None else written(tmp_path, text, name)
    with pytest.raises(ArgumentError, match=f"{name}.*{message}"):
        read_rows(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(FormatError, match="not UTF-8"):
        read_rows(tmp_path / "t.txt")


def test_task_from_class_and_from_config(tiny_bert, tiny_llama, tiny_gpt2):
    assert [task_of(model) for model in (tiny_bert, tiny_llama, tiny_gpt2, tiny_bert.bert)] == ["classification", "lm", "lm",
                                                                                                 "embedding"]
    tiny_bert.config.architectures = ["BertForSequenceClassification"]
    assert task_of(tiny_bert.config) == "classification"
    tiny_bert.config.architectures = None
    assert task_of(tiny_bert.config) == "embedding"


def test_a_task_without_output_is_refused(tiny_bert, tiny_llama):
    assert task_for(tiny_llama, None) == "lm" and task_for(tiny_llama, "embedding") == "embedding"
    with pytest.raises(ArgumentError, match="LlamaForCausalLM is a model for lm"):
        task_for(tiny_llama, "classification")
    with pytest.raises(ArgumentError, match="BertModel is a model for embedding"):
        task_for(tiny_bert.bert, "classification")


def test_labels_as_numbers_and_names():
    def labelled(*labels):
        return [{"text": "a", "label": label} for label in labels]

    unnamed = {"LABEL_0": 0, "LABEL_1": 1}
    assert label_ids(labelled(1, 0), unnamed) == ([1, 0], unnamed)
    assert label_ids(labelled("b", "a", "b")) == ([1, 0, 1], {"a": 0, "b": 1})  # sorted, not in order of appearance
    assert label_ids(labelled("b", "a"), unnamed)[0] == [1, 0]
    assert label_ids(labelled("b", "b"), {"b": 0, "a": 1})[0] == [0, 0]  # the model's names win over the alphabet
    for bad, message in ((labelled(0, None), "row 2 has no"), (labelled(0, 2), "row 2 has label 2; the model knows 0 to 1"),
                         (labelled(0, -1), "row 2"), (labelled(0, "a"), "one kind"), (labelled("a", "b", "c"), "3 names")):
        with pytest.raises(ArgumentError, match=message):
            label_ids(bad, unnamed)
    with pytest.raises(ArgumentError, match="c"):
        label_ids(labelled("a", "c"), {"a": 0, "b": 1})


def test_batches_of_a_classification_are_padded_on_the_right_and_masked():
    tok = tokenizer()
    data = [{"text": "the cat", "label": 0}, {"text": "a big old dog near the river", "label": 1}, {"text": "a", "label": 1}]
    first, second = batches(data, tok, "classification", batch_size=2, max_length=6)
    assert first["input_ids"].shape == (2, 6) and second["input_ids"].shape == (1, 3)
    assert first["input_ids"][0].tolist() == tok("the cat")["input_ids"] + [0, 0]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert torch.cat([first["labels"], second["labels"]]).tolist() == [0, 1, 1]
    assert "labels" not in batches(data, tok, "classification", labels=False)[0]


def test_pairs_become_one_example_or_two_texts():
    tok, data = tokenizer(), [{"text_a": "the cat", "text_b": "a dog", "label": 1}]
    assert examples(data, tok, "classification")[0]["input_ids"] == tok("the cat", "a dog")["input_ids"]
    found = [example["input_ids"] for example in examples(data, tok, "embedding")]
    assert found == [tok(text)["input_ids"] for text in ("the cat", "a dog")]


def test_lm_sees_every_token_once_in_order():
    tok, data = tokenizer(), rows(9)
    whole = [token for row in data for token in [*tok(row["text"], add_special_tokens=False)["input_ids"], tok.eos_token_id]]
    found = examples(data, tok, "lm", max_length=7)
    assert [token for piece in found for token in piece["input_ids"]] == whole
    assert all(len(piece["input_ids"]) == 7 for piece in found[:-1])
    last = padded(found[-2:], tok)
    assert len(whole) % 7 and last["labels"][1].tolist() == found[-1]["input_ids"] + [IGNORED] * (7 - len(whole) % 7)
    assert torch.equal(last["labels"][0], last["input_ids"][0])  # not shifted: the models shift by themselves


@pytest.mark.parametrize("change, message", [({"task": "poetry"}, "task is 'poetry'"), ({"rows": []}, "no rows"),
                                             ({"max_length": 1}, "max_length is 1"), ({"batch_size": 0}, "batch_size is 0")])
def test_bad_arguments_are_named(change, message):
    options = {"rows": rows(2), "task": "classification", "batch_size": 2, "max_length": 8} | change
    with pytest.raises(ArgumentError, match=message):
        batches(options.pop("rows"), tokenizer(), options.pop("task"), **options)


def test_rows_of_two_kinds_and_lm_pairs_are_refused():
    mixed = [{"text": "a", "label": 0}, {"text_a": "a", "text_b": "b", "label": 0}]
    with pytest.raises(ArgumentError, match="one kind"):
        examples(mixed, tokenizer(), "classification")
    with pytest.raises(ArgumentError, match='"text"'):
        examples(mixed[1:], tokenizer(), "lm")


def test_texts_without_tokens_are_named():
    tok, bare = tokenizer(), bare_tokenizer()
    pairs = [{"text_a": "cat", "text_b": "dog"}, {"text_a": "cat", "text_b": ""}]
    with pytest.raises(ArgumentError, match="row 2: text_b has no tokens"):
        examples(pairs, bare, "embedding")
    with pytest.raises(ArgumentError, match="row 1 has no tokens"):
        examples([{"text": " ", "label": 0}], bare, "classification")
    bare.eos_token = tok.eos_token = None
    with pytest.raises(ArgumentError, match="neither a pad nor an end token.*set tokenizer.pad_token"):
        examples(rows(2), bare, "classification")
    with pytest.raises(ArgumentError, match="the texts have no tokens"):
        examples([{"text": ""}], tok, "lm")
