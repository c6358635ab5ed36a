"""The tokenizer of tiny pairs, for tests without networks, too."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

VOCAB = 300
END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CORPUS = "the theme of a thing, naïve café señor, 50 € 😀😎🤖 日本語 and then another; "


def byte_tokenizer(corpus: str = CORPUS) -> Tokenizer:
    """Train bytes and their commonest merges, some of which end inside a character."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END, USER, ASSISTANT],
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus * 3], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer
