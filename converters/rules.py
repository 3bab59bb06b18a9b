"""Mapping tables: which tensors of a checkpoint make a parameter, and how.

A table is data. `Table.assign` lays it over the names that a model and a checkpoint really have; transforms
turn arrays from the Hugging Face form into the engine's, as views where numpy allows.

The engine's forms, where `group` is the number of query heads that share a key-value head:

    qkv         [embed, kv_heads, group + 2, head_dim]   per key-value head: its query heads, then k, then v
    output      [heads, head_dim, embed]
    gate_up     [embed, 2, mlp]                           of experts with these as a first axis
    embedding   [padded vocab, embed]
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """The sizes that transforms need.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key-value heads, as the checkpoint has them.
        head_dim: width of a head.
        kv_copies: how many times each key-value head is repeated, so that every device owns one.
        vocab_size: rows of the checkpoint's embedding table.
        padded_vocab_size: rows of the engine's, a multiple of the devices that share it.
        plain_dim, rotated_dim: of a head's query in latent attention, see `converters.latent`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    kv_copies: int = 1
    plain_dim: int = 0
    rotated_dim: int = 0

    @property
    def group(self) -> int:
        """Query heads for each repeated key-value head."""
        return self.num_heads // (self.num_kv_heads * self.kv_copies)


Transform = Callable[[Sequence[np.ndarray], Geometry], np.ndarray]


@dataclass(frozen=True)
class Rule:
    """One parameter's origin.

    Attributes:
        target: the parameter's path; `{}` stands for the layer's number.
        sources: Hugging Face tensor names in the order the transform takes them, with `{}` likewise; one with
            `*` stands for those of all experts, by number.
        transform: makes the parameter from the sources' arrays.
    """

    target: str
    sources: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True)
class Origin:
    """Where one parameter comes from: names as the checkpoint has them, and the transform."""

    sources: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True)
class Assignment:
    """A table laid over one model and one checkpoint.

    Attributes:
        origins: for each parameter that can be made, its origin, in the parameters' order.
        missing: tensors that the model needs and the checkpoint lacks, and parameters without a rule.
        unread: tensors of the checkpoint that nothing asks for.
    """

    origins: dict[str, Origin]
    missing: tuple[str, ...]
    unread: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A family's rules.

    Attributes:
        rules: one for each kind of parameter, or several, of which the first whose sources are there is
            used; one whose target a model lacks is not.
        ignored: regular expressions of tensors that may be left unread, such as rotary `inv_freq` buffers.
        renames: (written, stored) beginnings of names: where the name in a rule is not in the checkpoint, it
            is looked for with each beginning replaced in turn.
        extra_layers: layers of the checkpoint beyond the model's may be left unread.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    extra_layers: bool = False

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def assign(self, parameters: Collection[str], tensors: Collection[str]) -> Assignment:
        """Finds the origin of every parameter among a checkpoint's tensors.

        Args:
            parameters: the model's paths, such as `layers.0.attention.qkv.weight`.
            tensors: the checkpoint's names, such as `model.layers.0.self_attn.q_proj.weight`.
        """
        rules: dict[str, list[Rule]] = {}
        for rule in self.rules:
            rules.setdefault(rule.target, []).append(rule)
        names = set(tensors)
        experts = _count_experts(names)
        origins: dict[str, Origin] = {}
        missing: list[str] = []
        read: set[str] = set()
        for path in parameters:
            target, layer = _generalize(path)
            if target not in rules:
                missing.append(f"{path} (a parameter that no rule makes)")
                continue
            tried = [self._try(rule, layer, experts, names) for rule in rules[target]]
            found, lacking, transform = next((one for one in tried if not one[1]), tried[0])
            missing += lacking
            read.update(found)
            if not lacking:
                origins[path] = Origin(tuple(found), transform)
        allowed = [re.compile(pattern) for pattern in self.ignored]
        if self.extra_layers:
            allowed.append(_layers_from(_count_layers(parameters)))
        left = [name for name in tensors if name not in read]
        unread = [name for name in left if not any(p.fullmatch(name) for p in allowed)]
        return Assignment(origins, tuple(missing), tuple(unread))

    def _try(
        self, rule: Rule, layer: str, experts: int, names: set[str]
    ) -> tuple[list[str], list[str], Transform]:
        """A rule's sources as they are stored, those that are missing, and its transform."""
        wanted = list(_each_expert(rule.sources, layer, experts))
        stored = {name: self._stored(name, names) for name in wanted}
        found = [name for name in stored.values() if name is not None]
        return found, [name for name in wanted if stored[name] is None], rule.transform

    def _stored(self, name: str, names: set[str]) -> str | None:
        for written, stored in (("", ""), *self.renames):
            if name.startswith(written) and (renamed := stored + name[len(written) :]) in names:
                return renamed
        return None


def _generalize(path: str) -> tuple[str, str]:
    """Splits `layers.3.mlp.down.weight` into (`layers.{}.mlp.down.weight`, `3`)."""
    layer = re.search(r"(?<=\.)\d+(?=\.)", path)
    if layer is None:
        return path, ""
    return path[: layer.start()] + "{}" + path[layer.end() :], layer.group()


def _count_experts(tensors: Collection[str]) -> int:
    """One more than the highest number of an expert; at least one, so that what is missing has a name."""
    numbers = (re.search(r"\.experts\.(\d{1,6})\.", name) for name in tensors)
    return max((int(number[1]) + 1 for number in numbers if number), default=1)


