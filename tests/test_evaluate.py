"""Measures against the same numbers worked out the slow way."""
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, log_softmax

from lowfat.errors import ArgumentError
from lowfat.evaluate import embed, evaluate, retrieval
from tiny_text import bare_tokenizer, classifier, last_token_classifier, rows, tokenizer


def test_accuracy_counts_right_answers_one_by_one():
    model, tok, data = classifier(), tokenizer(), rows(11)
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # both answers occur
        model.eval()
        right = sum(model(**tok(row["text"], return_tensors="pt")).logits.argmax().item() == row["label"] for row in data)
    model.train()
    found = evaluate(model, data, tok, batch_size=4)
    assert found == {"task": "classification", "rows": 11, "accuracy": right / 11, "correct": right}
    assert model.training and 0 < right < 11  # the mode is put back; dropout was off while measuring


@pytest.mark.parametrize("pad", [None, 4])
def test_a_classifier_at_the_last_token_without_a_pad_token(pad, caplog):
    # 4 is "the", with which no text ends: kills padding with one token while the model looks for another
    model, tok = last_token_classifier(), bare_tokenizer()
    with torch.no_grad():
        alone = [model(**tok(row["text"], return_tensors="pt")).logits.argmax().item() for row in rows(40)]
    model.config.pad_token_id = pad
    data = [{"text": row["text"], "label": label} for row, label in zip(rows(40), alone)]
    assert evaluate(model, data, tok, batch_size=16)["correct"] == 40 and set(alone) == {0, 1}
    assert model.config.pad_token_id == pad  # known while it ran
    assert "no pad token: texts are padded with its end token '[SEP]'" in caplog.text


def test_perplexity_is_the_mean_over_predicted_tokens(tiny_llama):
    tok, data = tokenizer(), rows(6)
    ids = [token for row in data for token in [*tok(row["text"], add_special_tokens=False)["input_ids"], tok.eos_token_id]]
    nats = []
    for start in range(0, len(ids), 8):
        piece = torch.tensor([ids[start:start + 8]])
        with torch.no_grad():
            losses = -log_softmax(tiny_llama(piece).logits[0, :-1].double(), -1)
        nats += [losses[place, token].item() for place, token in enumerate(piece[0, 1:])]
    found = evaluate(tiny_llama, data, tok, batch_size=3, max_length=8)
    assert found["tokens"] == len(nats)
    # padding of the last piece and batching only reorder sums: fp32 roundoff times the length of a dot product, generously
    assert abs(found["nats_per_token"] - sum(nats) / len(nats)) < 2**-24 * 1000
    assert found["perplexity"] == math.exp(found["nats_per_token"])
    assert found == evaluate(tiny_llama, data, tok, batch_size=3, max_length=8)


def test_a_single_token_has_no_perplexity(tiny_llama):
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(ArgumentError, match="fewer than two tokens"):
        evaluate(tiny_llama, [{"text": "cat"}], tok)


def test_embeddings_ignore_padding_and_order(tiny_bert):
    tok, texts = tokenizer(), [row["text"] for row in rows(9)]
    found = embed(tiny_bert, tok, texts, batch_size=4)
    for text, row in zip(texts, found):
        with torch.no_grad():
            alone = tiny_bert.bert(**tok(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert cosine_similarity(alone, row, dim=0) > 1 - 2**-18  # fp32 roundoff of a few dozen sums
    assert torch.equal(found, embed(tiny_bert, tok, texts, batch_size=4))


def test_texts_are_cut_to_what_the_model_takes():
    from transformers import RobertaConfig, RobertaModel
    model, tok = RobertaModel(RobertaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=42, pad_token_id=1)).eval(), tokenizer()
    long = ["the cat " * 50, "a dog"]
    # rows 0 and 1 of the position table are for padding: 41 tokens would already end in an index error
    assert torch.equal(embed(model, tok, long), embed(model, tok, long, max_length=40))
    with pytest.raises(ArgumentError, match="max_length is 41; RobertaModel takes 40 tokens"):
        embed(model, tok, ["a dog"], max_length=41)


def test_retrieval_ranks():
    queries, answers = torch.eye(3), torch.tensor([[1., 0, 0], [0, 0.1, 1], [0, 0.2, 0.9]])
    # query 0 finds its answer first; 1 prefers answer 2 (0.217 over 0.0995); 2 prefers answer 1: ranks 1, 2, 2
    assert retrieval(queries, answers) == {"recall_at_1": torch.tensor([1., 0, 0]).double().mean().item(),
                                           "mrr": torch.tensor([1., 0.5, 0.5]).double().mean().item()}
    same = retrieval(torch.ones(4, 2), torch.ones(4, 2))
    assert same == {"recall_at_1": 0.0, "mrr": 0.25}  # a model that says one thing for all texts must not win by ties
    assert retrieval(torch.full((4, 2), float("nan")), torch.ones(4, 2)) == {"recall_at_1": 0.0, "mrr": 0.25}


def test_embedding_task_needs_pairs(tiny_bert):
    pairs = [{"text_a": "the red cat", "text_b": "sees a bird"}, {"text_a": "a tree", "text_b": "near the river"}]
    found = evaluate(tiny_bert.bert, pairs, tokenizer())
    assert found["task"] == "embedding" and found["rows"] == 2 and 0 <= found["recall_at_1"] <= 1
    assert found["pooling"] == "mean"
    with pytest.raises(ArgumentError, match='row 2 has no "text_b"'):
        evaluate(tiny_bert.bert, [pairs[0], {"text": "a"}], tokenizer())
    with pytest.raises(ArgumentError, match="task is 'poetry'"):
        evaluate(tiny_bert, pairs, tokenizer(), task="poetry")
