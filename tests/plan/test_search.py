"""`jaxllm plan --search` from end to end, with this machine's CPUs in the place of chips."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from plan_cases import SMALL

from jaxllm.cli.main import main


@pytest.mark.usefixtures("steps")
def test_search(model: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    targets = ("--target", "v5e:2x2", "--target", "v6e:1x1")
    prices = ("--price-per-chip-hour", "1", "--price-per-chip-hour", "2")
    heads = {"num_attention_heads": 2, "hidden_size": 16}
    assert main(["plan", model(**heads), *targets, *prices, "--search", "--json", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = [(plan["layout"]["tensor_parallel_size"], len(plan["stages"])) for plan in found["plans"]]
    assert sorted(sizes) == [(1, 1), (1, 1), (1, 2), (2, 1), (2, 2)]
    worth = [plan["estimate"]["tokens_per_dollar"] for plan in found["plans"]]
    assert worth == sorted(worth, reverse=True)
    [refused] = found["refused"]
    assert refused["layout"] == "v5e:2x2, tensor 4, expert 1, stages 1"
    assert "num_attention_heads=2: must be a multiple of tensor_parallel_size=4" in refused["reason"]

    assert main(["plan", model(**heads), *targets, "--search", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("target")
    assert "v5e:2x2, tensor 4, expert 1, stages 1: num_attention_heads=2" in printed


@pytest.mark.usefixtures("steps")
def test_a_search_says_how_far_it_is(
    model: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    @contextmanager
    def waiting(what: str, *, progress: bool) -> Iterator[None]:
        compiled.append(what)
        yield

    monkeypatch.setattr("jaxllm.plan.planner.waiting", waiting)
    small = [flag for flag in SMALL if flag != "--no-progress"]
    flags = ["--target", "v5e:1x1", "--target", "v6e:1x1", "--search", "--price-per-chip-hour", "1", "--json"]
    assert main(["plan", model(), *flags, *small]) == 0
    output = capsys.readouterr()
    assert len(json.loads(output.out)["plans"]) == 2
    first, second = (f"{n} of 2, v{n + 4}e:1x1, tensor 1, expert 1, stages 1: " for n in (1, 2))
    assert compiled == [
        f"{where}{step}" for where in (first, second) for step in ("prefill, 16 tokens", "decode, 8 tokens")
    ]
    for where, line in zip((first, second), output.err.splitlines()[-2:], strict=True):
        assert re.fullmatch(r"[\d,]+ output tokens/s, [\d,]+ a dollar", line.removeprefix(where)), line


@pytest.mark.usefixtures("steps")
def test_experts_are_tried_whole_where_the_config_leaves_their_number_out(
    model: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """So are data groups: those of one chip, and of two that cut experts or do not."""
    mixtral = model(architectures=["MixtralForCausalLM"], num_key_value_heads=4)
    assert main(["plan", mixtral, "--target", "v5e:2x2", "--search", *SMALL]) == 0
    assert len(re.findall(r"\d groups", capsys.readouterr().out)) == 3
    assert main(["plan", mixtral, "--target", "v5e:2x2", "--search", "--json", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    layouts = [plan["layout"] for plan in found["plans"]]
    assert 4 in [layout["expert_parallel_size"] for layout in layouts]
    sizes = ("data_parallel_size", "expert_parallel_size", "tensor_parallel_size")
    grouped = [tuple(map(layout.get, sizes)) for layout in layouts if layout["data_parallel_experts"]]
    assert sorted(grouped) == [(2, 1, 2), (2, 2, 1), (4, 1, 1)]
