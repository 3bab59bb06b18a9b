"""Where plans have their configs from."""

import pytest

from jaxllm.config import ModelConfig
from jaxllm.models.registry import ModelRegistry
from jaxllm.plan.source import list_configs, open_configs


@pytest.mark.parametrize("name", list_configs())
def test_configs_that_come_along(name: str) -> None:
    """Their families are served, and they are read."""
    checkpoint = open_configs(ModelConfig(name))
    architecture = ModelRegistry.resolve(checkpoint.config)
    config = architecture.read_config(checkpoint.config, dtype="bfloat16", tensor_parallel_size=1)
    assert config.num_layers >= 32


def test_a_config_that_cannot_be_had() -> None:
    message = r"its config cannot be had .*give the path of a config\.json, or one of"
    with pytest.raises(ValueError, match=message):
        open_configs(ModelConfig("nobody/nothing"))
