"""Tokens go to the devices of their experts and come back, where each device begins with a share of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxllm.layers.expert_rows import add_rows, count_rows, sort_rows

AXIS = ("data", "expert")
"""Of the mesh, over which tokens are exchanged: the devices that have other experts."""

Exchange = Callable[[Float[Array, "rows embed"], Int32[Array, "devices devices"], int], Array]
"""`(rows, sizes, capacity) -> received`: the first `sizes[me, 0]` rows go to the first device, the next to
the second, and so on; `capacity` rows are received, those of the first device first, and zeros after all."""

Apply = Callable[
    [Float[Array, "rows embed"], Int32[Array, "rows 1"], Float[Array, "rows 1"]],
    tuple[Float[Array, "rows embed"], Int32[Array, " experts"]],
]
"""Rows through the device's own experts, of which each has one; those beyond the last stand for none."""


def exchange_ragged(rows: Array, sizes: Array, capacity: int) -> Array:
    """Sends as many rows as there are. XLA on CPU lacks this collective (jaxlib 0.10.2)."""
    me = jax.lax.axis_index(AXIS)
    before = jnp.cumsum(sizes, axis=0) - sizes
    return jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros((capacity, rows.shape[1]), rows.dtype),
        input_offsets=jnp.cumsum(sizes[me]) - sizes[me],
        send_sizes=sizes[me],
        output_offsets=before[me],
        recv_sizes=sizes[:, me],
        axis_name=AXIS,
    )


@jax.named_scope("exchange_experts")
def exchange_experts(
    x: Float[Array, "tokens embed"],
    chosen: Int32[Array, "tokens chosen"],
    weights: Float[Array, "tokens chosen"],
    experts: int,
    apply: Apply,
    exchange: Exchange = exchange_ragged,
) -> tuple[Float[Array, "tokens embed"], Int32[Array, " experts"]]:
    """What experts anywhere make of the device's own tokens, in float32, and tokens of each of its experts.

    Against summing over all tokens everywhere less is sent, where each token goes to few of many devices. To
    one device all rows may come, so there is room for them; none is dropped, and only those that came cost
    products.

    Args:
        chosen: experts by their numbers among those of all devices; beyond the last: none.
        experts: of the device.
    """
    devices, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    rows, order = sort_rows(x, chosen)
    counts = jax.lax.all_gather(count_rows(chosen, devices * experts), AXIS)
    counts = counts.reshape(devices, devices, experts)
    sizes = counts.sum(axis=2)

    capacity = devices * len(rows)
    arrived = exchange(rows, sizes, capacity)
    ends = jnp.cumsum(counts[:, me])  # of each device's rows for each of the experts here
    place = jnp.searchsorted(ends, jnp.arange(capacity), side="right")
    expert = jnp.where(place < len(ends), place % experts, experts)[:, None].astype(jnp.int32)
    out, load = apply(arrived, expert, (expert < experts).astype(jnp.float32))

    returned = exchange(out.astype(x.dtype), sizes.T, len(rows))
    return add_rows(returned, order, weights), load
