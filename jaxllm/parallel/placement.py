"""Which devices hold which experts, and which experts twice or more: by how many tokens go to each.

Weights of experts lie in slots. All devices have as many, and those of the first device come first; there may
be more slots than experts, and then some experts have copies. Everything here is numpy on the host.

After DeepSeek's balancer (https://github.com/deepseek-ai/EPLB; section 3.4 of
https://arxiv.org/abs/2412.19437): the experts with the most tokens are copied, and then packed evenly.
"""

from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
from jaxtyping import Float, Int, Int32

LEAST_GAIN = 0.02
"""Of the fullest device's load: for less than that no weights are moved."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The experts of some layers in their slots.

    Attributes:
        experts: in each slot the number of its expert. Every expert has at least one slot.
        num_experts: of a layer.
        devices: that share the slots.
    """

    experts: Int[np.ndarray, "layers slots"]
    num_experts: int
    devices: int

    @classmethod
    def plain(cls, layers: int, num_experts: int, devices: int) -> Self:
        """Experts in order and without copies, as checkpoints have them."""
        return cls(np.tile(np.arange(num_experts), (layers, 1)), num_experts, devices)

    @classmethod
    def even(cls, layers: int, num_experts: int, slots: int, devices: int) -> Self:
        """While nothing is known of the load: as few copies of each expert as can be."""
        return cls.for_load(np.ones((layers, num_experts)), slots, devices)

    @classmethod
    def for_load(cls, load: Float[np.ndarray, "layers experts"], slots: int, devices: int) -> Self:
        """The most even placement that is found.

        Its fullest device never has more than without copies, with experts in order.

        Args:
            load: of each expert, in any unit.
            slots: of all devices: a multiple of their number, and at most all experts on each.
        """
        num_experts = load.shape[1]
        # experts without load count for a little, so that their copies, too, are spread
        raised = np.maximum(load, 1e-6 * max(float(load.max()), 1.0))
        packed = cls(_pack(raised, _copy(raised, slots, devices), slots, devices), num_experts, devices)
        local = num_experts // devices
        index = np.arange(slots // devices) % local  # copies that take no load off their device
        ordered = (np.arange(devices)[:, None] * local + index).reshape(1, -1).repeat(len(load), axis=0)
        plain = cls(ordered, num_experts, devices)
        better = packed.fullest(load) <= plain.fullest(load)
        return cls(np.where(better[:, None], packed.experts, plain.experts), num_experts, devices)

    @classmethod
    def of_tables(cls, tables: Int[np.ndarray, "layers experts copies"], slots: int, devices: int) -> Self:
        """The inverse of `tables`."""
        experts = np.zeros((len(tables), slots), int)
        layer, expert, copy = np.nonzero(tables >= 0)
        experts[layer, tables[layer, expert, copy]] = expert
        return cls(experts, tables.shape[1], devices)

    def tables(self, most: int) -> Int32[np.ndarray, "layers experts most"]:
        """For each expert the slots of its copies, -1 after the last of them; nobody has more than `most`."""
        found = np.full((len(self.experts), self.num_experts, most), -1, np.int32)
        seen = np.zeros(found.shape[:2], int)
        layers = np.arange(len(found))
        for slot, expert in enumerate(self.experts.T):
            found[layers, expert, seen[layers, expert]] = slot
            seen[layers, expert] += 1
        return found

    def of_experts(self, tokens: Int[np.ndarray, "layers slots"]) -> Int[np.ndarray, "layers experts"]:
        """Tokens of each expert, from those of each slot."""
        layers = np.arange(len(tokens))[:, None] * self.num_experts
        size = len(tokens) * self.num_experts
        found = np.bincount((layers + self.experts).ravel(), tokens.ravel(), size)  # exact below 2**53
        return found.astype(np.int64).reshape(-1, self.num_experts)

    def of_devices(self, load: Float[np.ndarray, "layers slots"]) -> Float[np.ndarray, "layers devices"]:
        """The load of each device, from that of each slot."""
        return load.reshape(len(load), self.devices, -1).sum(axis=2)

    def fullest(self, load: Float[np.ndarray, "layers experts"]) -> Float[np.ndarray, " layers"]:
        """The load of each layer's fullest device, where an expert's copies share its load evenly."""
        layers = np.arange(len(self.experts))[:, None]
        copies = self.of_experts(np.ones(self.experts.shape, int))
        return self.of_devices((load / copies)[layers, self.experts]).max(axis=1)

    def rebalanced(self, layer: int, load: Float[np.ndarray, " experts"]) -> "Placement":
        """The placement for another load of one layer, with as many of its experts as can be where they are.

        It is this very one, where another would not be better.
        """
        own = Placement(self.experts[layer : layer + 1], self.num_experts, self.devices)
        wanted = Placement.for_load(load[None], self.experts.shape[1], self.devices)
        if wanted.fullest(load[None])[0] >= (1 - LEAST_GAIN) * own.fullest(load[None])[0]:
            return self
        return self.replaced(layer, _kept_in_place(own.experts[0], wanted.experts[0], self.devices))

    def replaced(self, layer: int, experts: Int[np.ndarray, " slots"]) -> "Placement":
        """The placement with other experts in one layer's slots."""
        found = self.experts.copy()
        found[layer] = experts
        return Placement(found, self.num_experts, self.devices)

    def sources(self, before: "Placement", layer: int) -> Int32[np.ndarray, " slots"]:
        """For each slot of a layer one in which its expert lay before, if it can be on the same device."""
        old, new = before.experts[layer].tolist(), self.experts[layer].tolist()
        places: dict[int, list[int]] = {expert: [] for expert in old}
        for place, expert in enumerate(old):
            places[expert].append(place)

        def distance(slot: int, place: int) -> tuple[bool, bool]:
            away = slot * self.devices // len(new) != place * self.devices // len(old)
            return away, place != slot

        return np.array(
            [min(places[expert], key=partial(distance, slot)) for slot, expert in enumerate(new)], np.int32
        )


def _copy(
    load: Float[np.ndarray, "layers experts"], slots: int, most: int
) -> Int[np.ndarray, "layers experts"]:
    """How often each expert is there: one copy after the other for the one with the most load on each."""
    layers, copies = np.arange(len(load)), np.ones(load.shape, int)
    for _ in range(slots - load.shape[1]):
        hottest = np.where(copies < most, load / copies, -1.0).argmax(axis=1)
        copies[layers, hottest] += 1
    return copies


def _pack(
    load: Float[np.ndarray, "layers experts"],
    copies: Int[np.ndarray, "layers experts"],
    slots: int,
    devices: int,
) -> Int[np.ndarray, "layers slots"]:
    """Heaviest first, each to the emptiest device with a free slot, without that expert if there is one."""
    num_layers, num_experts = load.shape
    layers = np.arange(num_layers)
    experts = np.stack([np.repeat(np.arange(num_experts), own) for own in copies])
    share = np.take_along_axis(load / copies, experts, axis=1)
    order = np.argsort(-share, axis=1, kind="stable")
    packed = np.zeros((num_layers, devices, slots // devices), int)
    held, used = np.zeros((num_layers, devices)), np.zeros((num_layers, devices), int)
    has = np.zeros((num_layers, devices, num_experts), bool)
    above_all = 2 * load.sum(axis=1, keepdims=True)
    for item in order.T:
        expert = experts[layers, item]
        cost = held + above_all * has[layers, :, expert]
        device = np.where(used < packed.shape[2], cost, np.inf).argmin(axis=1)
        packed[layers, device, used[layers, device]] = expert
        used[layers, device] += 1
        held[layers, device] += share[layers, item]
        has[layers, device, expert] = True
    return packed.reshape(num_layers, slots)


def _kept_in_place(
    old: Int[np.ndarray, " slots"], new: Int[np.ndarray, " slots"], devices: int
) -> Int[np.ndarray, " slots"]:
    """One layer's new placement with devices and slots renamed, so that little moves.

    Devices are alike: each of the new sets of experts goes to the device that has most of it, the best pair
    first.
    """
    olds, news = old.reshape(devices, -1).tolist(), new.reshape(devices, -1).tolist()
    shared = np.array([[len(set(was) & set(group)) for group in news] for was in olds])
    placed = np.empty_like(old).reshape(devices, -1)
    for _ in range(devices):
        device, group = np.unravel_index(shared.argmax(), shared.shape)
        shared[device], shared[:, group] = -1, -1
        coming = list(news[group])
        kept = [expert if expert in coming and not coming.remove(expert) else None for expert in olds[device]]
        placed[device] = [coming.pop() if expert is None else expert for expert in kept]
    return placed.reshape(-1)
