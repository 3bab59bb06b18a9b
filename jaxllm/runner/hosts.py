"""A runner on several hosts: host 0 tells the others what it does, before it does it, and they do the same.

The programs run on all hosts' devices at once, or on those of a stage's hosts, so every host has to start its
own ones in the same order.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxllm.models.abstract import Parameter
from jaxllm.parallel.channel import Message
from jaxllm.parallel.hosts import HostGroup, HostLostError
from jaxllm.parallel.stage_hosts import StageHosts
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.calls import dispatch_message, read_dispatch, read_sample, sample_message
from jaxllm.runner.far_stages import REASON_SECONDS, FarStages
from jaxllm.runner.link import Link, LinkLowering
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.programs import Programs
from jaxllm.runner.runner import Admission, BegunStep, DispatchedStep, LoadWeights, Runner, Tokens
from jaxllm.runner.stage import RowMasks, StageRunner
from jaxllm.runner.step import Logprobs
from jaxllm.scheduler.plan import StepPlan

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.0002
"""How often it is looked whether a step is done, so that one that a lost host holds up can be given up."""
OF_A_STEP = ("sample", "logprobs", "score")
"""Messages about the step that has begun last."""


def check_hosts(mesh: Mesh) -> None:
    """Raises ValueError if a host has no device in the mesh."""
    there = {device.process_index for device in mesh.devices.flat}
    missing = sorted(set(range(jax.process_count())) - there)
    if missing:
        raise ValueError(
            f"tensor_parallel_size * expert_parallel_size={mesh.size}: of {jax.device_count()} devices none "
            f"on host {', '.join(map(str, missing))} would be used; raise one of them, or leave that host out"
        )


def find_far_stages(
    hosts: HostGroup, where: StageHosts, links: Sequence[LinkLowering], programs: Programs
) -> FarStages | None:
    """What this host has to do with stages on others; None where all hosts have a part of each.

    Args:
        links: what `find_links` gives.
    """
    if not where.are_several:
        return None
    made = {link.receives: Link(link, programs) for link in links}
    return FarStages(hosts, where.reporter, entry=made.get(True), exit=made.get(False))


def find_links(stages: Sequence[Lowering], meshes: Sequence[Mesh]) -> list[LinkLowering]:
    """Those between this host's stages and others'.

    Args:
        stages: on this host.
        meshes: of all stages.
    """
    first, last, found = stages[0], stages[-1], []
    if first.comes_from_host:
        found.append(LinkLowering(first, meshes[first.stage.index - 1], receives=True))
    if last.goes_to_host:
        found.append(LinkLowering(last, meshes[last.stage.index + 1], receives=False))
    return found


def agree_on_pages(
    hosts: HostGroup, lowering: Lowering, weights: Mapping[str, Parameter], mesh: Mesh, num_pages: int
) -> int:
    """How many pages all hosts have room for.

    Args:
        lowering: of some stage on this host.
        weights: of the whole model.
        mesh: of all stages.

    Raises:
        ValueError: the hosts would run different programs; it says what differs.
    """
    shapes = [(path, weight.shape, str(weight.dtype)) for path, weight in weights.items()]
    facts = {
        "the model": str(lowering.model),
        "the mesh": f"{dict(mesh.shape)} of devices {mesh.device_ids.ravel().tolist()}",
        "the weights' shapes": hashlib.sha256(repr(shapes).encode()).hexdigest(),
        "the programs' sizes": str(lowering.sizes),
        "attention_backend": lowering.backend.name,
        "matmul_backend": "xla" if lowering.products is None else lowering.products.name,
        "logits processors": [processor.name for processor in lowering.sampler.processors],
    }
    return hosts.agree(facts, {"num_pages": num_pages})["num_pages"]


class LeadingRunner(Runner):
    """Host 0's. What goes wrong here has gone otherwise elsewhere, so it ends the group."""

    def __init__(
        self,
        stages: Sequence[StageRunner],
        num_pages: int,
        programs: Programs,
        load: LoadWeights,
        hosts: HostGroup,
        *,
        exact: bool = False,
        far: FarStages | None = None,
    ) -> None:
        super().__init__(stages, num_pages, programs, load, exact=exact, far=far)
        self.hosts = hosts

    def dispatch(
        self,
        plan: StepPlan,
        admissions: Mapping[int, Admission],
        *,
        scores: bool = False,
        bucket: Bucket | None = None,
        returned: Sequence[Tokens] | None = None,
    ) -> BegunStep:
        """As `Runner.dispatch`, on all hosts; waits for tokens that the plan needs, if they are far.

        Raises:
            HostLostError: a host is lost.
        """
        found = bucket or self._choose_bucket(plan, scores=scores)
        due = self.due(plan) if returned is None else returned
        sent = [np.asarray(tokens) for tokens in due]  # is there already
        told = dispatch_message(plan, admissions, self.lowering.buckets.sizes.index(found), sent)
        dispatch = partial(super().dispatch, scores=scores, bucket=found, returned=due)
        return self._on_all(told, lambda: dispatch(plan, admissions))

    def sample(self, step: BegunStep, masks: RowMasks | None = None) -> DispatchedStep:
        """As `Runner.sample`, on all hosts; reading the step raises HostLostError once one is lost."""
        sample = super().sample
        done = self._on_all(sample_message(masks), lambda: sample(step, masks))
        if self._far is not None:
            return done  # its tokens come from another host, and who waits for them hears if one is lost
        return WatchedStep(**_fields(done), hosts=self.hosts)

    def logprobs(self, step: DispatchedStep) -> Logprobs:
        """As `Runner.logprobs`, of the step started last."""
        return self._on_all(Message("logprobs"), lambda: super(LeadingRunner, self).logprobs(step))

    def score(self, step: DispatchedStep, targets: Mapping[int, int]) -> Logprobs:
        """As `Runner.score`, of the step started last."""
        told = Message("score", {"targets": [list(targets), list(targets.values())]})
        return self._on_all(told, lambda: super(LeadingRunner, self).score(step, targets))

    def move_experts(self, stage: int, layer: int, experts: Int[np.ndarray, " slots"]) -> None:
        """As `Runner.move_experts`, on all hosts."""
        told = Message("move_experts", {"stage": stage, "layer": layer}, [experts])
        self._on_all(told, lambda: super(LeadingRunner, self).move_experts(stage, layer, experts))

    def sleep(self, *, keep_weights: bool) -> None:
        """As `Runner.sleep`, on all hosts."""
        told = Message("sleep", {"keep_weights": keep_weights})
        self._on_all(told, lambda: super(LeadingRunner, self).sleep(keep_weights=keep_weights))

    def reset(self) -> None:
        """As `Runner.reset`, on all hosts."""
        self._on_all(Message("reset"), super().reset)

    def wake(self) -> None:
        """As `Runner.wake`, on all hosts: each loads its own part."""
        self._on_all(Message("wake"), super().wake)

    def close(self) -> None:
        """Frees all device memory, and lets the other hosts go; what a lost host holds up stays as it is."""
        if self.hosts.lost is None:
            super().close()
            self.hosts.close()

    def _on_all(self, message: Message, do: Callable[[], Any]) -> Any:
        self.hosts.send(message)
        try:
            return do()
        except Exception as error:
            self.hosts.lose(f"host 0 has failed: {error}")
            raise HostLostError(f"host 0 has failed: {error}") from error


