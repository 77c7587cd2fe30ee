"""What a model takes: the length of texts, and the token they are filled up with."""
import pytest

from lowfat.data import MAX_LENGTH
from lowfat.errors import ArgumentError
from lowfat.model_inputs import fitting, padding
from tiny_text import bare_tokenizer, last_token_classifier


def test_the_default_length_is_shortened_to_the_model_and_any_other_is_refused(tiny_bert, tiny_gpt2):
    assert fitting(None, tiny_bert) == fitting(None, tiny_gpt2) == 40 and fitting(39, tiny_bert) == 39
    for longer in (41, MAX_LENGTH):  # said by the user, even when it is the default
        with pytest.raises(ArgumentError, match=f"max_length is {longer}; GPT2LMHeadModel takes 40 tokens"):
            fitting(longer, tiny_gpt2)
    tiny_bert.config.max_position_embeddings = -1  # XLNet's way of saying any number
    assert fitting(500, tiny_bert) == 500


def test_a_tokenizer_that_cannot_pad_is_refused_before_anything_is_said_or_changed(caplog):
    model, bare = last_token_classifier(), bare_tokenizer()
    bare.eos_token = None
    with pytest.raises(ArgumentError, match="neither a pad nor an end token"), padding(bare, "classification", model):
        pass
    assert "no pad token" not in caplog.text and model.config.pad_token_id is None
