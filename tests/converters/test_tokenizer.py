"""Tokenizers of folders and GGUF files."""

import json
from pathlib import Path
from typing import Any

import gguf_made
import pytest
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from converters.advice import transformers
from converters.errors import CheckpointError
from converters.tokenizer import load_tokenizer

TEXTS = [
    "hello world",
    " hello  hello\n\n world ",
    "It's 2024, isn't it? 3.14159",
    "def f(x):\n\treturn x**2  # naïve",
    "漢字 and 🙂 and ünïcödé",
    "<|end|>hello<|tool|> world",
    "HELLO'LL World's",
    "",
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def byte_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level vocabulary; the last two are special and user-defined."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in ("hello", "Ġhello", "Ġworld", "Ġ2", "20", "24", "ĠĠ", "it", "'s", "ĊĊ"):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    return [*tokens, "<|end|>", "<|tool|>"], merges


def byte_level(pre: str, **settings: Any) -> dict[str, Any]:
    tokens, merges = byte_vocabulary()
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.merges": merges,
        "ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "ggml.bos_token_id": len(tokens) - 2,
        "ggml.eos_token_id": len(tokens) - 2,
        "chat_template": TEMPLATE,
        **settings,
    }


PIECES = [
    "hello",
    "▁hello",
    "▁world",
    "▁▁",
    "he",
    "wor",
    "it",
    "▁it",
    "llo",
    "ell",
    "lo",
    "or",
    "ld",
    "world",
]


def sentencepiece(**settings: Any) -> dict[str, Any]:
    """Every beginning of a piece is in the vocabulary too; longer pieces score lower."""
    letters = sorted({letter for piece in PIECES for letter in piece} | set("abcdefghijklmnopqrstuvwxyz▁"))
    inner = {piece[:end] for piece in PIECES for end in range(2, len(piece) + 1)}
    pieces = sorted(inner | set(PIECES), key=lambda piece: (len(piece), piece))
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *pieces,
        *letters,
        "<|end|>",
    ]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters)) + [4]
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        **settings,
    }


def write(path: Path, tokenizer: dict[str, Any], architecture: str = "llama") -> Path:
    return gguf_made.write(path / "m.gguf", architecture, {}, tokenizer=tokenizer)


