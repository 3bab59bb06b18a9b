"""Plans as text for a terminal."""

from collections.abc import Collection, Sequence

from jaxllm.plan.plan import Plan
from jaxllm.plan.search import Search
from pallas_kernels.targets.compiled import Traffic

NOTE = (
    "At best, by the rates that vendors state (roofline): nothing was run, and real figures are lower.\n"
    "Memory, products and collectives are read from the compiled programs."
)

COLUMNS = (
    "target", "tensor", "expert", "stages", "replicas", "weights", "requests", "TTFT", "TPOT", "tokens/s",
    "tokens/$",
)  # fmt: skip


def plan_table(plan: Plan) -> str:
    """Memory of a chip, a step's work, and what that gives."""
    stages = [_stages(plan)] if len(plan.stages) > 1 else []
    parts = [_title(plan), *stages, _memory(plan), _steps(plan), _estimate(plan), NOTE]
    if note := _extrapolated(plan):
        parts.append(note)
    return "\n\n".join(parts)


def search_table(found: Search) -> str:
    """A line for each layout, best first, and the reasons against those left out."""
    rows = [_search_row(plan) for plan in found.plans]
    lines = [_aligned([COLUMNS, *rows])]
    lines += [f"{one.layout}: {one.reason}" for one in found.refusals]
    lines.append(NOTE)
    if note := next(filter(None, map(_extrapolated, found.plans)), None):
        lines.append(note)
    return "\n".join(lines)


def _search_row(plan: Plan) -> list[str]:
    layout, found = plan.layout, plan.estimate
    return [
        str(layout.target),
        str(layout.tensor_parallel_size),
        str(layout.expert_parallel_size),
        str(layout.pipeline_parallel_size),
        f"{layout.data_parallel_size}{' groups' if layout.data_parallel_experts else ''}",
        _size(plan.memory.weights),
        str(found.requests * layout.data_parallel_size),
        _time(found.ttft_seconds),
        _time(found.tpot_seconds),
        f"{found.output_tokens_per_second:,.0f}",
        "-" if found.tokens_per_dollar is None else f"{found.tokens_per_dollar:,.0f}",
    ]


def _title(plan: Plan) -> str:
    each = "" if plan.layout.data_parallel_experts else " a replica"
    return (
        f"{plan.model} on {plan.layout}\n"
        f"{plan.dtype}, {plan.num_layers} layers, {_size(plan.weight_bytes)} of weights{each}, attention "
        f"backend {plan.attention_backend!r}, max_model_len={plan.max_model_len}"
    )


def _stages(plan: Plan) -> str:
    """A line for each; what it sends on is on its way while it works on the next step."""
    times = zip(plan.stages, plan.estimate.prefill, plan.estimate.decode, strict=True)
    rows = [
        [
            f"stage {index}",
            f"{stage.layers[0]} to {stage.layers[1] - 1}",
            _size(stage.memory.weights),
            _size(stage.memory.unused),
            _time(prefill.total),
            _time(decode.total),
            f"{_size(stage.prefill.sent)} in {_time(prefill.transfer)}",
            f"{_size(stage.decode.sent)} in {_time(decode.transfer)}",
        ]
        for index, (stage, prefill, decode) in enumerate(times)
    ]
    head = ["", "layers", "weights", "unused", "prefill", "decode", "sent on: prefill", "decode"]
    return _aligned([head, *rows])


def _memory(plan: Plan) -> str:
    memory = plan.memory
    groups = plan.layout.num_groups
    pages = f"{memory.num_pages:,} of {memory.page_size} tokens"
    if groups > 1:
        pages += f" in each group, {groups * memory.num_pages:,} in all"
    code = f"code of all programs takes {_size(memory.code)} of it" if memory.code else "code is not told"
    if not memory.code_fits:
        code = f"code of all programs needs {_size(memory.code)}: lower memory_utilization"
    rows = [
        ["weights", _size(memory.weights), ""],
        ["rows", _size(memory.rows), ""],
        ["temporaries", _size(memory.temporaries), ""],
        ["pages", _size(memory.pages), pages],
        ["unused", _size(memory.unused), code],
    ]
    lengths = (
        f"pages hold {plan.full_requests:,} requests of {plan.max_model_len:,} tokens, or "
        f"{plan.workload_requests:,} of {plan.workload.length:,}, {_on_each(plan)}"
    )
    if groups > 1:
        lengths += (
            f"; those of all {groups} hold {groups * plan.full_requests:,}, or "
            f"{groups * plan.workload_requests:,}"
        )
    where = f"of stage {plan.fullest}, the fullest" if len(plan.stages) > 1 else ""
    head = f"a chip's memory{where and ' '}{where}, {_size(memory.usable)}"
    return f"{head}\n{_indented(_aligned(rows, words=(0, 2)))}\n{lengths}"