def _count_layers(parameters: Collection[str]) -> int:
    return max((int(layer) + 1 for path in parameters if (layer := _generalize(path)[1])), default=0)


def _layers_from(first: int) -> re.Pattern[str]:
    """Names in layers from number `first` on, a few of which there may be."""
    return re.compile(rf"model\.layers\.({'|'.join(str(first + n) for n in range(8))})\..*")


def _each_expert(sources: Sequence[str], layer: str, experts: int) -> Iterator[str]:
    for source in sources:
        name = source.format(layer)
        count = experts if "*" in name else 1
        yield from (name.replace("*", str(expert)) for expert in range(count))


@dataclass(frozen=True)
class EachExpert:
    """Applies a transform to each expert's tensors and stacks what it makes along a first axis.

    Attributes:
        transform: of one expert.
        sources: how many tensors it takes; they come with those of all experts for the first of them, then
            those for the second.
    """

    transform: Transform
    sources: int = 1

    def __call__(self, arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
        count = len(arrays) // self.sources
        first = self.transform(arrays[::count], geometry)
        stacked = np.empty((count, *first.shape), first.dtype)
        for expert in range(count):
            stacked[expert] = self.transform(arrays[expert::count], geometry)
        return stacked


def unchanged(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """The tensor as it is."""
    return arrays[0]


def transposed(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """`[out, in]`, as torch keeps a linear layer, to `[in, out]`; of all experts likewise."""
    return arrays[0].mT


def vocabulary(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """Embedding or head `[vocab, embed]`, with rows of zeros up to the padded size."""
    extra = geometry.padded_vocab_size - geometry.vocab_size
    return np.pad(arrays[0], ((0, extra), (0, 0))) if extra else arrays[0]


def qkv(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """Weights q, k, v, each `[heads * head_dim, embed]`, to the fused form."""
    return _fuse_heads([a.T for a in arrays], geometry)


def qkv_bias(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """Biases q, k, v, each `[heads * head_dim]`, to `[kv_heads, group + 2, head_dim]`."""
    return _fuse_heads(arrays, geometry)


def stacked_qkv(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """One weight `[(heads + 2 * kv_heads) * head_dim, embed]` holding q, k, v in turn, to the fused form."""
    return qkv(_unstack(arrays[0], geometry), geometry)


def stacked_qkv_bias(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """One bias `[(heads + 2 * kv_heads) * head_dim]` holding q, k, v in turn, to the fused form."""
    return qkv_bias(_unstack(arrays[0], geometry), geometry)


def conv_stacked_qkv(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """One weight `[embed, (heads + 2 * kv_heads) * head_dim]` holding q, k, v in turn, to the fused form."""
    return stacked_qkv([arrays[0].T], geometry)


def output(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """Attention output weight `[embed, heads * head_dim]` to `[heads, head_dim, embed]`."""
    return arrays[0].T.reshape(geometry.num_heads, geometry.head_dim, -1)


def conv_output(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """Attention output weight `[heads * head_dim, embed]` to `[heads, head_dim, embed]`."""
    return output([arrays[0].T], geometry)


def gate_up(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """Gate and up weights, each `[mlp, embed]`, to `[embed, 2, mlp]`; of all experts likewise."""
    return np.stack([a.mT for a in arrays], axis=-2)


def gate_up_bias(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """Gate and up biases, each `[mlp]`, to `[2, mlp]`."""
    return np.stack(arrays)


def stacked_gate_up(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """One weight `[2 * mlp, embed]` holding gate, then up, to `[embed, 2, mlp]`."""
    return arrays[0].T.reshape(arrays[0].shape[1], 2, -1)


def one_output(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """`[1, in]`, or `[in]` as llama.cpp has it, to `[in, 1]`."""
    return arrays[0].reshape(-1, 1)


def stacked_expert_gate_up(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """One weight `[experts, embed, 2 * mlp]`, gate and up by turns, to `[experts, embed, 2, mlp]`.

    Of a bias, which has no `embed`, likewise.
    """
    pairs = arrays[0].reshape(*arrays[0].shape[:-1], -1, 2)
    return pairs.swapaxes(-1, -2)


def query_norm(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """A norm over all query heads at once: `[heads * head_dim]` to `[heads, head_dim]`."""
    return arrays[0].reshape(geometry.num_heads, geometry.head_dim)


def key_norm(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """A norm over all key heads at once: `[kv_heads * head_dim]` to `[kv_heads, head_dim]`, with copies."""
    return np.repeat(arrays[0].reshape(-1, geometry.head_dim), geometry.kv_copies, axis=0)


def _unstack(array: np.ndarray, geometry: Geometry) -> list[np.ndarray]:
    heads, kv_heads = geometry.num_heads, geometry.num_kv_heads
    ends = np.array([heads, heads + kv_heads]) * geometry.head_dim
    return np.split(array, ends)


def _fuse_heads(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """q, k, v, each `[..., heads * head_dim]`, to `[..., kv_heads, group + 2, head_dim]`."""
    q, k, v = (a.reshape(*a.shape[:-1], -1, 1, geometry.head_dim) for a in arrays)
    if geometry.kv_copies > 1:
        k, v = (np.repeat(a, geometry.kv_copies, axis=-3) for a in (k, v))
    q = q.reshape(*k.shape[:-2], geometry.group, geometry.head_dim)
    return np.concatenate([q, k, v], axis=-2)
