"""`jaxllm env`: everything a bug report needs, and no secrets."""

import json
import re

import jax
import pytest

from jaxllm.cli.env import _environment
from jaxllm.cli.main import main


def test_json_has_every_section(capsys: pytest.CaptureFixture[str]):
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == [
        "versions",
        "machine",
        "devices",
        "caches",
        "registered",
        "attention",
        "products",
        "environment",
    ]
    assert report["versions"]["jax"] == jax.__version__
    assert len(report["devices"]) == len(jax.devices())
    assert "xla" in report["registered"]["attention backends"]
    assert "LlamaForCausalLM" in report["registered"]["architectures"]
    assert "jaxllm" in report["caches"]["jaxllm"]


def test_text_has_the_same(capsys: pytest.CaptureFixture[str]):
    assert main(["env"]) == 0
    out, err = capsys.readouterr()
    assert re.search(rf"^  jax +{re.escape(jax.__version__)}$", out, re.MULTILINE)
    assert err == ""


def test_a_driver_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken() -> object:
        raise RuntimeError("no TPU: /dev/accel0 is busy")

    monkeypatch.setattr(jax, "devices", broken)
    assert main(["env"]) == 0
    assert "/dev/accel0 is busy" in capsys.readouterr().out


def test_secrets_are_not_shown():
    shown = _environment({"HF_TOKEN": "hf_x", "HF_HOME": "/cache", "JAX_PLATFORMS": "cpu", "PATH": "/bin"})
    assert shown == {"HF_HOME": "/cache", "HF_TOKEN": "(set)", "JAX_PLATFORMS": "cpu"}
