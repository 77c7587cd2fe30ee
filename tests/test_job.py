"""From folder to folder: every kind of model goes through, and what cannot work leaves nothing behind."""
import json

import pytest
import torch

import lowfat
from lowfat.data import task_for
from lowfat.errors import ArgumentError, NumericsError
from lowfat.evaluate import embed, evaluate
from lowfat.job import factorize_folder, open_model
from lowfat.recovery import finetune
from lowfat.structures import LowRank, LowRankPivoted
from tiny_text import bare_tokenizer, classifier, last_token_classifier, rows, tokenizer


@pytest.fixture
def saved(tmp_path):
    def save(model):
        torch.manual_seed(0)
        model.save_pretrained(tmp_path / "dense")
        tokenizer().save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"
    return save


def run(folder, **changes):
    options = {"method": "whitened", "ratio": 0.5, "rows": rows(16), "max_length": 12} | changes
    return factorize_folder(folder, folder.parent / "out", **options)


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("method, policy", [("svd", "uniform_rank"), ("fwsvd", "per_matrix"), ("whitened", "allocated"),
                                            ("kfac", "per_matrix")])
def test_every_model_and_method(request, saved, fixture, method, policy):
    folder = saved(request.getfixturevalue(fixture))
    phases = []
    report = run(folder, method=method, policy=policy, on_progress=lambda phase, *step: phases.append(phase))
    model, tok = open_model(folder.parent / "out")
    assert report.ratio <= 0.5 and sorted(path.name for path in folder.parent.iterdir()) == ["dense", "out"]
    assert all(isinstance(model.get_submodule(layer.name), LowRank) == layer.kept for layer in report.layers)
    assert all(layer.output_error is not None for layer in report.layers if layer.kept)  # rows were given
    assert evaluate(model, rows(8), tok, max_length=12)["task"] == task_for(model, None)
    assert list(dict.fromkeys(phases)) == ["calibrate", "factorize"]
    manifest = json.loads((folder.parent / "out" / "manifest.json").read_text())
    assert manifest["facts"]["job"]["options"]["method"] == method  # what made it is written in it


def test_pivoted_layers_are_written_and_opened(saved):
    folder = saved(classifier())
    report = run(folder, arguments={"form": "pivoted"})
    model, _ = open_model(folder.parent / "out")
    made = [layer for layer in report.layers if layer.kept]
    assert report.ratio <= 0.5 and made and all(layer.index_bytes == 8 * layer.rank for layer in made)
    assert all(isinstance(model.get_submodule(layer.name), LowRankPivoted) for layer in made)


@pytest.mark.parametrize("method", ["whitened", "fwsvd"])
def test_a_classifier_without_a_pad_token(tmp_path, method):
    last_token_classifier().save_pretrained(tmp_path / "dense")
    bare_tokenizer().save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", method=method)
    model, tok = open_model(tmp_path / "out")
    assert model.config.pad_token_id is None and tok.pad_token is None
    finetune(model, rows(8), tokenizer=tok, teacher=open_model(tmp_path / "dense")[0], steps=1, batch_size=4, max_length=12)
    assert model.config.pad_token_id is None


def test_svd_needs_no_text(saved):
    report = run(saved(classifier()), method="svd", rows=None, max_length=99)  # of no text at all
    assert report.ratio <= 0.5 and all(layer.output_error is None for layer in report.layers)


def test_a_length_is_the_same_job_whether_said_or_not(saved):
    folder, jobs = saved(classifier()), []
    for max_length in (None, 40):  # what the model takes
        run(folder, max_length=max_length, overwrite=True)
        jobs.append(json.loads((folder.parent / "out" / "manifest.json").read_text())["facts"]["job"])
    assert jobs[0] == jobs[1] and jobs[0]["options"]["max_length"] == 40


def test_the_job_gives_the_bits_of_the_calls_it_is_made_of(saved):
    from lowfat.data import batches
    folder = saved(classifier())
    run(folder)
    model, tok = open_model(folder)
    data = batches(rows(16), tok, "classification", batch_size=8, max_length=12, labels=False)
    stats = lowfat.calibrate(model, data, fisher=False, out=folder.parent / "stats")
    lowfat.factorize(model, lowfat.plan(model, method="whitened", ratio=0.5, stats=stats), stats)
    made, _ = open_model(folder.parent / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), made.state_dict().values(), strict=True))


def without_labels(count):
    return [{"text": row["text"]} for row in rows(count)]


