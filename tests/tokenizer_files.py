"""Tokenizer folders for tests, beside the reference library's tokenizer of the same files."""

import json
import re
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from hub.tokenizer import byte_of_character

FIXTURES = Path(__file__).parent / "fixtures"
TEXT = (FIXTURES / "multilingual.txt").read_bytes().decode("utf-8")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = {c: i for i, c in enumerate(byte_of_character())}  # the smallest vocabulary there is

# SmolLM2 has no token for these bytes: six control characters and what only unassigned characters
# or no character at all would need.
SMOLLM2_MISSING = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)]


@cache
def reference(model_type):
    """The reference library's tokenizer, with a small vocabulary learned from the fixture.

    Special tokens stand behind it, as in Qwen's. It is learned without the pattern, so that its
    tokens cross every border that the pattern draws: a border too few or too many shows.
    """
    learner = tokenizers.Tokenizer(BPE())
    learner.normalizer = NFC()
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=2500, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    learner.train_from_iterator(re.split("(?<=\n)", TEXT), trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    if model_type == "llama":
        return _smollm2(learned["vocab"], merges)
    kind = GPT2Tokenizer if model_type == "gpt2" else Qwen2Tokenizer
    return kind(vocab=learned["vocab"], merges=merges, extra_special_tokens=SPECIAL[1:])


def _smollm2(vocab, merges):
    """A tokenizer of SmolLM2's kind: digits apart, no normaliser, some bytes without a token."""
    character_of = {b: c for c, b in byte_of_character().items()}
    missing = {character_of[b] for b in SMOLLM2_MISSING}
    kept = [token for token in vocab if not missing & set(token)]
    merges = [pair for pair in merges if "".join(pair) in set(kept)]
    model = BPE({token: i for i, token in enumerate(kept)}, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=SPECIAL[0], eos_token=SPECIAL[2]
    )


def files_of(tokenizer, source):
    """The files that hold a reference tokenizer: tokenizer.json, vocab.json, or both."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {t["content"]: t["id"] for t in whole["added_tokens"]}
    vocab = whole["model"]["vocab"]
    return {
        "tokenizer.json": {"tokenizer.json": whole},
        "vocab.json": {"vocab.json": vocab, "added_tokens.json": added},
        "both": {"vocab.json": vocab, "tokenizer.json": whole},
    }[source]


def write_folder(folder, files, model_type="qwen2"):
    """Write {file name: JSON value or text}, with a config.json unless `files` has one."""
    folder.mkdir(exist_ok=True)
    for name, content in {"config.json": {"model_type": model_type}, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def ids_of(tokenizer, text):
    """The reference's ids of `text`, all of it taken as ordinary text."""
    return tokenizer(text, split_special_tokens=True)["input_ids"]
