"""Experts on their way to devices that have less to do."""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Array, Int, Int32

from jaxllm.runner.runner import DispatchedStep, Runner


class ExpertBalancer:
    """Counts the tokens that go to each expert, and every so many steps places experts anew by them.

    A round takes as many steps as there are layers with experts: each is placed before a step, which waits
    for its weights to move, and which has memory for those of one layer twice. Without such layers, that is
    where `enable_eplb` is off, this passes counts on and does nothing else.

    Args:
        interval: steps from one round to the next; 0: there is none.
        report: `count` returns what it finds.
    """

    def __init__(self, runner: Runner, *, interval: int, report: bool) -> None:
        self._runner = runner
        self._interval = interval
        self._report = report
        self.is_active = bool(runner.placements)
        """Whether there are experts that can move."""
        self.rounds = 0
        """After which at least one layer was placed anew."""
        self.imbalance_before = 0.0
        """`imbalance` of the time before the last round; 0 while there was none."""
        self._steps = 0
        self._tokens: dict[int, Int[np.ndarray, "layers experts"]] = {}
        self._device_tokens: dict[int, Int[np.ndarray, "layers devices"]] = {}
        """Of each stage, since the last round."""
        self._waiting: deque[tuple[int, int, Int[np.ndarray, " experts"]]] = deque()
        """Stage and number of each layer that the round has not come to, and its tokens."""
        self._moved = False

    @property
    def imbalance(self) -> float:
        """Tokens of the fullest device by those of the mean one, since the last round.

        Of each layer the fullest, all layers together: devices wait for each other in each layer. At best 1;
        0 before the first token.
        """
        counts = list(self._device_tokens.values())
        mean = sum(tokens.mean(axis=1).sum() for tokens in counts)
        return float(sum(tokens.max(axis=1).sum() for tokens in counts) / mean) if mean else 0.0

    def count(self, step: DispatchedStep) -> Sequence[Int32[Array | np.ndarray, "layers experts"]]:
        """Takes what a step has counted, which it waits for.

        Returns:
            The tokens of each expert, its copies together, of each stage that counts them; or nothing.
        """
        if not self.is_active:
            return step.expert_load
        self._steps += 1
        found = []
        stages = self._runner.placements.items()
        for (stage, placed), own, load in zip(stages, step.placements, step.expert_load, strict=True):
            tokens = np.asarray(load).astype(np.int64)
            found.append(own.of_experts(tokens))
            self._tokens[stage] = self._tokens.get(stage, 0) + found[-1]
            if own is placed:  # steps in flight may have run with an earlier placement
                self._device_tokens[stage] = self._device_tokens.get(stage, 0) + own.of_devices(tokens)
        return found if self._report else ()

    def advance(self) -> None:
        """Before a step: places the round's next layer, or begins a round if it is time."""
        if not self._waiting:
            due = self._interval and self._steps >= self._interval
            if not due or not self._runner.can_move_experts():
                return
            self._begin_round()
        stage, layer, tokens = self._waiting[0]
        before = self._runner.placements[stage]
        after = before.rebalanced(layer, tokens.astype(np.float64))
        if after is not before:
            self._runner.move_experts(stage, layer, after.experts[layer])
            self._moved = True
        self._waiting.popleft()
        if not self._waiting:
            self._end_round()

    def abandon_round(self) -> None:
        """After a step has failed: that may have been a move's fault, so the next is tried in another round.

        Where experts are may have changed, so what devices have had does not count any more.
        """
        if self._waiting:
            self._waiting.clear()
            self._end_round()
        self._device_tokens.clear()

    def _begin_round(self) -> None:
        self.imbalance_before, self._moved = self.imbalance, False
        self._waiting.extend(
            (stage, layer, own) for stage, tokens in self._tokens.items() for layer, own in enumerate(tokens)
        )

    def _end_round(self) -> None:
        self.rounds += self._moved
        self._steps = 0
        self._tokens.clear()
        self._device_tokens.clear()


def balance_figures(balancers: Iterable[ExpertBalancer]) -> dict[str, float]:
    """Under the names of `Engine.get_metrics`; of several replicas those of the least even one."""
    active = [balancer for balancer in balancers if balancer.is_active]
    if not active:
        return {}
    return {
        "expert_rebalances_total": float(sum(balancer.rounds for balancer in active)),
        "expert_imbalance": max(balancer.imbalance for balancer in active),
        "expert_imbalance_before": max(balancer.imbalance_before for balancer in active),
    }
