"""A scheduler driven against a fake device, with everything checked after every step.

The device has no numbers. Each slot of a page holds which token of which text was written there, the text
being named by a running hash of all its tokens: so a wrong, stale or wrongly shared page shows at the first
step that attends to it. What it samples is a function of the text alone, so all outputs are known before.
"""

import random
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise, repeat

from jaxllm.cache.groups import GroupSpec
from jaxllm.cache.manager import CacheManager
from jaxllm.cache.pages import NULL_PAGE
from jaxllm.config import Policy
from jaxllm.scheduler import Request, RequestStatus, RowPlan, Scheduler, StepPlan

VOCABULARY = 5
STOP_TOKEN = 4


def text_hashes(tokens: list[int], salt: str | None) -> list[int]:
    """For each token a hash of the salt and all tokens up to it."""
    state, hashes = zlib.crc32(repr(salt).encode()), []
    for token in tokens:
        state = hash((state, token))
        hashes.append(state)
    return hashes


def sample(text_hash: int) -> int:
    """The token that follows a text. Every 20th is the stop token."""
    drawn = zlib.crc32(text_hash.to_bytes(8, "little", signed=True))
    return STOP_TOKEN if drawn % 20 == 0 else drawn % (VOCABULARY - 1)


def expected_output(request: Request) -> list[int]:
    """What a request that runs alone, with nothing cached, gives."""
    state, output = text_hashes(list(request.prompt_token_ids), request.cache_salt)[-1], []
    while len(output) < request.max_tokens and STOP_TOKEN not in output:
        output.append(sample(state))
        state = hash((state, output[-1]))
    return output


@dataclass
class Row:
    """What the device keeps of a request."""

    salt: str | None
    tokens: list[int]
    tables: list[list[int]]
    hashes: list[int] = field(default_factory=list)
    num_computed: int | None = None
    """None until its first step says how much a cached prefix holds."""


