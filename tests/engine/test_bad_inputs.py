"""What cannot be served is refused by name, with the fix; and the engine serves the next request."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import CHECKPOINTS, golden, greedy, small_engine
from small_text import text_checkpoint

from converters.errors import CheckpointError
from converters.hub import locate
from converters.on_disk import DEMO_MODEL
from jaxllm import Engine, SamplingParams

SIZES: dict[str, Any] = {"max_model_len": 96, "num_pages": 60, "enforce_eager": True}
REFERENCE = golden("llama")
PROMPT: list[int] = REFERENCE["prompt0"].tolist()
EXPECTED: list[int] = REFERENCE["tokens0"].tolist()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = text_checkpoint(tmp_path_factory.mktemp("model"))
    with small_engine(str(folder), skip_tokenizer_init=False, **SIZES) as engine:
        yield engine


# Requests


def with_params(**params: Any) -> Callable[[Engine], Any]:
    return lambda engine: engine.generate([PROMPT], SamplingParams(**params))


def with_prompt(prompt: Any, **options: Any) -> Callable[[Engine], Any]:
    return lambda engine: engine.generate(prompt, SamplingParams(max_tokens=4), **options)


REQUESTS: dict[str, tuple[Callable[[Engine], Any], type[Exception], str]] = {
    "no tokens": (with_prompt([[]]), ValueError, "prompt: it has no tokens; give it at least one"),
    "no text": (with_prompt("", add_special_tokens=False), ValueError, "prompt: it has no tokens"),
    "token outside": (with_prompt([5, 125]), ValueError, "prompt_token_ids: 125 .* from 0 to 124"),
    "huge token": (with_prompt([5, 2**70]), ValueError, f"prompt_token_ids: {2**70} "),
    "negative token": (with_prompt([-1]), ValueError, "prompt_token_ids: -1 not in"),
    "array of floats": (with_prompt(np.ones(3)), TypeError, "prompt_token_ids: .*1.0.* whole number"),
    "too long": (with_prompt([5] * 96), ValueError, "prompt: 96 tokens .*max_model_len=96; shorten it"),
    "far too long": (with_prompt("x" * 9999), ValueError, "prompt: 9999 characters.*max_model_len=96"),
    "not a prompt": (with_prompt(7), TypeError, "prompts: int is not a prompt; give a string"),
    "none": (with_prompt(None), TypeError, "prompts: NoneType is not a prompt"),
    "unknown key": (with_prompt({"text": "hi"}), ValueError, r"prompt: unknown keys \['text'\]; known are"),
    "not unicode": (with_prompt("\udc80"), ValueError, "prompt: not valid Unicode"),
    "unknown argument": (with_prompt("hi", trunkate=3), TypeError, "trunkate"),
    "parameters as a dict": (
        lambda engine: engine.generate("hi", {"temperature": 1}),  # pyright: ignore[reportArgumentType]
        TypeError,
        "sampling_params: must be SamplingParams, not dict",
    ),
    "temperature nan": (with_params(temperature=float("nan")), ValueError, "temperature=nan: .*finite"),
    "temperature inf": (with_params(temperature=float("inf")), ValueError, "temperature=inf: .*finite"),
    "temperature negative": (with_params(temperature=-1), ValueError, "temperature=-1.0: .*0 or more"),
    "temperature text": (with_params(temperature="1"), TypeError, "temperature='1': must be a number"),
    "top_p zero": (with_params(top_p=0), ValueError, r"top_p=0.0: must be in \(0, 1\]"),
    "top_p nan": (with_params(top_p=float("nan")), ValueError, "top_p=nan"),
    "min_p": (with_params(min_p=1.1), ValueError, "min_p=1.1: must be in"),
    "top_k": (with_params(top_k=-2), ValueError, "top_k=-2"),
    "top_k fraction": (with_params(top_k=1.5), TypeError, "top_k=1.5: must be a whole number"),
    "repetition_penalty": (with_params(repetition_penalty=0), ValueError, "repetition_penalty=0.0"),
    "presence_penalty": (with_params(presence_penalty=3), ValueError, "presence_penalty=3.0"),
    "frequency_penalty": (with_params(frequency_penalty=-3), ValueError, "frequency_penalty=-3.0"),
    "n zero": (with_params(n=0), ValueError, "n=0: must be in 1 to 16384"),
    "n negative": (with_params(n=-1), ValueError, "n=-1: must be in 1 to 16384"),
    "n huge": (with_params(n=10**9), ValueError, "n=1000000000: must be in 1 to 16384"),
    "n greedy": (with_params(n=2, temperature=0), ValueError, "n=2: must be 1 with temperature 0"),
    "max_tokens zero": (with_params(max_tokens=0), ValueError, "max_tokens=0: must be None or at least 1"),
    "max_tokens negative": (with_params(max_tokens=-5), ValueError, "max_tokens=-5"),
    "min_tokens negative": (with_params(min_tokens=-1), ValueError, "min_tokens=-1: must be 0 or more"),
    "min_tokens above": (with_params(min_tokens=9, max_tokens=5), ValueError, "min_tokens=9: .*max_tokens=5"),
    "logprobs negative": (with_params(logprobs=-2), ValueError, "logprobs=-2"),
    "logprobs above": (with_params(logprobs=21), ValueError, "logprobs=21: at most 20 .*max_logprobs"),
    "prompt_logprobs": (with_params(prompt_logprobs=-5), ValueError, "prompt_logprobs=-5"),
    "seed": (with_params(seed=2**64), ValueError, "seed=.*64-bit"),
    "stop of numbers": (with_params(stop=[1, 2]), TypeError, "stop has 1: must hold strings only"),
    "stop of bytes": (with_params(stop=b"end"), TypeError, "stop has 101: must hold strings"),
    "stop number": (with_params(stop=3), TypeError, "stop=3: must be a list of strings"),
    "stop mixed": (with_params(stop=["a", None]), TypeError, "stop has None"),
    "stop empty": (with_params(stop=[""]), ValueError, "stop=.*without empty strings"),
    "stop without text": (with_params(stop="a", detokenize=False), ValueError, "stop=.*detokenize is False"),
    "stop_token_ids of text": (with_params(stop_token_ids=["a"]), TypeError, "stop_token_ids='a'"),
    "stop_token_ids outside": (with_params(stop_token_ids=[999]), ValueError, "stop_token_ids: 999 not in"),
    "allowed_token_ids none": (with_params(allowed_token_ids=[]), ValueError, "allowed_token_ids="),
    "allowed_token_ids outside": (with_params(allowed_token_ids=[125]), ValueError, "allowed_token_ids: 125"),
    "logit_bias outside": (with_params(logit_bias={125: 1}), ValueError, "logit_bias: 125 not in"),
    "logit_bias nan": (with_params(logit_bias={5: float("nan")}), ValueError, r"logit_bias\[5\]=nan"),
    "logit_bias list": (with_params(logit_bias=[1.0]), TypeError, r"logit_bias=\[1.0\]: must be a mapping"),
    "bad_words": (with_params(bad_words=[7]), TypeError, "bad_words has 7: must hold strings only"),
    "long bad word": (with_params(bad_words=["x" * 40]), ValueError, "bad_words: 40 tokens.* at most 16"),
    "many bad words": (
        with_params(bad_words=[f"{i}" for i in range(300)]), ValueError, "bad_words: 300 .*at most 256",
    ),
    "output_kind": (with_params(output_kind=1), TypeError, "output_kind=1: must be a RequestOutputKind"),
    "processor": (with_params(logits_processors=["none"]), ValueError, "logits_processors='none'"),
    "unknown parameter": (with_params(temprature=1), TypeError, "temprature"),
    "truncate": (with_prompt("hi", truncate_prompt_tokens=0), ValueError, "truncate_prompt_tokens=0"),
    "priority": (with_prompt("hi", priority=0.5), TypeError, "priority: 0.5"),
    "counts differ": (with_prompt(["a", "b"], priority=[1]), ValueError, "priority: 1 given for 2 prompts"),
    "chat of text": (
        lambda engine: engine.chat(["hi"]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "message",
    ),
    "chat without role": (lambda engine: engine.chat([{"content": "hi"}]), ValueError, "role"),
}  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS)
def test_requests(engine: Engine, case: str) -> None:
    use, kind, message = REQUESTS[case]
    with pytest.raises(kind, match=message):
        use(engine)
    assert engine.num_unfinished_requests == 0
    assert not engine.has_unfinished_requests()


def test_the_next_request_is_served(engine: Engine) -> None:
    """After all of the above, and with a refusal while another request runs."""
    engine.add_request("a", PROMPT, greedy(16))
    for use, kind, _ in REQUESTS.values():
        with pytest.raises(kind):
            use(engine)
        engine.step()
    for prompt, params in (([], greedy(4)), ([999], greedy(4)), (PROMPT, greedy(4, logprobs=99))):
        with pytest.raises(ValueError, match=r"tokens|999|logprobs=99"):
            engine.add_request("b", prompt, params)
        with pytest.raises(ValueError, match=r"tokens|999|logprobs=99"):
            engine.stream(prompt, params)
    [output] = engine.generate([PROMPT], greedy(16))
    assert output.outputs[0].token_ids == EXPECTED
    assert engine.num_unfinished_requests == 0


# Checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINTS / "llama", tmp_path / "model"))


def load(folder: Path | str, **options: Any) -> None:
    small_engine(str(folder), **(SIZES | options)).close()


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}/nothing: no such file or folder")):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="owner/nothing: no such file or folder here"):
        Engine.from_pretrained("owner/nothing", progress=False)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a model: it has no \.safetensors"):
        load(tmp_path)


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not a model: it has no config\.json"):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_safetensors(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*(cut off|too short|claims).*download"):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.5])
def test_truncated_gguf(tmp_path: Path, share: float) -> None:
    whole = locate(DEMO_MODEL)
    size = int(whole.stat().st_size * share)
    cut = tmp_path / "cut.gguf"
    with whole.open("rb") as file:
        cut.write_bytes(file.read(size))
    with pytest.raises(CheckpointError, match=r"cut\.gguf.*"):
        load(cut)


def test_wrong_architecture(folder: Path) -> None:
    change_config(folder, architectures=["NobodyForCausalLM"])
    with pytest.raises(ValueError, match=r"(?s)NobodyForCausalLM.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        load(folder)


def test_another_familys_weights(folder: Path) -> None:
    """All that is missing and left over is listed at once."""
    change_config(folder, architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False)
    with pytest.raises(ValueError, match=r"(?s)q_norm.*q_proj\.bias"):
        load(folder)


def test_wrong_shapes(folder: Path) -> None:
    change_config(folder, intermediate_size=96)
    with pytest.raises(ValueError, match=r"(?s)gate_proj.*80.*96"):
        load(folder)


def test_missing_tokenizer(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer .*; name another with tokenizer=\.\.\."):
        load(folder, skip_tokenizer_init=False)


def test_bad_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": -3}')
    with pytest.raises(ValueError, match=r"generation_config\.json: temperature=-3"):
        load(folder)


# Options


CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"max_modle_len": 5}, TypeError, "unknown option 'max_modle_len'; did you mean max_model"),
    "unheard of": ({"zzz": 5}, TypeError, "unknown option 'zzz'$"),
    "dtype": ({"dtype": "int3"}, ValueError, "dtype='int3': must be one of 'auto', 'float32'"),
    "format": ({"load_format": "pt"}, ValueError, "load_format='pt': must be one of"),
    "another format": ({"load_format": "gguf"}, CheckpointError, "load_format='gguf': .*safetensors"),
    "length": ({"max_model_len": -1}, ValueError, "max_model_len=-1: must be a whole number of at least 1"),
    "too long": ({"max_model_len": 4096}, ValueError, "max_model_len=4096: .*positions up to 128; lower it"),
    "page size": ({"page_size": 12}, ValueError, "page_size=12: must be a power of two"),
    "rows": ({"max_num_seqs": 0}, ValueError, "max_num_seqs=0"),
    "tokens": ({"max_num_batched_tokens": 2.5}, ValueError, "max_num_batched_tokens=2.5"),
    "policy": ({"policy": "lifo"}, ValueError, "policy='lifo': must be one of 'fcfs', 'priority'"),
    "share": ({"num_pages": None, "memory_utilization": 1.5}, ValueError, "memory_utilization=1.5: .*in .0"),
    "two sizes": ({"kv_cache_memory": 10**6}, ValueError, "num_pages=60: .*kv_cache_memory"),
    "pages": ({"num_pages": 5}, ValueError, "max_model_len=96: 5 pages .*at most 21; lower it"),
    "devices": ({"tensor_parallel_size": 64}, ValueError, "tensor_parallel_size=64"),
    "kernel": ({"attention_backend": "magic"}, ValueError, "magic"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_options(case: str) -> None:
    options, kind, message = CONFIGS[case]
    with pytest.raises(kind, match=message):
        load(CHECKPOINTS / "llama", **options)
