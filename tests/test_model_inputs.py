"""What a model takes: the length of texts, and the token they are filled up with."""
import pytest

from lowfat.data import MAX_LENGTH
from lowfat.errors import ArgumentError
from lowfat.model_inputs import fitting


def test_the_default_length_is_shortened_to_the_model_and_any_other_is_refused(tiny_bert, tiny_gpt2):
    assert fitting(None, tiny_bert) == fitting(None, tiny_gpt2) == 40 and fitting(39, tiny_bert) == 39
    for longer in (41, MAX_LENGTH):  # said by the user, even when it is the default
        with pytest.raises(ArgumentError, match=f"max_length is {longer}; GPT2LMHeadModel takes 40 tokens"):
            fitting(longer, tiny_gpt2)
    tiny_bert.config.max_position_embeddings = -1  # XLNet's way of saying any number
    assert fitting(500, tiny_bert) == 500