@dataclasses.dataclass(frozen=True)
class WatchedStep(DispatchedStep):
    """A step that is given up when a host is lost."""

    hosts: HostGroup

    def read(self) -> list[list[int]]:
        """As `DispatchedStep.read`.

        Raises:
            HostLostError: a host is lost, or the hosts could not exchange what they had to.
        """
        while not self.is_done():
            self.hosts.check()
            time.sleep(POLL_SECONDS)
        try:
            return super().read()
        except Exception as error:
            # most often because a host is gone, which its channel says more clearly, and a moment later
            if not self.hosts.wait_lost(REASON_SECONDS):
                self.hosts.lose(f"a step failed: {error}")
            raise HostLostError(str(self.hosts.lost)) from error


def follow(runner: Runner, hosts: HostGroup) -> None:
    """Does what host 0 does, until that closes.

    Raises:
        HostLostError: a host is gone or has failed, this one included.
    """
    begun: BegunStep | None = None
    step: DispatchedStep | None = None
    while (message := hosts.receive()).kind != "bye":
        if message.kind not in OF_A_STEP:
            begun = step = None  # so the devices have the memory of their outputs back
        try:
            match message.kind, begun, step:
                case "dispatch", _, _:
                    plan, admissions, bucket, returned = read_dispatch(message)
                    found = runner.lowering.buckets.sizes[bucket]
                    begun = runner.dispatch(plan, admissions, bucket=found, returned=returned)
                case "sample", BegunStep(), _:
                    step = runner.sample(begun, read_sample(message))
                case "logprobs", _, DispatchedStep():
                    runner.logprobs(step)
                case "score", _, DispatchedStep():
                    ids, targets = message.fields["targets"]
                    runner.score(step, dict(zip(ids, targets, strict=True)))
                case "move_experts", _, _:
                    [experts] = message.arrays
                    runner.move_experts(message.fields["stage"], message.fields["layer"], experts)
                case "reset", _, _:
                    runner.reset()
                case "sleep", _, _:
                    runner.sleep(keep_weights=message.fields["keep_weights"])
                case "wake", _, _:
                    runner.wake()
                case kind, _, _:
                    raise ValueError(f"host 0 asks for {kind!r}, which this host does not know")
        except Exception as error:
            logger.exception("host %d cannot go on", hosts.rank)
            hosts.fail(f"{type(error).__name__}: {error}")
            raise HostLostError(f"host {hosts.rank} has failed: {error}") from error
    runner.close()
    hosts.close()


def _fields(step: DispatchedStep) -> dict[str, Any]:
    return {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