def _steps(plan: Plan) -> str:
    stage = plan.stages[plan.slowest]
    steps = (stage.prefill, stage.decode)
    head = [
        "a step on each chip" + (f" of stage {plan.slowest}, the slowest" if len(plan.stages) > 1 else ""),
        *(f"{name} {step.tokens}" for name, step in zip(("prefill", "decode"), steps, strict=True)),
    ]
    rows = [
        ["products", *(_flops(step.flops) for step in steps)],
        ["memory traffic", *(_size(step.nbytes) for step in steps)],
    ]
    for name, sent in (
        ("", [step.collectives for step in steps]),
        (" between groups", [step.between_groups for step in steps]),
    ):
        for kind in sorted({kind for own in sent for kind in own}):
            rows.append([kind + name, *(_traffic(own.get(kind)) for own in sent)])
    times = (plan.estimate.prefill[plan.slowest], plan.estimate.decode[plan.slowest])
    for name in ("products", "kernels", "collectives", "sampling"):
        rows.append([f"time: {name}", *(_time(getattr(time, name)) for time in times)])
    rows.append(["compiled in", *(f"{step.compile_seconds:.0f} s" for step in steps)])
    return _aligned([head, *([f"  {name}", *cells] for name, *cells in rows)])


def _estimate(plan: Plan) -> str:
    found, workload = plan.estimate, plan.workload
    alone, requests, all_of_them = "of an idle replica", f"{found.requests} requests", "of all replicas"
    if (groups := plan.layout.num_groups) > 1:
        alone, all_of_them = "of idle groups, a prompt in each", "of all groups"
        requests = f"{groups * found.requests} requests, {found.requests}"
    rows = [
        ["time to first token", _time(found.ttft_seconds), alone],
        ["time per output token", _time(found.tpot_seconds), f"{requests} {_on_each(plan)}"],
        ["output tokens/s", f"{found.output_tokens_per_second:,.0f}", f"{all_of_them}, prompts included"],
    ]
    if len(plan.stages) > 1:
        rows.insert(2, ["bubble", f"{found.bubble:.0%}", "of it the stages wait for each other"])
    if found.tokens_per_dollar is not None:
        rows.append(["output tokens per dollar", f"{found.tokens_per_dollar:,.0f}", ""])
    head = f"estimate for prompts of {workload.input_len} and outputs of {workload.output_len} tokens"
    return f"{head}\n{_indented(_aligned(rows, words=(0, 2)))}"


def _on_each(plan: Plan) -> str:
    return "in each data group" if plan.layout.data_parallel_experts else "on each replica"


def _extrapolated(plan: Plan) -> str | None:
    if not plan.extrapolated:
        return None
    counts = " and ".join(map(str, plan.compiled_layers))
    what = "models" if len(plan.stages) == 1 else "stages"
    return f"Steps are extrapolated from {what} of {counts} of the {plan.num_layers} layers (--few-layers)."


def _traffic(traffic: Traffic | None) -> str:
    return "-" if traffic is None else f"{traffic.count} of {_size(traffic.nbytes / max(1, traffic.count))}"


def _aligned(rows: Sequence[Sequence[str]], *, words: Collection[int] = (0,)) -> str:
    """Columns as wide as they must be; those of `words` begin at the left, others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in words else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))


def _size(nbytes: float) -> str:
    """In the unit that leaves few digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}" if nbytes < 100 * size else f"{nbytes / size:.0f} {unit}"
    return f"{nbytes / 1e3:.0f} KB"


def _flops(count: float) -> str:
    return f"{count / 1e12:.2f} TFLOP" if count >= 1e11 else f"{count / 1e9:.2f} GFLOP"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"
