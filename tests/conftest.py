"""Every test starts from the same seed, on one thread, and says why it was skipped."""
import pytest
import torch


def pytest_configure():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_bert():
    """A random two-layer BERT classifier, dropout off."""
    from transformers import BertConfig, BertForSequenceClassification
    return BertForSequenceClassification(BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40, num_labels=3)).eval()


@pytest.fixture
def tiny_llama():
    """A random two-layer Llama with grouped key/value heads, tied to nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=40, tie_word_embeddings=False)).eval()


@pytest.fixture
def tiny_gpt2():
    """A random two-layer GPT-2: Conv1D layers, which store their weights transposed, and a head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=40)).eval()
