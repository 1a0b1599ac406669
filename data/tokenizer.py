"""A checkpoint's tokenizer through tiktoken, offline, from the files in its own folder: GPT-2's and Qwen's byte-level BPE."""
import unicodedata
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from cli import UserError, read_json

QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
PLAIN_SYSTEM = "You are a helpful assistant."


def byte_of_character():
    """GPT-2 writes each byte of a token as one printable character; this is the way back, {character: byte}."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """encode never yields a special token, whatever the text says; those are looked up by name with `special`.

    system: the text of the default system turn of this checkpoint's chat template, or None (GPT-2, Qwen3).
    """

    def __init__(self, ranks, special, model_type, system=None):
        pattern = r50k_pat_str if model_type == "gpt2" else QWEN_PATTERN
        self.encoding = tiktoken.Encoding(model_type, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.specials, self.model_type, self.system = special, model_type, system
        self.known_ids = sorted({*ranks.values(), *special.values()})  # an embedding is padded beyond these

    @classmethod
    def from_folder(cls, folder):
        """Reads vocab.json or, where there is none, tokenizer.json; special tokens from whichever file names them.

        UserError where no file is there, or it is no byte-level BPE of GPT-2's or Qwen's kind."""
        folder = Path(folder)
        optional = lambda name: read_json(folder / name, "a tokenizer file") if (folder / name).exists() else {}
        model_type = read_json(folder / "config.json", "a checkpoint's configuration").get("model_type")
        if model_type not in ("gpt2", "qwen2", "qwen3"):
            raise UserError(f"{folder}/config.json: model_type is {model_type!r}, supported: 'gpt2', 'qwen2', 'qwen3'")
        whole, settings = optional("tokenizer.json"), optional("tokenizer_config.json")
        path = folder / ("vocab.json" if (folder / "vocab.json").exists() else "tokenizer.json")
        if not path.exists():
            raise UserError(f"{folder}: neither vocab.json nor tokenizer.json, expected the checkpoint's tokenizer")
        vocab = read_json(path, "a vocabulary") if path.name == "vocab.json" else whole.get("model", {}).get("vocab")
        if not isinstance(vocab, dict) or whole.get("model", {}).get("type", "BPE") != "BPE":
            raise UserError(f"{path}: no byte-level BPE vocabulary, expected token strings and their ids")
        special = {t["content"]: t["id"] for t in whole.get("added_tokens", [])}
        special |= {t["content"]: int(i) for i, t in settings.get("added_tokens_decoder", {}).items()} | optional("added_tokens.json")
        if "<|endoftext|>" in vocab:
            special.setdefault("<|endoftext|>", vocab["<|endoftext|>"])
        if model_type != "gpt2" and not special and len(vocab) == min(QWEN_SPECIAL.values()):
            special = dict(QWEN_SPECIAL)  # Qwen's own vocabulary, whose file ends where these begin
        characters, ranks = byte_of_character(), {}
        for token, rank in vocab.items():
            if token not in special:
                try:
                    ranks[bytes(characters[c] for c in token)] = rank
                except KeyError:
                    raise UserError(f"{path}: token {token!r} is not written in GPT-2's byte alphabet; expected a byte-level BPE") from None
        missing = sum(bytes([b]) not in ranks for b in range(256))
        if missing:
            raise UserError(f"{path}: {missing} of the 256 single bytes are no tokens; expected a byte-level BPE")
        template = folder / "chat_template.jinja"
        template = template.read_text(encoding="utf-8") if template.exists() else str(settings.get("chat_template") or "")
        system = None if model_type != "qwen2" else QWEN_SYSTEM if QWEN_SYSTEM in template else PLAIN_SYSTEM
        return cls(ranks, special, model_type, system)

    def encode(self, text):
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.model_type != "gpt2" else text)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def special(self, name):
        if name not in self.specials:
            raise UserError(f"the tokenizer has no special token {name}, only {', '.join(self.specials) or 'none'}")
        return self.specials[name]

    @property
    def end_of_turn(self):
        """The id that ends a response: <|im_end|> in ChatML, <|endoftext|> for GPT-2."""
        return self.special("<|endoftext|>" if self.model_type == "gpt2" else "<|im_end|>")
