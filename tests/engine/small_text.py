"""A small checkpoint with a tokenizer. The vocabulary is the model's: 125 tokens, most of them characters."""

import json
import shutil
import string
from pathlib import Path
from typing import Any

from small import CHECKPOINTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, USER = 1, 2, 3
_SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>"]
_CHARACTERS = string.digits + string.ascii_letters + string.punctuation
_TEMPLATE = (
    "<s>{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens: specials, a space, the visible ASCII characters, and letters with a space before them."""
    letters = [f"Ġ{letter}" for letter in string.ascii_lowercase]
    tokens = [*_SPECIAL, "Ġ", *_CHARACTERS, *letters]
    merges = [("Ġ", letter) for letter in string.ascii_lowercase]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=_TEMPLATE
    )


def text_checkpoint(folder: Path, *, model: str = "llama", generation: dict[str, Any] | None = None) -> Path:
    """Copies a parity case's model to a folder, with a tokenizer and, if given, a generation_config.json."""
    shutil.copytree(CHECKPOINTS / model, folder, dirs_exist_ok=True)
    make_tokenizer().save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
