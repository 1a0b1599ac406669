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
        config = read_json(folder / "config.json", "a checkpoint's configuration")
        model_type = config.get("model_type") if isinstance(config, dict) else None
        if model_type not in ("gpt2", "qwen2", "qwen3"):
            raise UserError(f"{folder}/config.json: model_type is {model_type!r}, supported: 'gpt2', 'qwen2', 'qwen3'")

        def read(name):
            value = read_json(folder / name, "a tokenizer file") if (folder / name).exists() else {}
            if not isinstance(value, dict):
                raise UserError(f"{folder / name}: a JSON {type(value).__name__}, expected an object")
            return value
        whole, settings, added = read("tokenizer.json"), read("tokenizer_config.json"), read("added_tokens.json")
        path = folder / ("vocab.json" if (folder / "vocab.json").exists() else "tokenizer.json")
        if not path.exists():
            raise UserError(f"{folder}: neither vocab.json nor tokenizer.json, expected the checkpoint's tokenizer")
        model = whole["model"] if isinstance(whole.get("model"), dict) else {}
        vocab = read("vocab.json") if path.name == "vocab.json" else model.get("vocab")
        if not isinstance(vocab, dict) or model.get("type", "BPE") != "BPE":
            raise UserError(f"{path}: no byte-level BPE vocabulary, expected token strings and their ids")
        special = {name: vocab[name] for name in QWEN_SPECIAL if name in vocab}
        try:
            special |= {t["content"]: t["id"] for t in whole.get("added_tokens", [])} | added
            special |= {t["content"]: int(i) for i, t in settings.get("added_tokens_decoder", {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UserError(f"{folder}: added tokens that can't be read ({e!r}), expected each with its content and id") from None
        if not special and len(vocab) == min(QWEN_SPECIAL.values()):
            special = dict(QWEN_SPECIAL)  # Qwen's own vocabulary, whose file ends where these begin
        characters, ranks, owner = byte_of_character(), {}, {}
        for token, i in (vocab | special).items():
            if type(i) is not int or not 0 <= i < 2**32 or owner.setdefault(i, token) != token:
                raise UserError(f"{path}: token {token!r} has id {i!r}, expected a whole number that no other token has")
            if token not in special:
                try:
                    ranks[bytes(characters[c] for c in token)] = i
                except KeyError:
                    raise UserError(f"{path}: token {token!r} is not written in GPT-2's byte alphabet; expected a byte-level BPE") from None
        missing = sum(bytes([b]) not in ranks for b in range(256))
        if missing:
            raise UserError(f"{path}: {missing} of the 256 single bytes are no tokens; expected a byte-level BPE")
        template = folder / "chat_template.jinja"
        template = template.read_text(encoding="utf-8", errors="replace") if template.exists() else str(settings.get("chat_template") or "")
        defaults = (QWEN_SYSTEM, PLAIN_SYSTEM) if model_type == "qwen2" else ()
        system = next((s for s in defaults if s in (template or PLAIN_SYSTEM)), None)  # no template: a base model
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