def original(steps: list[Any], *, ignore_merges: bool = False) -> Tokenizer:
    """The tokenizer that the byte-level vocabulary would come from, made as its tokenizer.json would say."""
    tokens, merges = byte_vocabulary()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(ids, pairs, ignore_merges=ignore_merges))  # pyright: ignore[reportArgumentType]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<|tool|>"])
    return tokenizer


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES, WORDS = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words) for words in (False, True))
ORIGINALS = {
    "gpt-2": original([WORDS]),
    "smollm": original([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    "llama-bpe": original([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES], ignore_merges=True),
    "qwen2": original([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES]),
}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_ids_are_the_originals(pre: str, tmp_path: Path):
    tokenizer = load_tokenizer(write(tmp_path, byte_level(pre)))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == ORIGINALS[pre].encode(text).ids, text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_pre_tokenizers_differ():
    """Or the test above could not tell them apart."""
    text = "It's 2024  "
    assert len({tuple(tokenizer.encode(text).ids) for tokenizer in ORIGINALS.values()}) >= 3


def test_qwen_composes_unicode(tmp_path: Path):
    tokenizer = load_tokenizer(write(tmp_path, byte_level("qwen2")))
    assert tokenizer("u\u0308")["input_ids"] == tokenizer("ü")["input_ids"]


def test_special_tokens_and_template(tmp_path: Path):
    tokenizer = load_tokenizer(write(tmp_path, byte_level("gpt-2")))
    tokens, _ = byte_vocabulary()
    assert tokenizer.eos_token_id == len(tokens) - 2
    assert tokenizer.decode([len(tokens) - 2, len(tokens) - 1], skip_special_tokens=True) == "<|tool|>"
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: hi\n"


def test_named_templates(tmp_path: Path):
    named = {"chat_templates": ["tool_use"], "chat_template.tool_use": "tools!"}
    tokenizer = load_tokenizer(write(tmp_path, byte_level("gpt-2", **named)))
    assert (
        tokenizer.apply_chat_template([{"role": "user"}], chat_template="tool_use", tokenize=False)
        == "tools!"
    )


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({}, (0, 0)),
        ({"ggml.add_bos_token": True}, (1, 0)),
        ({"ggml.add_bos_token": True, "ggml.add_eos_token": True}, (1, 1)),
    ],
)
def test_what_begins_and_ends_a_text(settings: dict[str, Any], extra: tuple[int, int], tmp_path: Path):
    tokenizer = load_tokenizer(write(tmp_path, byte_level("gpt-2", **settings)))
    plain = tokenizer("hello", add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    assert tokenizer("hello")["input_ids"] == end * extra[0] + plain + end * extra[1]


def test_sentencepiece_pieces(tmp_path: Path):
    tokenizer = load_tokenizer(write(tmp_path, sentencepiece()))
    assert tokenizer.tokenize("hello world") == ["▁hello", "▁world"]
    assert tokenizer.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert (
        tokenizer("hello")["input_ids"][0] == 1
    )  # sentencepiece vocabularies begin texts unless told not to
    for text in ("hello world", "it  hello", "é 漢字\n\tx"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2"])
def test_sentencepiece_ids_are_those_of_the_library(architecture: str, tmp_path: Path):
    """sentencepiece itself, on a model file of the same pieces and scores."""
    processor = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2 as pb

    prefixed = architecture != "gemma2"
    settings = sentencepiece(**{"ggml.add_space_prefix": prefixed, "ggml.add_bos_token": False})
    model = pb.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefixed
    model.normalizer_spec.remove_extra_whitespaces = False
    rows = zip(settings["ggml.tokens"], settings["ggml.scores"], settings["ggml.token_type"], strict=True)
    for token, score, kind in rows:
        model.pieces.add(piece=token, score=score, type=kind)
    reference = processor.SentencePieceProcessor(model_proto=model.SerializeToString())
    tokenizer = load_tokenizer(write(tmp_path, settings, architecture))
    for text in ("hello world", "helloworld ithello", "it is  hello", "wor ld llo é 漢 🙂", "zzz hellolo"):
        assert tokenizer(text)["input_ids"] == reference.encode(text), text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


DAMAGE = {
    "no tokenizer": ({}, "has no tokenizer; name another"),
    "a kind that is not read": ({"ggml.model": "rwkv"}, "kind 'rwkv', which is not read"),
    "a pre-tokenizer not known": (byte_level("klingon"), "tokenizer.ggml.pre='klingon' is not one of gpt-2,"),
    "no merges": (byte_level("gpt-2") | {"ggml.merges": 1}, "tokenizer.ggml.merges is a int"),
    "merges of three": (byte_level("gpt-2") | {"ggml.merges": ["a b c"]}, "merges holds a line"),
    "merges of unknown tokens": (
        byte_level("gpt-2") | {"ggml.merges": ["漢 字"]},
        "its tokenizer is damaged",
    ),
    "an id past the vocabulary": (byte_level("gpt-2") | {"ggml.eos_token_id": 9999}, "eos_token_id=9999 of"),
    "too few types": (byte_level("gpt-2") | {"ggml.token_type": [1]}, "but 1 token types"),
    "tokens that are numbers": (
        byte_level("gpt-2") | {"ggml.tokens": [1]},
        "tokens holds something other than str",
    ),
    "too few scores": (sentencepiece() | {"ggml.scores": [0.0]}, "but not as many scores"),
    "a template that is a number": (
        byte_level("gpt-2") | {"chat_template": 3},
        "tokenizer.chat_template is a int",
    ),
}


@pytest.mark.parametrize(("tokenizer", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_names_the_key(tokenizer: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write(tmp_path, tokenizer))


def test_a_tokenizer_survives_being_saved(tmp_path: Path):
    """As `jaxllm convert` does it; the config's model type must not change what is loaded."""
    tokenizer = load_tokenizer(write(tmp_path, byte_level("smollm")))
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded = load_tokenizer(tmp_path / "saved")
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.chat_template, loaded.eos_token) == (tokenizer.chat_template, tokenizer.eos_token)


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"has no tokenizer \(no tokenizer\.json, .*tokenizer=\.\.\."):
        load_tokenizer(tmp_path)


def test_a_folder_with_a_damaged_tokenizer(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_repo_that_cannot_be_reached(tmp_path: Path):
    with pytest.raises(CheckpointError, match="owner/none: its tokenizer cannot be loaded"):
        load_tokenizer("owner/none", cache_dir=tmp_path, local_files_only=True)


def test_the_demo_model():
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    # As transformers reads the same file (see the next test): digits one by one.
    assert tokenizer("hello 123")["input_ids"] == [28120, 216, 33, 34, 35]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n"
    )


@pytest.mark.parity
def test_the_demo_model_is_read_as_transformers_reads_it():
    """transformers' own reader of GGUF needs torch."""
    from converters.hub import locate

    path = locate("smollm2-135m-instruct")
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = load_tokenizer(path)
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n", " 1 2 33"]:
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    assert tokenizer.chat_template == reference.chat_template
    assert tokenizer.all_special_ids == reference.all_special_ids


def test_importing_transformers_says_nothing(capfd: pytest.CaptureFixture[str]):
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", "import converters.advice"], check=True)
    assert capfd.readouterr().err == ""
