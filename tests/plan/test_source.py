"""Where plans have their configs from."""

import importlib.util
from contextlib import closing

import pytest

from converters.checkpoint import open_checkpoint
from converters.on_disk import DEMO_MODEL
from jaxllm.config import ModelConfig
from jaxllm.models.registry import ModelRegistry
from jaxllm.plan.source import list_configs, open_configs


@pytest.mark.parametrize("name", list_configs())
def test_configs_that_come_along(name: str) -> None:
    """Their families are served, and they are read."""
    checkpoint = open_configs(ModelConfig(name))
    architecture = ModelRegistry.resolve(checkpoint.config)
    config = architecture.read_config(checkpoint.config, dtype="bfloat16", tensor_parallel_size=1)
    assert config.num_layers >= 30


def test_the_demo_model_is_planned_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(open_checkpoint(DEMO_MODEL)) as whole:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert open_configs(ModelConfig(DEMO_MODEL)).config == whole.config | {"torch_dtype": "bfloat16"}
        assert whole.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nobody/nothing", r"its config cannot be had .*give the path of a config\.json, or one of"),
        ("meta-llama/Llama-3-8B", r"did you mean meta-llama/Llama-3.1-8B\?"),
        ("smollm2-135m", r"did you mean smollm2-135m-instruct\?"),
        ("/nope/config.json", "^/nope/config.json: no such file or folder"),
        ("nope/config.json", "^nope/config.json: no such file or folder"),
    ],
)
def test_a_config_that_cannot_be_had(model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_configs(ModelConfig(model))


def test_what_the_hub_says_is_cut_to_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError("no network\nand so on")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match=r"cannot be had \(no network\); give"):
        open_configs(ModelConfig("nobody/nothing"))
