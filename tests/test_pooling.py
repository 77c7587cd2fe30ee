"""sentence-transformers' files beside a model: what they say is done, or refused, and stays with the smaller model."""
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from transformers import AutoModel

import lowfat
from lowfat.errors import ArgumentError, FormatError, UnsupportedError
from lowfat.evaluate import embed, evaluate, pooled
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
    texts = [pair["text_a"] for pair in PAIRS]
    batch = tok(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
        by_cls, by_mean = (pooled(model, batch, pooling) for pooling in ("cls", "mean"))
    assert torch.equal(by_cls, states[:, 0])
    for row, mask, mean in zip(states.double(), batch.attention_mask, by_mean):
        counted = row[mask == 1]
        # t - 1 sums and a division, each rounded to 2**-24 of what is at most the sum of magnitudes; adding a 0 is exact
        assert ((mean - counted.mean(0)).abs() <= len(counted) * 2**-24 * (1 + 2**-20) * counted.abs().mean(0)).all()
    wanted, other = (by_cls, by_mean) if first else (by_mean, by_cls)
    found = embed(model, tok, texts)
    assert ((found - wanted).norm(dim=1) < (found - other).norm(dim=1)).all()
    assert evaluate(model, PAIRS, tok)["pooling"] == ("cls" if first else "mean")


@pytest.mark.parametrize("config, kinds, error, message", [
    ({"pooling_mode": "lasttoken"}, KINDS, UnsupportedError, "1_Pooling/config.json: pooling by lasttoken is not supported"),
    (switches("cls_token", "mean_tokens"), KINDS, UnsupportedError, "pooling by cls and mean is not"),
    (switches("mean_tokens"), (*KINDS[:2], "Dense"), UnsupportedError, "modules.json: Dense after the pooling"),
    (switches(), KINDS, FormatError, "1_Pooling/config.json: names no pooling mode"),
    ([], KINDS, FormatError, "1_Pooling/config.json: needs an object"),
    (switches("mean_tokens"), ("Transformer", "../Pooling"), FormatError, "not a plain file name"),
])
def test_what_cannot_be_done_is_named(folder, config, kinds, error, message):
    model, tok = open_model(pool(folder, config, [kind for kind in kinds if "/" not in kind]))
    if "../Pooling" in kinds:
        (folder / "modules.json").write_text('[{"type": "Pooling", "path": "../dense/1_Pooling"}]')
    with pytest.raises(error, match=message):
        evaluate(model, PAIRS, tok)


def test_a_listed_pooling_without_its_file_is_an_error(folder):
    # kills mean pooling where another one was named and got lost
    pool(folder, switches("cls_token"))
    (folder / "1_Pooling").rename(folder / "other")
    model, tok = open_model(folder)
    with pytest.raises(FormatError, match="1_Pooling/config.json: missing, and modules.json lists it"):
        evaluate(model, PAIRS, tok)
    entries = json.loads((folder / "modules.json").read_text())
    entries[1]["path"] = "other"
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "other" / "config.json").write_text(json.dumps(switches()))
    with pytest.raises(FormatError, match="other/config.json: names no pooling mode"):  # the file that was read
        evaluate(model, PAIRS, tok)


@pytest.mark.parametrize("name, content, said", [
    ("config_sentence_transformers.json", {"prompts": {"query": "query: "}, "default_prompt_name": "query"}, "is 'query'"),
    ("config_sentence_transformers.json", {"prompts": {"query": "query: "}, "default_prompt_name": None}, None),
    ("config_sentence_transformers.json", {"prompts": {"plain": ""}, "default_prompt_name": "plain"}, None),
    ("sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": True}, "do_lower_case is set"),
    ("sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": False}, None)])
def test_what_is_carried_and_not_done_is_said_once(folder, caplog, name, content, said):
    model, tok = open_model(pool(folder, switches("mean_tokens")))
    (folder / name).write_text(json.dumps(content))
    evaluate(model, PAIRS, tok)
    assert [said in line for line in ours(caplog)] == ([True] if said else [])


def ours(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "lowfat"]