@pytest.mark.parametrize("change, message", [
    ({"ratio": 1.0}, "ratio"), ({"ratio": -1}, "ratio"), ({"ratio": float("nan")}, "ratio"), ({"method": "magic"}, "method"),
    ({"policy": "best"}, "policy must be one of"), ({"layers": ["nothing.*"]}, "nothing"), ({"rows": []}, "no rows"),
    ({"rows": None}, "needs texts to calibrate on"), ({"method": "fwsvd", "rows": without_labels(4)}, 'no "label"'),
    ({"method": "fwsvd", "task": "embedding"}, "needs a task with a loss"), ({"task": "lm"}, "has no weights"),
    ({"arguments": {"solver": "magic"}}, "solver"), ({"max_length": 1}, "max_length"), ({"batch_size": 0}, "batch_size"),
    ({"max_length": 41}, "max_length is 41; BertForSequenceClassification takes 40 tokens"),
])
def test_bad_options_leave_nothing(saved, change, message):
    folder = saved(classifier())
    with pytest.raises(ArgumentError, match=message):
        run(folder, **change)
    assert [path.name for path in folder.parent.iterdir()] == ["dense"]


def test_bad_folders_leave_nothing(saved, tmp_path):
    with pytest.raises(ArgumentError, match="no such folder"):
        run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match="no config.json"):
        run(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "unheard of"}')
    with pytest.raises(ArgumentError, match="cannot be opened"):
        run(tmp_path / "empty")
    folder = saved(classifier())
    (folder / "model.safetensors").rename(folder / "weights")
    with pytest.raises(ArgumentError, match="cannot be opened"):
        run(folder)
    (folder / "weights").rename(folder / "model.safetensors")
    for target, message in ((tmp_path / "missing" / "out", "does not exist"), (folder, "exists already")):
        with pytest.raises(ArgumentError, match=message):
            factorize_folder(folder, target, method="svd", ratio=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "empty"]


def test_bad_weights_leave_nothing(saved):
    model = classifier()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    folder = saved(model)
    with pytest.raises(NumericsError, match=r"layer\.1\.output\.dense: the weight holds NaN"):
        run(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["dense"]


def test_a_task_without_weights_is_refused(saved, tiny_bert):
    folder = saved(tiny_bert.bert)
    with pytest.raises(ArgumentError, match="has no weights for classifier.*task classification"):
        open_model(folder, task="classification")
    assert type(open_model(folder)[0]).__name__ == "BertModel"


@pytest.mark.parametrize("saved_as", ["BertForMaskedLM", "BertModel", "RobertaForMaskedLM"])
def test_an_encoder_opens_without_head_and_pooler(tmp_path, caplog, saved_as):
    import transformers
    size = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    body = getattr(transformers, saved_as.replace("ForMaskedLM", "Model"))
    body = body(body.config_class(**size), add_pooling_layer=False).eval()
    folder = tmp_path / "dense"
    body.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [saved_as]}
    (folder / "config.json").write_text(json.dumps(config))
    model, tok = open_model(folder)
    texts = [row["text"] for row in rows(3)]
    assert type(model) is type(body) and torch.equal(embed(model, tok, texts), embed(body, tok, texts))
    assert not model.pooler.dense.weight.any() and "pooler.dense.weight; set to zero" in caplog.text
    assert ("opened without that head" in caplog.text) == (saved_as != "BertModel")
    run(folder, task="embedding")  # and what comes out of it opens strictly
    assert type(lowfat.load(tmp_path / "out")) is type(body)
    with pytest.raises(ArgumentError, match="has no weights for .*classifier"):
        open_model(folder, task="classification")


def test_an_encoder_without_a_layer_is_refused(saved):
    from safetensors.torch import load_file, save_file
    folder = saved(classifier().bert)
    weights = load_file(folder / "model.safetensors")
    lost = "encoder.layer.1.output.dense.weight"
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArgumentError, match=f"has no weights for {lost}; BertModel needs them"):
        open_model(folder)


def test_a_classifier_opens_as_an_encoder(saved):
    folder = saved(classifier())
    run(folder)
    assert type(open_model(folder, task="embedding")[0]).__name__ == "BertModel"
    assert type(open_model(folder.parent / "out", task="embedding")[0]).__name__ == "BertModel"
    assert type(open_model(folder.parent / "out")[0]).__name__ == "BertForSequenceClassification"


def test_a_target_of_its_own_is_replaced_only_when_asked(saved):
    folder = saved(classifier())
    run(folder)
    with pytest.raises(ArgumentError, match="exists already"):
        run(folder)
    run(folder, ratio=0.4, overwrite=True)
    manifest = json.loads((folder.parent / "out" / "manifest.json").read_text())
    assert manifest["facts"]["job"]["options"]["ratio"] == 0.4


def test_a_folder_without_tokenizer_is_refused_where_text_is_read(tiny_bert, tmp_path):
    """transformers makes an empty one up: every word unknown, and a plausible number at the end."""
    tiny_bert.save_pretrained(tmp_path / "model")
    with pytest.raises(ArgumentError, match="has no tokenizer"):
        open_model(tmp_path / "model")
    assert open_model(tmp_path / "model", reads_text=False)[1] is None