class Device:
    """Rows, page tables and pages, changed by plans alone."""

    def __init__(self, groups: tuple[GroupSpec, ...], page_size: int) -> None:
        self.groups, self.page_size = groups, page_size
        self.rows: dict[int, Row] = {}
        self.slots: dict[tuple[int, int], tuple[int, int, int]] = {}

    def load(self, request: Request) -> None:
        """Uploads the tokens that the host knows of a request that was given a row."""
        assert request.row is not None
        self.rows[request.row] = Row(request.cache_salt, list(request.token_ids), [[] for _ in self.groups])

    def run(self, plan: StepPlan) -> list[list[int]]:
        """Runs a step: all rows write, then all rows read."""
        for update in plan.page_updates:
            table = self.rows[update.row].tables[update.group]
            assert len(table) == update.index, "updates append"
            table.extend(update.pages)
        written: Counter[tuple[int, int]] = Counter()
        for row in plan.rows:
            self._write(row, written)
        assert not [slot for slot, times in written.items() if times > 1], "one token a slot"
        return [self._read(row) for row in plan.rows]

    def _write(self, plan: RowPlan, written: Counter[tuple[int, int]]) -> None:
        row = self.rows[plan.row]
        if row.num_computed is None:
            row.num_computed = plan.start
            row.hashes = text_hashes(row.tokens, row.salt)
        assert plan.start == row.num_computed, "every token is computed once, in order"
        row.num_computed = plan.start + plan.num_tokens
        assert row.num_computed <= len(row.tokens), "only known tokens are computed"
        assert plan.samples == (row.num_computed == len(row.tokens)), "the newest token gives the next"
        for group, table in enumerate(row.tables):
            for position in range(plan.start, row.num_computed):
                slot = self._slot(table, position)
                written[slot] += 1
                self.slots[slot] = (group, position, row.hashes[position])

    def _read(self, plan: RowPlan) -> list[int]:
        row = self.rows[plan.row]
        end = plan.start + plan.num_tokens
        for group, (spec, table) in enumerate(zip(self.groups, row.tables, strict=True)):
            first = 0 if spec.window is None else max(0, plan.start - spec.window + 1)
            held = [self.slots.get(self._slot(table, position)) for position in range(first, end)]
            assert held == list(zip(repeat(group), range(first, end), row.hashes[first:end], strict=False))
        if not plan.samples:
            return []
        token = sample(row.hashes[-1])
        row.tokens.append(token)
        row.hashes.append(hash((row.hashes[-1], token)))
        return [token]

    def _slot(self, table: list[int], position: int) -> tuple[int, int]:
        page = table[position // self.page_size]
        assert page != NULL_PAGE, "a page that is written or attended to is there"
        return page, position % self.page_size


@dataclass(frozen=True)
class Setup:
    """What one history runs with."""

    windows: tuple[int | None, ...] = (None,)
    page_size: int = 4
    num_pages: int = 40
    max_num_seqs: int = 4
    budget: int = 16
    max_model_len: int = 64
    policy: Policy = "fcfs"
    chunked: bool = True
    caching: bool = True
    depth: int = 0
    num_stages: int = 1


class Simulation:
    """The engine's loop, in the small. At depth 0 each step is read before the next is planned."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.groups = tuple(GroupSpec(window, (layer,)) for layer, window in enumerate(setup.windows))
        self.cache = CacheManager(
            self.groups,
            num_pages=setup.num_pages,
            page_size=setup.page_size,
            enable_prefix_caching=setup.caching,
        )
        self.scheduler = Scheduler(
            self.cache,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.budget,
            max_model_len=setup.max_model_len,
            policy=setup.policy,
            enable_chunked_prefill=setup.chunked,
            num_stages=setup.num_stages,
        )
        self.device = Device(self.groups, setup.page_size)
        self.pending: deque[tuple[StepPlan, list[list[int]]]] = deque()
        self.snapshots: dict[tuple[int, int], list[list[int]]] = {}
        self.live: dict[str, Request] = {}
        self.done: list[Request] = []
        self.num_steps = 0
        self.num_refused = 0
        self.worst_waste = 0.0

    # What a client and the engine do

    def add(self, request: Request) -> bool:
        """Adds a request if it can ever fit."""
        try:
            self.scheduler.add(request)
        except ValueError:
            self.num_refused += 1
            return False
        self.live[request.request_id] = request
        return True

    def abort(self, request_id: str) -> None:
        request = self.scheduler.finish(request_id, RequestStatus.FINISHED_ABORTED)
        assert request is not None
        assert request is self.live[request_id]
        self._retire(request)
        self.check()

    def step(self) -> None:
        """Plans and dispatches a step, then reads steps until as many are in flight as the depth allows."""
        plan = self.scheduler.schedule()
        self.num_steps += 1
        self.check_plan(plan)
        self.check()
        if plan.rows:
            for request_id in plan.admitted:
                self.device.load(self.live[request_id])
            self.pending.append((plan, self.device.run(plan)))
            self.check_device_tables()
        else:
            assert not plan.admitted
            assert self.pending or not self.scheduler.has_unfinished, "with nothing in flight there is work"
        while len(self.pending) > (self.setup.depth if plan.rows else 0):
            self._read_step()

    def _read_step(self) -> None:
        plan, tokens = self.pending.popleft()
        for request, new in self.scheduler.complete(plan, tokens):
            assert self.live[request.request_id] is request
            if STOP_TOKEN in new:
                self.scheduler.finish(request.request_id, RequestStatus.FINISHED_STOPPED)
            if request.request_id not in self.scheduler.requests:
                self._retire(request)
        self.check()

    def _retire(self, request: Request) -> None:
        del self.live[request.request_id]
        self.done.append(request)
        output, expected = request.output_token_ids, expected_output(request)
        if request.status is RequestStatus.FINISHED_ABORTED:
            assert output == expected[: len(output)]
        else:
            assert output == expected

    def drain(self) -> None:
        """Steps until all requests are done, which must not take more steps than they have tokens."""
        waiting_tokens = sum(len(r.prompt_token_ids) + r.max_tokens for r in self.live.values())
        limit = self.num_steps + 10 + 20 * waiting_tokens
        while self.scheduler.has_unfinished:
            self.step()
            assert self.num_steps < limit, "requests do not finish"
        while self.pending:
            self._read_step()
        assert not self.live
        assert self.cache.pool.num_used == 0
        self.check()

    # What must be true

    def _order(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.setup.policy == "priority" else 0, request.arrival)

    def check_plan(self, plan: StepPlan) -> None:
        """The plan keeps the limits, and the policy's order in whom it admits and preempts."""
        assert plan.num_tokens <= self.setup.budget
        assert len(plan.rows) <= self.setup.max_num_seqs
        assert len({row.row for row in plan.rows}) == len(plan.rows)
        lengths = [row.num_tokens for row in plan.rows]
        assert all(n == 1 for n in lengths[: plan.num_decode_rows])
        assert all(n > 1 for n in lengths[plan.num_decode_rows :])
        assert not (plan.admitted and plan.preempted)
        waiting = [r for r in self.live.values() if r.status is RequestStatus.WAITING]
        admitted = [self.live[request_id] for request_id in plan.admitted]
        assert all(self._order(a) < self._order(w) for a in admitted for w in waiting)
        preempted = [self.live[request_id] for request_id in plan.preempted]
        assert all(self._order(p) > self._order(r) for p in preempted for r in self.scheduler.running)
        if not self.setup.chunked:
            for row in plan.rows:
                request = self.live[row.request_id]
                whole = row.start + row.num_tokens >= len(request.prompt_token_ids)
                assert whole or request.num_preemptions, "prompts are not cut"

    def check(self) -> None:
        """Pages, references, tables and rows agree with each other."""
        pool, running = self.cache.pool, self.scheduler.running
        assert pool.num_free + pool.num_cached + pool.num_used == self.setup.num_pages - 1
        held: Counter[int] = Counter()
        places: set[tuple[int, int, int]] = set()
        for request in running:
            for group, table in enumerate(request.tables.groups):
                held.update(table)
                places.update(zip(table, repeat(group), range(len(table)), strict=False))
        held.pop(NULL_PAGE, None)
        assert sum(page != NULL_PAGE for page, _, _ in places) == len(held), (
            "a page has one place in all tables"
        )
        for page, count in held.items():
            assert pool.references(page) == count
            assert count == 1 or pool.key(page) is not None, "only pages that can be found are shared"
        assert len(held) == pool.num_used, "what no table holds is free or cached"
        self.check_requests()
        for request in running:
            self.check_tables(request)
        self.snapshots = {(r.arrival, r.num_preemptions): [list(t) for t in r.tables.groups] for r in running}

    def check_requests(self) -> None:
        scheduler = self.scheduler
        assert all(self._order(a) < self._order(b) for a, b in pairwise(scheduler.running))
        assert len({r.row for r in scheduler.running}) == len(scheduler.running) <= self.setup.max_num_seqs
        assert scheduler.num_running + scheduler.num_waiting == len(scheduler.requests)
        for request in scheduler.requests.values():
            if request.status is RequestStatus.WAITING:
                assert request.row is None
                assert request.tables.num_columns == 0
                assert request.num_computed_tokens == 0
            else:
                assert request.status is RequestStatus.RUNNING
                assert 0 < request.num_computed_tokens <= request.num_known_tokens
                sampled = len(request.output_token_ids) + request.num_in_flight
                assert sampled <= request.max_tokens

    def check_tables(self, request: Request) -> None:
        """Tables hold what is computed and no page more, and have only grown since they were last seen."""
        columns = self.cache.num_columns(request.num_computed_tokens)
        before = self.snapshots.get((request.arrival, request.num_preemptions), [[] for _ in self.groups])
        for spec, table, old in zip(self.groups, request.tables.groups, before, strict=True):
            assert len(table) == columns
            if spec.window is None:
                assert table[: len(old)] == old
            else:
                assert all(now in (then, NULL_PAGE) for now, then in zip(table, old, strict=False))
                # The window of the first query of the last step, and that step's tokens.
                most = (spec.window + self.setup.budget) // self.setup.page_size + 2
                assert len(table) - table.count(NULL_PAGE) <= most

    def check_device_tables(self) -> None:
        """The device's tables are the host's, but for leading pages that windows have left."""
        for request in self.scheduler.running:
            assert request.row is not None
            tables = self.device.rows[request.row].tables
            for table, device_table in zip(request.tables.groups, tables, strict=True):
                left = table.count(NULL_PAGE)
                assert table[left:] == device_table[left:]


class Clients:
    """Random requests whose prompts often begin the same."""

    def __init__(self, rng: random.Random, longest_prompt: int, longest_output: int) -> None:
        self.rng = rng
        self.longest_prompt, self.longest_output = longest_prompt, longest_output
        self.num_made = 0
        self.texts = [self._tokens(longest_prompt) for _ in range(3)]

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCABULARY - 1) for _ in range(count)]

    def request(self) -> Request:
        rng = self.rng
        prompt = rng.choice(self.texts)[: rng.randint(1, self.longest_prompt)]
        if rng.random() < 0.7:
            prompt = (prompt + self._tokens(rng.randint(1, 8)))[-self.longest_prompt :]
        self.num_made += 1
        return Request(
            f"request-{self.num_made}",
            prompt,
            rng.randint(1, self.longest_output),
            priority=rng.randint(-1, 1),
            cache_salt=rng.choice([None, None, None, "tenant"]),
            skip_prefix_cache=rng.random() < 0.1,
        )


def random_history(simulation: Simulation, clients: Clients, num_steps: int, load: int) -> None:
    """Steps while requests come, at most `load` at a time, and some are aborted; then lets all finish."""
    rng = clients.rng
    while simulation.num_steps < num_steps:
        while len(simulation.live) < load and rng.random() < 0.5:
            simulation.add(clients.request())
        if simulation.live and rng.random() < 0.02:
            simulation.abort(rng.choice(list(simulation.live)))
        if rng.random() < 0.01:
            simulation.scheduler.reset_prefix_cache()
        simulation.step()
    simulation.drain()