def test_a_relative_folder_is_found_from_anywhere(folder, tmp_path, monkeypatch, caplog):
    pool(folder, switches("cls_token"))
    factorize_folder(folder, tmp_path / "small", method="svd", ratio=0.5)
    monkeypatch.chdir(tmp_path)
    models = [open_model("dense"), open_model("small")]
    lost = AutoModel.from_pretrained("dense")  # remembers the name alone
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [evaluate(model, PAIRS, tok)["pooling"] for model, tok in models] == ["cls", "cls"]
    assert not ours(caplog)
    assert evaluate(lost, PAIRS, models[0][1])["pooling"] == "mean"
    (line,) = ours(caplog)
    assert "pooled by mean" in line and "dense: neither a folder from here, nor in the cache" in line


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def from_hub(folder, tmp_path, monkeypatch):
    """(the hub's files, its copy on this disk as transformers leaves it, a function that opens it there)."""
    copy = tmp_path / "cache" / "models--me--enc" / "snapshots" / COMMIT
    shutil.copytree(folder, copy)
    (copy.parents[1] / "refs").mkdir()
    (copy.parents[1] / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # not asked, unless a test says so
    pool(folder, switches("cls_token"))
    return folder, copy, lambda: AutoModel.from_pretrained("me/enc", local_files_only=True)


def test_a_hub_name_is_pooled_by_the_files_in_the_cache(from_hub, tmp_path, caplog):
    hub, copy, opened = from_hub
    shutil.copytree(hub, copy, dirs_exist_ok=True)
    model = opened()
    assert evaluate(model, PAIRS, tokenizer())["pooling"] == "cls"
    lowfat.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file() and not ours(caplog)


def test_files_that_transformers_left_on_the_hub_are_fetched(from_hub, tmp_path, monkeypatch, caplog):
    hub, copy, opened = from_hub
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        found = huggingface_hub.utils.filter_repo_objects(
            [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()],
            allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for file in list(found):
            (copy / file).parent.mkdir(exist_ok=True)
            shutil.copy(hub / file, copy / file)
        return str(copy)

    def hf_hub_download(name, file, *, revision):
        asked.append((name, revision))
        return shutil.copy(hub / file, copy / file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    (hub / "0_Transformer").mkdir()
    (hub / "0_Transformer" / "model.safetensors").write_text("large")
    model = opened()
    assert evaluate(model, PAIRS, tokenizer())["pooling"] == "cls"
    assert asked == [("me/enc", COMMIT)] * 2 and not (copy / "0_Transformer").exists()
    lowfat.save(model, tmp_path / "out")
    assert len(asked) == 2 and not ours(caplog)  # once
    assert {"modules.json", "sentence_bert_config.json", "1_Pooling"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_files_that_cannot_be_had_are_never_passed_over(from_hub, tmp_path, monkeypatch, caplog):
    _, copy, opened = from_hub

    def unreachable(*_, **__):
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(copy))  # what it does without a network
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    model = opened()
    assert evaluate(model, PAIRS, tokenizer())["pooling"] == "mean"
    lowfat.save(model, tmp_path / "out")
    assert [("texts are pooled by mean" in line, "they are not copied" in line, "HF_HUB_OFFLINE is set" in line)
            for line in ours(caplog)] == [(True, False, True), (False, True, True)]


def test_a_hub_model_without_such_files_is_pooled_by_mean(from_hub, monkeypatch, caplog):
    def missing(*_, **__):
        raise errors.RemoteEntryNotFoundError("404", response=SimpleNamespace(headers={}, status_code=404, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    assert evaluate(from_hub[2](), PAIRS, tokenizer())["pooling"] == "mean" and not ours(caplog)


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


def test_training_does_not_go_on_under_another_pooling(folder, tmp_path):
    def train(stop):
        (model, tok), (teacher, _) = open_model(folder), open_model(folder)
        lowfat.finetune(model, PAIRS, tokenizer=tok, teacher=teacher, steps=2, save_every=1, out=tmp_path / "out",
                        on_progress=stop)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stop)
    pool(folder, switches("cls_token"))
    with pytest.raises(ArgumentError, match='pooling was "mean", is now "cls"'):
        train(None)


def test_an_empty_text_of_a_pair_is_named(tiny_bert):
    with pytest.raises(ArgumentError, match="row 2: text_b has no tokens"):
        evaluate(tiny_bert.bert, [*PAIRS[:1], {"text_a": "a tree", "text_b": ""}], bare_tokenizer())
    with pytest.raises(ArgumentError, match='row 1 has no "text_a"'):
        evaluate(tiny_bert.bert, [{"text": "a", "text_b": "b"}], tokenizer())
