"""A small random checkpoint folder as transformers writes it, with tokenizer and chat template."""

import json

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SHAPES = {
    "llama": ROTARY,
    "qwen2": ROTARY,
    "qwen3": {**ROTARY, "head_dim": 14},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}


def tiny_checkpoint(folder, kind="qwen2", seed=0, **changes):
    """Save a model of two blocks, its tokenizer and chat template in `folder`; return the folder.

    kind: a key of SHAPES. changes: of the model's config. The vocabulary is the 256 bytes and
    SPECIALS; the embedding has more rows, as padding. Weights are as large as trained ones.
    """
    torch.manual_seed(seed)
    own = {"vocab_size": 264, "initializer_range": 0.2, "bos_token_id": 256, "eos_token_id": 258}
    config = transformers.AutoConfig.for_model(kind, **{**own, **SHAPES[kind], **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder, template=CHATML):
    """tokenizer.json, byte-level BPE without a merge, and tokenizer_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
