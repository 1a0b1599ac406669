"""A byte-level BPE of 2,000 tokens, learned from the fixture, with any pre-tokenizer."""

import json
import re
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

TEXT = (Path(__file__).parent / "fixtures/multilingual.txt").read_bytes().decode("utf-8")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BYTE_LEVEL["use_regex"] = True
FLAGS = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)


@cache
def learned():
    """Learned without a pattern: its tokens cross every border that a pattern draws."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(re.split("(?<=\n)", TEXT), trainer)
    return learner.to_str()


def tokenizer_json(cut=BYTE_LEVEL, special=(), plain=(), normalizer=None):
    """tokenizer.json's content, with these added tokens behind the vocabulary."""
    names = [(name, True) for name in special] + [(name, False) for name in plain]
    added = [
        {"id": 2000 + i, "content": name, "special": is_special, **FLAGS}
        for i, (name, is_special) in enumerate(names)
    ]
    parts = {"pre_tokenizer": cut, "decoder": BYTE_LEVEL, "normalizer": normalizer}
    return {**json.loads(learned()), **parts, "added_tokens": added}
