"""Random histories: whatever comes, goes, is aborted or preempted, every invariant holds after every step."""

import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulation import VOCABULARY, Clients, Setup, Simulation, random_history

from jaxllm.scheduler import Request, StepPlan

SETUPS = {
    "plain": Setup(),
    "tiny pool": Setup(num_pages=17, max_num_seqs=6),
    "mixed groups": Setup(windows=(None, 7, 7, 16), num_pages=90, max_num_seqs=5),
    "mixed groups, tiny pool": Setup(windows=(None, 5, 9), num_pages=30, max_num_seqs=6),
    "sliding only": Setup(windows=(8,), num_pages=14, max_num_seqs=6),
    "whole prompts": Setup(chunked=False, budget=40, num_pages=30),
    "whole prompts, mixed groups": Setup(windows=(None, 6), chunked=False, budget=40, num_pages=40),
    "no prefix cache": Setup(caching=False, num_pages=20),
    "priority": Setup(policy="priority", windows=(None, 7), num_pages=34, max_num_seqs=6),
    "two stages": Setup(num_stages=2, windows=(None, 7), num_pages=60, max_num_seqs=6),
    "three stages, tiny pool": Setup(num_stages=3, num_pages=17, max_num_seqs=6),
    "pages of one token": Setup(page_size=1, windows=(None, 3), num_pages=100),
}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("name", SETUPS)
def test_invariants_hold_through_random_histories(name: str, depth: int) -> None:
    """30 histories of 150 steps."""
    simulation = Simulation(replace(SETUPS[name], depth=depth))
    clients = Clients(random.Random(f"{name} {depth}"), longest_prompt=40, longest_output=20)
    random_history(simulation, clients, num_steps=150, load=8)
    stats = simulation.scheduler.stats()
    # The history was one that could show something: requests were done, preempted, and shared prefixes.
    assert len(simulation.done) > 20
    assert stats.num_preemptions > 0 or "tiny" not in name
    assert (stats.cache.prefix_hits > 0) == simulation.setup.caching


def test_invariants_hold_through_a_long_history() -> None:
    """One history of 10,000 steps, with all that can be on at once."""
    setup = Setup(windows=(None, 7, 12), num_pages=60, max_num_seqs=6, policy="priority", depth=1)
    simulation = Simulation(setup)
    clients = Clients(random.Random(0), longest_prompt=30, longest_output=20)
    random_history(simulation, clients, num_steps=10_000, load=8)
    assert simulation.scheduler.stats().num_preemptions > 100


def test_the_same_history_gives_the_same_plans() -> None:
    def plans() -> list[StepPlan]:
        simulation = Simulation(SETUPS["mixed groups, tiny pool"])
        clients = Clients(random.Random(0), longest_prompt=40, longest_output=20)
        made: list[StepPlan] = []
        schedule = simulation.scheduler.schedule
        simulation.scheduler.schedule = lambda: made.append(schedule()) or made[-1]
        random_history(simulation, clients, num_steps=100, load=8)
        return made

    assert plans() == plans()


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    page_size = draw(st.sampled_from([1, 2, 4]))
    windows = draw(st.lists(st.sampled_from([None, None, 1, 3, 4, 5, 9]), min_size=1, max_size=3))
    return Setup(
        windows=tuple(windows),
        page_size=page_size,
        num_pages=draw(st.integers(2, 40)),
        max_num_seqs=draw(st.integers(1, 4)),
        budget=draw(st.integers(1, 12)),
        max_model_len=draw(st.integers(2, 30)),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        chunked=draw(st.booleans()),
        caching=draw(st.booleans()),
        depth=draw(st.integers(0, 2)),
    )


class Histories(RuleBasedStateMachine):
    """Histories that hypothesis makes up, and makes short when one fails."""

    @initialize(setup=setups())
    def start(self, setup: Setup) -> None:
        self.simulation = Simulation(setup)
        self.num_made = 0

    @rule(
        text=st.integers(0, 1),
        length=st.integers(1, 16),
        tail=st.lists(st.integers(0, VOCABULARY - 2), max_size=3),
        max_tokens=st.integers(1, 10),
        priority=st.integers(0, 1),
        salt=st.sampled_from([None, None, "", "tenant"]),
        skip=st.booleans(),
    )
    def add(
        self,
        text: int,
        length: int,
        tail: list[int],
        max_tokens: int,
        priority: int,
        salt: str | None,
        skip: bool,
    ) -> None:
        self.num_made += 1
        prompt = [text] * length + tail
        self.simulation.add(Request(str(self.num_made), prompt, max_tokens, priority, salt, skip))

    @rule()
    def step(self) -> None:
        self.simulation.step()

    @rule(count=st.integers(2, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.abort(data.draw(st.sampled_from(list(self.simulation.live))))

    @rule()
    def reset_prefix_cache(self) -> None:
        cache = self.simulation.cache
        idle = cache.pool.num_used == 0
        assert self.simulation.scheduler.reset_prefix_cache() == idle
        assert cache.pool.num_cached == 0 or not idle

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
