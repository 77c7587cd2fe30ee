"""sentence-transformers' files beside a model: what they say is done, or refused, and stays with the smaller model."""
import json

import pytest
import torch
from transformers import AutoModel

import lowfat
from lowfat.errors import ArgumentError, FormatError, UnsupportedError
from lowfat.evaluate import embed, evaluate
from lowfat.job import factorize_folder, open_model
from tiny_text import bare_tokenizer, classifier, tokenizer

PAIRS = [{"text_a": "the red cat", "text_b": "sees a bird"}, {"text_a": "a tree", "text_b": "near the river"}]
KINDS = ("Transformer", "Pooling", "Normalize")


def switches(*on):
    return {"word_embedding_dimension": 32} | {f"pooling_mode_{name}": name in on for name in ("cls_token", "mean_tokens")}


@pytest.fixture
def folder(tmp_path):
    classifier().bert.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def pool(folder, config, kinds=KINDS):
    entries = [{"idx": number, "name": str(number), "path": f"{number}_{kind}" if number else "",
                "type": f"sentence_transformers.models.{kind}"} for number, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config, first", [(switches("mean_tokens"), False), (switches("cls_token"), True),
                                           ({"pooling_mode": "cls"}, True), (None, False)])
def test_pools_as_the_folder_says(folder, config, first):
    if config:
        pool(folder, config)
    model, tok = open_model(folder)
    batch = tok([pair["text_a"] for pair in PAIRS], return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    means = torch.stack([row[mask == 1].mean(0) for row, mask in zip(states, batch.attention_mask)])
    wanted = states[:, 0] if first else means
    found = embed(model, tok, [pair["text_a"] for pair in PAIRS])
    # two of a hundred-odd numbers of size one, apart by the order of a few dozen fp32 sums; cls and mean are apart by tenths
    assert (found - wanted).abs().max() < 2**-24 * 1000 < (states[:, 0] - means).abs().max()
    assert evaluate(model, PAIRS, tok)["pooling"] == ("cls" if first else "mean")


@pytest.mark.parametrize("config, kinds, error, message", [
    ({"pooling_mode": "lasttoken"}, KINDS, UnsupportedError, "1_Pooling/config.json: pooling by lasttoken is not supported"),
    (switches("cls_token", "mean_tokens"), KINDS, UnsupportedError, "pooling by cls and mean is not"),
    (switches("mean_tokens"), (*KINDS[:2], "Dense"), UnsupportedError, "modules.json: Dense after the pooling"),
    (switches(), KINDS, FormatError, "names no pooling mode"),
    (switches("mean_tokens"), ("Transformer", "../Pooling"), FormatError, "not a plain file name"),
])
def test_what_cannot_be_done_is_named(folder, config, kinds, error, message):
    model, tok = open_model(pool(folder, config, [kind for kind in kinds if "/" not in kind]))
    if "../Pooling" in kinds:
        (folder / "modules.json").write_text('[{"type": "Pooling", "path": "../dense/1_Pooling"}]')
    with pytest.raises(error, match=message):
        evaluate(model, PAIRS, tok)


def test_every_way_to_save_keeps_the_files(folder, tmp_path):
    pool(folder, switches("cls_token"))
    kept = {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    factorize_folder(folder, tmp_path / "out", method="svd", ratio=0.5)
    model, tok = open_model(tmp_path / "out")
    lowfat.export_dense(model, tmp_path / "export")
    model.save_pretrained(tmp_path / "again")
    lowfat.finetune(model, PAIRS, tokenizer=tok, teacher=open_model(folder)[0], steps=1, out=tmp_path / "trained")
    lowfat.finetune(open_model(folder)[0], PAIRS, tokenizer=tok, teacher=model, steps=1, out=tmp_path / "dense trained")
    for name in ("out", "export", "again", "trained", "dense trained"):
        assert all((tmp_path / name / file).read_bytes() == (folder / file).read_bytes() for file in kept), name
        assert evaluate(AutoModel.from_pretrained(tmp_path / name), PAIRS, tok)["pooling"] == "cls"


def test_a_teacher_pooled_in_another_way_is_refused(folder, tmp_path):
    teacher, tok = open_model(folder)
    teacher.save_pretrained(tmp_path / "cls")
    tok.save_pretrained(tmp_path / "cls")
    model, _ = open_model(pool(tmp_path / "cls", switches("cls_token")))
    with pytest.raises(ArgumentError, match="teacher is pooled by mean, the model by cls"):
        lowfat.finetune(model, PAIRS, tokenizer=tok, teacher=teacher, steps=1)


def test_an_empty_text_of_a_pair_is_named(tiny_bert):
    with pytest.raises(ArgumentError, match="row 2: text_b has no tokens"):
        evaluate(tiny_bert.bert, [*PAIRS[:1], {"text_a": "a tree", "text_b": ""}], bare_tokenizer())
    with pytest.raises(ArgumentError, match='row 1 has no "text_a"'):
        evaluate(tiny_bert.bert, [{"text": "a", "text_b": "b"}], tokenizer())
