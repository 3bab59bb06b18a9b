"""The flags of `jaxllm serve`: ours, vLLM's, and those of a file."""

from pathlib import Path
from typing import Any

import pytest

from jaxllm.cli.main import main
from jaxllm.config import EngineConfig, ParallelConfig
from jaxllm.server.config import ServerConfig


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command would have served."""
    found: list[Any] = []

    def run(config: ServerConfig, engine_config: EngineConfig) -> int:
        found[:] = [config, engine_config]
        return 0

    monkeypatch.setattr("jaxllm.server.run.run", run)
    monkeypatch.delenv("JAXLLM_API_KEY", raising=False)
    return found


def test_without_flags_it_listens_on_loopback(served: list[Any]) -> None:
    assert main(["serve", "some-model"]) == 0
    config, engine = served
    assert (config.listen.host, config.listen.port, config.access.api_key) == ("127.0.0.1", 8000, ())
    assert (engine.model.model, engine.compile.progress) == ("some-model", False)


def test_flags_as_for_vllm(served: list[Any]) -> None:
    argv = (
        "serve m --gpu-memory-utilization 0.5 --max-model-len 64 --block-size 32 --no-enable-prefix-caching"
    )
    argv += " --served-model-name a b --api-key k1 k2 --pipeline-parallel-size 2"
    argv += " --tensor-parallel-size 4 --enable-expert-parallel"
    with pytest.warns(UserWarning, match="swap_space"):
        assert main([*argv.split(), "--swap-space", "4"]) == 0
    config, engine = served
    assert (engine.cache.memory_utilization, engine.cache.page_size) == (0.5, 32)
    assert engine.cache.enable_prefix_caching is False
    assert config.access.served_model_name == ["a", "b"]
    assert config.access.api_key == ("k1", "k2")
    assert engine.parallel == ParallelConfig(expert_parallel_size=4, pipeline_parallel_size=2)


def test_a_file_of_flags_and_the_command_line_before_it(served: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: from-file\nport: 9\nhost: 0.0.0.0\nserved_model_name:\n- x\n- y\nadmin: true\n"
        "enable-prefix-caching: false\nmax-num-seqs: 3\n"
    )
    assert main(["serve", "--config", str(file), "--port", "7", "--served-model-name", "z"]) == 0
    config, engine = served
    assert (config.listen.port, config.listen.host, config.access.admin) == (7, "0.0.0.0", True)
    assert config.access.served_model_name == ["z"]
    assert engine.model.model == "from-file"
    assert (engine.cache.enable_prefix_caching, engine.scheduler.max_num_seqs) == (False, 3)


def test_what_is_switched_off_on_the_command_line_stays_off(served: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 9\nshutdown-timeout: 20\nadmin: true\nmodel: from-file\n")
    argv = ["serve", "m", "--port", "0", "--shutdown-timeout", "0", "--no-admin", "--config", str(file)]
    assert main(argv) == 0
    config, engine = served
    assert (config.listen.port, config.limits.shutdown_timeout, config.access.admin) == (0, 0, False)
    assert engine.model.model == "m"


def test_keys_from_the_environment(served: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLLM_API_KEY", "a, b,")
    assert main(["serve", "m", "--api-key", "c"]) == 0
    assert served[0].access.api_key == ("c", "a", "b")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "MODEL"),
        (["m", "--port", "70000"], "port=70000"),
        (["m", "--ssl-keyfile", "k"], "ssl_certfile"),
        (["m", "--ssl-cert-reqs", "2"], "ssl_cert_reqs: needs ssl_certfile"),
        (["m", "--ssl-ca-certs", "c"], "ssl_ca_certs: needs ssl_certfile"),
        (["m", "--profile-dir", "p"], "profile_dir: needs admin"),
        (["m", "--request-timeout", "0"], "request_timeout"),
        (["m", "--log-level", "loud"], "--log-level"),
        (["m", "--page-size", "3"], "page_size=3"),
        (["m", "--enable-lora"], "enable_lora"),
        (["m", "--quantization", "awq"], "quantization='awq'"),
        (["m", "--pipeline-parallel-size", "0"], "pipeline_parallel_size=0"),
        (["m", "--no-such-flag"], "--no-such-flag"),
        (["m", "--config", "/no/such/file"], "/no/such/file"),
    ],
)
def test_errors_of_usage(
    argv: list[str], complaint: str, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *argv])
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not served


def test_a_file_that_is_none(served: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, complaint in (("- a\n", "names of flags"), ("a: [", "--config"), ("nonsense: 3\n", "nonsense")):
        (tmp_path / "f.yaml").write_text(text)
        with pytest.raises(SystemExit):
            main(["serve", "m", "--config", str(tmp_path / "f.yaml")])
        assert complaint in capsys.readouterr().err
