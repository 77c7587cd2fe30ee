"""A word tokenizer, sentences and models small enough to train in a test; nothing is downloaded."""

WORDS = ("the a cat dog bird fish car tree house river sees eats likes finds "
         "red blue big small old new and or near under").split()


def tokenizer():
    """One token a word; [CLS] and [SEP] around a text or a pair, as BERT has them, [SEP] doubling as the end of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", eos_token="[SEP]", model_input_names=["input_ids", "attention_mask"])


def bare_tokenizer():
    """The same words, nothing around them and no pad token, as GPT-2 has it."""
    from tokenizers import processors

    found = tokenizer()
    found.pad_token = None
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return found


def rows(count: int) -> list[dict]:
    """Sentences of different lengths, labelled by whether their first noun is an animal."""
    found = []
    for index in range(count):
        noun = WORDS[2 + index % 8]
        more = [WORDS[(7 * index + place) % 24] for place in range(index % 5)]
        found.append({"text": " ".join(["the", WORDS[14 + index % 6], noun, *more]), "label": int(index % 8 >= 4)})
    return found


def last_token_classifier():
    """A two-layer GPT-2 that classifies at the last token, and does not say which one pads."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=40,
                                                    num_labels=2)).eval()


def classifier():
    """A two-layer BERT classifier with dropout on, so that training depends on the random generators."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40, num_labels=2))
