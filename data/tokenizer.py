"""Any byte-level BPE's tokenizer.json, read as `tokenizers` reads it; tiktoken merges the bytes."""

import json
import unicodedata
from pathlib import Path

import regex
import tiktoken

from support.files import reading

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
NFC, NONE = {"type": "NFC"}, {"type": "Sequence", "normalizers": []}
FILES = ("tokenizer.json", "vocab.json", "merges.txt")
MARK = "\ufdd0\ufdef\ufdd0"  # no characters: stand in a special token's name that is ordinary text


def byte_alphabet():
    """GPT-2 writes each byte of a token as one printable character: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def any_name(tokens):
    """An expression for added tokens in a text, the longest first; the name is its group 1."""
    names = []
    for t in sorted(tokens, key=lambda t: -len(t["content"])):
        before, after = (r"\s*" if t.get(side) else "" for side in ("lstrip", "rstrip"))
        names.append(f"{before}({regex.escape(t['content'])}){after}")
    return regex.compile(f"(?|{'|'.join(names)})" if names else "(?!)")


def cutter(step):
    """The expression whose matches are the pieces into which a pre-tokenizer cuts a text."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            found = GPT2 if step.get("use_regex", True) else "(?s:.+)"
        case {"type": "Digits"}:
            found = r"\p{N}" if step["individual_digits"] else r"\p{N}+"
        case {"type": "Split", "pattern": p} if step["behavior"] == "Isolated" or step["invert"]:
            found = p.get("Regex") or regex.escape(p["String"])
        case _:
            raise ValueError(f"the pre-tokenizer {step} is not supported")
    return regex.compile(f"{found}|(?:(?!{found})(?s:.))+")  # and what stands between its matches


class Tokenizer:
    """Text to ids and back. `specials`: {name: id} of added tokens; `known_ids`: what decodes."""

    def __init__(self, whole, roles=()):
        """whole: what tokenizer.json says. roles: the names that are special whatever it says."""
        model, vocab, byte_of = whole["model"], whole["model"]["vocab"], byte_alphabet()
        if model.get("byte_fallback") or whole.get("normalizer") not in (None, NONE, NFC):
            raise ValueError("only a byte-level BPE, normalised by NFC or not at all, is supported")
        self.nfc = whole.get("normalizer") == NFC
        cuts, added = whole["pre_tokenizer"], whole["added_tokens"]
        self.cutters = [cutter(step) for step in cuts.get("pretokenizers", [cuts])]
        special = [t for t in added if t["special"] or t["content"] in roles]  # never text
        self.special, self.added = any_name(special), any_name(added)
        self.plain = any_name(t for t in added if t not in special)
        self.specials = {t["content"]: t["id"] for t in added}
        self.special_ids = {t["id"] for t in special}
        words = [word for word in vocab if word not in self.specials]
        self.bytes_of = {vocab[word]: bytes(byte_of[c] for c in word) for word in words}
        self.bytes_of |= {i: name.encode() for name, i in self.specials.items()}
        self.known_ids = sorted(self.bytes_of)
        # tiktoken merges what has the lowest rank: after the bytes, what the merges make, in order
        made = ["".join(pair).replace(" ", "") for pair in model["merges"]]  # or of the form "a b"
        ranked = dict.fromkeys([*byte_of, *made, *words])
        ranks = {bytes(byte_of[c] for c in word): rank for rank, word in enumerate(ranked)}
        self.bpe = tiktoken.Encoding("", pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={})
        self.id_of = [vocab.get(word) for word in ranked]
        self.missing = {b: None for c, b in byte_of.items() if b < 128 and c not in vocab}

    @classmethod
    def from_folder(cls, folder, roles=()):
        """A checkpoint's tokenizer, also from an older GPT-2's files; ValueError for any other."""
        path, vocab, merges = (Path(folder) / name for name in FILES)
        with reading(path, "a byte-level BPE"):
            if path.exists():
                return cls(json.loads(path.read_text("utf-8")), roles)
            if not merges.exists():
                raise ValueError("no such file (from the Hub: hf download NAME --local-dir FOLDER)")
            words, end = json.loads(vocab.read_text("utf-8")), "<|endoftext|>"
            model = {"vocab": words, "merges": merges.read_text("utf-8").splitlines()[1:]}
            added = [{"content": end, "id": words[end], "special": True}]
            cut = {"type": "ByteLevel", "add_prefix_space": False}
            return cls({"model": model, "added_tokens": added, "pre_tokenizer": cut}, roles)

    def encode(self, text, special=False):
        """The ids of `text`. special: whether a special token's name in it is that token."""
        ids = []
        for i, part in enumerate((self.added if special else self.plain).split(text)):
            if i % 2:  # a name
                ids.append(self.specials[part])
                continue
            part = part.replace(MARK, "")
            pieces = [unicodedata.normalize("NFC", part) if self.nfc else part]
            for cut in self.cutters:
                pieces = [match[0] for piece in pieces for match in cut.finditer(piece)]
            for piece in pieces:
                ranks = self.bpe.encode_ordinary(piece.translate(self.missing))
                ids += [self.id_of[rank] for rank in ranks if self.id_of[rank] is not None]
        return ids

    def decode(self, ids):
        """The text of ids; bytes that make no character become a replacement character."""
        return b"".join(self.bytes_of[i] for i in ids).decode("utf-8", "replace")
