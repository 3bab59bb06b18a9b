"""`python -m pallas_kernels`: check, bench and tune, with tiny sizes on the CPU."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.__main__ import main
from pallas_kernels.bench import Workload, measure
from pallas_kernels.ops import get_op, list_ops, runs_on
from pallas_kernels.paged_attention import HEAD_MAJOR, Backend
from pallas_kernels.paged_attention.backends import REGISTRY
from pallas_kernels.paged_attention.bench import DEFAULTS, make_pool, workloads
from pallas_kernels.paged_attention.layout import PageGeometry
from pallas_kernels.paged_attention.xla import BACKEND as XLA
from pallas_kernels.proven import compiled_for
from pallas_kernels.targets import proofs
from pallas_kernels.timing import Effort, Limits, time_step
from pallas_kernels.tuning import Tunable

QUICK = (
    "--repeats",
    "1",
    "--seconds",
    "0.001",
    "--copy-bytes",
    "65536",
    "--matmul-size",
    "64",
    "--layers",
    "1",
)
TINY = (*QUICK, "--op", "paged_attention", "--rows", "1,2", "--context", "32", "--chunk", "16")
EFFORT = Effort(1, 0.001)


@pytest.fixture
def register() -> Iterator[Any]:
    """Registers backends of attention for one test."""
    before = dict(REGISTRY._backends)
    yield REGISTRY.register
    REGISTRY._backends.clear()
    REGISTRY._backends.update(before)


def half(*args: Any, **options: Any) -> Any:
    """Attention that is wrong."""
    out, pages = XLA.attend(*args, **options)
    return out / 2, pages


def broken(*args: Any, **options: Any) -> Any:
    raise TypeError("no kernel here")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


class TestCheck:
    def test_counts(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, report = run_json(capsys, "check", "--op", "paged_attention", "--cases", "soft cap")
        found = {one["backend"]: one for one in report["backends"]}
        assert code == 0
        assert (found["xla"]["passed"], found["xla"]["failed"]) == (1, 0)
        assert found["xla"]["how"].startswith("run on")
        assert report["machine"]["jax"] == jax.__version__

    def test_failure(self, capsys: pytest.CaptureFixture[str], register: Any) -> None:
        register(dataclasses.replace(XLA, name="half", attend=half))
        assert main(["check", "--backend", "half", "--cases", "one decode row"]) == 1
        out = capsys.readouterr().out
        assert "half            0       0      1  run on cpu" in out
        assert "failed 'one decode row': AssertionError: output of token 0" in out

    def test_refusals_are_grouped(self, capsys: pytest.CaptureFixture[str], register: Any) -> None:
        def require(problem: Any) -> None:
            raise NotImplementedError("not today")

        register(Backend("never", XLA.attend, require=require))
        assert main(["check", "--backend", "never", "--cases", "head_dim 8*"]) == 1  # none passed
        assert "refused head_dim 80: not today" in capsys.readouterr().out

    def test_kernels_of_other_platforms_are_not_run_unless_asked_for(
        self, capsys: pytest.CaptureFixture[str], register: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        register(dataclasses.replace(XLA, name="moon", attend=broken, interpreted=XLA.attend))
        monkeypatch.setattr(REGISTRY, "order", {**REGISTRY.order, "moon": ("moon",)})
        arguments = ("check", "--op", "paged_attention", "--cases", "one decode row")
        _, report = run_json(capsys, *arguments)
        [moon] = [one for one in report["backends"] if one["backend"] == "moon"]
        assert (moon["how"], moon["reason"]) == (None, "not for cpu; --interpret interprets it")
        code, report = run_json(capsys, *arguments, "--backend", "moon")
        assert (code, report["backends"][0]["how"], report["backends"][0]["passed"]) == (0, "interpreted", 1)

    def test_compiled_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one = proofs.Proof(
            "paged_attention", "moon", "v5e:1x1", 1, "", "bfloat16", (), 1, None, 0, {}, 1.0, "moonc 1",
            "2026-11-23",
        )  # fmt: skip
        found = [one, dataclasses.replace(one, target="v5p:2x2x1"), dataclasses.replace(one, backend="sun")]
        monkeypatch.setattr("pallas_kernels.proven.read_proofs", lambda: found)
        lines = compiled_for("paged_attention", "moon")
        assert lines == ("compiled for v5e:1x1, v5p:2x2x1: 2 programs, moonc 1, 2026-11-23",)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--backend", "nobody"), "backend 'nobody': there is no such backend; there are cpu"),
            (("--op", "paged_attention", "--cases", "nothing"), "no case matches 'nothing'; there are one"),
            (("--cases", "nothing"), "no op has a case that matches 'nothing'"),
            (("--import", "no_such_module"), "No module named 'no_such_module'"),
        ],
    )
    def test_unknown_names(
        self, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
    ) -> None:
        assert main(["check", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_own_kernel(
        self,
        capsys: pytest.CaptureFixture[str],
        register: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "my_kernels_for_cli.py").write_text(
            "from pallas_kernels.paged_attention import register_backend\n"
            "from pallas_kernels.paged_attention.reference import BACKEND\n"
            "register_backend('mine', BACKEND.attend)\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
        code, report = run_json(
            capsys, "check", "--import", "my_kernels_for_cli", "--backend", "mine", "--cases", "first token"
        )
        assert (code, report["backends"][0]["passed"]) == (0, 1)


class TestBench:
    def test_attention(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        code, report = run_json(capsys, "bench", *TINY, "--backend", "xla", "--output", str(tmp_path))
        names = [one["workload"] for one in report["measurements"]]
        assert (code, names) == (0, ["decode 1 x 32", "decode 2 x 32", "prefill 16 to 32"])
        assert all(one["seconds"] > 0 and one["fraction"] > 0 for one in report["measurements"])
        assert json.loads((tmp_path / "kernels.json").read_text()) == report
        assert "| paged_attention | xla | decode 1 x 32 |" in (tmp_path / "kernels.md").read_text()

    @pytest.mark.parametrize("op", [op for op in list_ops() if op != "paged_attention"])
    def test_products(self, capsys: pytest.CaptureFixture[str], op: str) -> None:
        backend = "cpu" if op == "packed_matmul" else "xla"
        code, report = run_json(capsys, "bench", "--op", op, "--backend", backend, "--rows", "2", *QUICK)
        assert code == 0
        assert all(one["seconds"] > 0 for one in report["measurements"])

    def test_work_is_counted(self) -> None:
        options = dataclasses.replace(DEFAULTS["cpu"], rows=(2,), context=(64,), chunk=(4,))
        decode, prefill = workloads("cpu", "cpu", options)
        assert decode.flops == 2 * 64 * 4 * 9 * 64
        assert decode.nbytes == 2 * ((64 + 1) * 2 * 3 * 64 * 2 + 2 * 9 * 64 * 2)
        assert prefill.flops == (61 + 62 + 63 + 64) * 4 * 9 * 64
        window = dataclasses.replace(options, model="gemma-3-4b-local", context=(4096,))
        decode, prefill = workloads("cpu", "cpu", window)
        assert decode.flops == 2 * 1024 * 4 * 8 * 256
        assert prefill.flops == 4 * 1024 * 4 * 8 * 256

    def test_refusals_and_failures(self) -> None:
        [workload, *_] = workloads("cpu", "cpu", DEFAULTS["cpu"])
        limits = Limits(1e9, 1e9)
        one = measure(dataclasses.replace(workload, footprint=10**15), XLA, limits, EFFORT)
        assert (one.seconds, one.failed) == (None, False)
        assert "needs 1000000.0 GB" in one.reason
        one = measure(workload, dataclasses.replace(XLA, attend=broken), limits, EFFORT, 1)
        assert one.failed
        assert one.reason == "TypeError: no kernel here"

    def test_models_without_experts(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "--op", "grouped_matmul", "--model", "llama-3-8b", *QUICK]) == 2
        assert "llama-3-8b has no experts" in capsys.readouterr().err

    def test_pools_are_full_of_numbers(self) -> None:
        geometry = PageGeometry(3000, 16, 3, 64, jnp.dtype(jnp.bfloat16))  # more than the template
        pool = make_pool(HEAD_MAJOR, geometry, jax.random.key(0))
        assert pool.shape == HEAD_MAJOR.array(geometry).shape
        last = HEAD_MAJOR.unpack(pool[:, -2:], 3, 64)
        assert 0.9 < jnp.std(last.astype(jnp.float32)) < 1.1

    def test_steps_are_chained(self) -> None:
        seconds, count = time_step(lambda x: x + 1, jnp.int32(0), Effort(3, 0.001))
        assert seconds > 0
        assert count > 3


class Counted:
    """A tunable kernel: `wait` rounds of needless work, and wrong results with `shift`."""

    def bind(self, phase: str, blocks: dict[str, int]) -> Any:
        return partial(self._attend, blocks)

    def _attend(self, blocks: dict[str, int], *args: Any, **options: Any) -> Any:
        if blocks["shift"] == 2:
            raise NotImplementedError("too large")
        out, pages = XLA.attend(*args, **options)
        out = jax.lax.fori_loop(0, blocks["wait"], lambda i, x: jnp.sin(x) + x - jnp.sin(x), out)
        return (out * 2 if blocks["shift"] else out), pages


class TestTune:
    @pytest.fixture
    def tunable(self, register: Any) -> Tunable:
        kernel = Counted()
        names = {"wait": (1, 1000), "shift": (0, 1, 2)}
        tunable = Tunable(
            {"decode": names},
            lambda problem: {"heads": problem.heads, "dtype": str(problem.dtype)},
            kernel.bind,
        )
        slow = partial(kernel._attend, {"wait": 1000, "shift": 0})
        backend = dataclasses.replace(XLA, name="counted", attend=slow)
        object.__setattr__(backend, "tunable", tunable)
        register(backend)
        return tunable

    def test_finds_and_keeps(
        self,
        capsys: pytest.CaptureFixture[str],
        tunable: Tunable,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = tmp_path / "tuning.json"
        code, report = run_json(capsys, "tune", *TINY, "--backend", "counted", "--path", str(path))
        [found] = report["found"]
        assert (found["blocks"], found["wrong"], found["refused"]) == ({"wait": 1, "shift": 0}, 2, 2)
        assert found["gain"] > 1.02
        assert code == 1  # a candidate had another result
        [entry] = json.loads(path.read_text())["counted"][jax.devices()[0].device_kind]
        assert entry["key"] == {"phase": "decode", "heads": 9, "dtype": "bfloat16"}
        assert entry["measured"]["jax"] == jax.__version__

    def test_nothing_to_tune(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["tune", "--op", "paged_attention", "--backend", "xla"]) == 0
        assert "no backend for cpu has blocks to choose" in capsys.readouterr().err

    def test_fits(self, tunable: Tunable) -> None:
        small = dataclasses.replace(tunable, fits=lambda problem, phase, blocks: blocks["wait"] < 10)
        assert [blocks["shift"] for blocks in small.candidates(None, "decode")] == [0, 1, 2]
        assert list(small.candidates(None, "prefill")) == []


class TestTuningFile:
    KEY = {"phase": "decode", "head_dim": 64}  # noqa: RUF012
    ALLOWED = {"pages": (1, 2, 4)}  # noqa: RUF012

    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        (tmp_path / "op").mkdir()
        monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
        tuning._read.cache_clear()
        yield tmp_path / "op" / "tuning.json"
        tuning._read.cache_clear()

    def lookup(self, key: Any = KEY) -> Any:
        return tuning.lookup("op", "tpu", "TPU v9", key, self.ALLOWED)

    def test_round_trip(self, path: Path) -> None:
        assert self.lookup() is None
        tuning.save(path, "tpu", "TPU v9", self.KEY, {"pages": 4}, {"gain": 1.5})
        assert self.lookup() == {"pages": 4}
        tuning.save(path, "tpu", "TPU v9", self.KEY, {"pages": 2}, {})
        assert self.lookup() == {"pages": 2}
        assert self.lookup({**self.KEY, "head_dim": 128}) is None
        assert self.lookup({"phase": "decode"}) is None
        assert tuning.lookup("op", "tpu", "TPU v8", self.KEY, self.ALLOWED) is None

    @pytest.mark.parametrize(
        ("blocks", "message"),
        [
            ({"pages": 3}, "pages=3: may be 1, 2, 4"),
            ({"pages": 4, "stages": 2}, "blocks are pages; found are pages, stages"),
            ({}, "blocks are pages; found are "),
        ],
    )
    def test_blocks_that_no_kernel_knows(self, path: Path, blocks: dict[str, int], message: str) -> None:
        tuning.save(path, "tpu", "TPU v9", self.KEY, blocks, {})
        with pytest.raises(ValueError, match=message):
            self.lookup()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([], "must be an object"),
            ({"tpu": {"TPU v9": {}}}, "must be a list"),
            ({"tpu": {"TPU v9": [{"key": {}}]}}, "an entry has blocks, key, measured, not"),
            (
                {"tpu": {"TPU v9": [{"key": {}, "blocks": {"pages": 1.5}, "measured": {}}]}},
                "blocks: pages=1.5 is of the wrong type",
            ),
        ],
    )
    def test_other_forms(self, path: Path, content: Any, message: str) -> None:
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            self.lookup()


def test_ops() -> None:
    assert "paged_attention" in list_ops()
    for name in list_ops():
        op = get_op(name)
        assert json.loads(tuning.default_path(name).read_text()) is not None
        assert runs_on(op, "xla", "gpu")
        for platform in ("cpu", "gpu", "tpu"):
            options = dataclasses.replace(DEFAULTS[platform], model=None)
            assert all(isinstance(one, Workload) for one in op.workloads(platform, "some", options))
    with pytest.raises(ValueError, match="there is no such op; there are grouped_matmul"):
        get_op("convolution")
