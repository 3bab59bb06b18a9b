"""Paged attention on CPU: a kernel in C++ that XLA calls, built when it is first needed."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from pallas_kernels.native import BuildError, Library, Source
from pallas_kernels.paged_attention.backend import Backend
from pallas_kernels.paged_attention.batch import RaggedBatch
from pallas_kernels.paged_attention.layout import BITS, LogicalPages, PageGeometry, values_dtype
from pallas_kernels.paged_attention.problem import Problem, require_values
from pallas_kernels.paged_attention.scales import Scale

LIBRARY = Library(Source(Path(__file__).with_name("cpu.cc")), handlers=("PagedAttention",))

KEYS_PER_CHUNK = 256
"""Pages divide it; `kChunk` in the source."""
LANES = 16
"""Depths that a page is padded to."""

PAGE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")

Pages = Shaped[Array, "kv_heads pages 2 slots*depth"]


@dataclass(frozen=True)
class GroupedSlots:
    """`[kv_heads, pages, 2, page_size * depth]`: keys depth-major in groups of slots; see cpu.cc.

    bfloat16 and float8 are kept as their bits, for what XLA on CPU does to pools of them; see `HeadMajor`.
    """

    heads_axis: int = 0

    def array(self, geometry: PageGeometry) -> jax.ShapeDtypeStruct:
        """See `PageLayout`."""
        slots = geometry.page_size * _depth(geometry.head_dim)
        shape = (geometry.kv_heads, geometry.num_pages, 2, slots)
        return jax.ShapeDtypeStruct(shape, BITS.get(geometry.dtype, geometry.dtype))

    def read(self, array: Array, kv_heads: int, head_dim: int) -> PageGeometry | None:
        """See `PageLayout`."""
        if array.ndim != 4 or array.shape[0] != kv_heads or array.shape[2] != 2:
            return None
        page_size, rest = divmod(array.shape[3], _depth(head_dim))
        dtype = values_dtype(array.dtype)
        return None if rest else PageGeometry(array.shape[1], page_size, kv_heads, head_dim, dtype)

    def pack(self, pages: LogicalPages) -> Array:
        """See `PageLayout`."""
        count, size, heads, dim = pages.shape
        bits = BITS.get(jnp.dtype(pages.dtype))
        x = pages if bits is None else jax.lax.bitcast_convert_type(pages, bits)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, _depth(dim) - dim)))
        x = x.reshape(count, size, heads // 2, 2, -1).transpose(2, 0, 3, 1, 4)
        lanes, depths, slots = _grouping(size, values_dtype(x.dtype))
        shape = (heads // 2, count, -1)
        keys = x[:, :, 0].reshape(heads // 2, count, size // lanes, lanes, -1, depths)
        keys = keys.transpose(0, 1, 2, 4, 3, 5).reshape(shape)
        values = x[:, :, 1].reshape(heads // 2, count, size // slots, slots, -1)
        values = values.transpose(0, 1, 2, 4, 3).reshape(shape)
        return jnp.stack([keys, values], axis=2)

    def unpack(self, array: Array, kv_heads: int, head_dim: int) -> LogicalPages:
        """See `PageLayout`."""
        depth = _depth(head_dim)
        heads, count, _, elements = array.shape
        size = elements // depth
        dtype = values_dtype(array.dtype)
        lanes, depths, slots = _grouping(size, dtype)
        shape = (heads, count, size, depth)
        keys = array[:, :, 0].reshape(heads, count, size // lanes, -1, lanes, depths)
        keys = keys.transpose(0, 1, 2, 4, 3, 5).reshape(shape)
        values = array[:, :, 1].reshape(heads, count, size // slots, depth, slots)
        values = values.transpose(0, 1, 2, 4, 3).reshape(shape)
        x = jnp.stack([keys, values], axis=2).transpose(1, 3, 0, 2, 4)[..., :head_dim]
        x = x.reshape(count, size, 2 * heads, head_dim)
        return x if dtype == array.dtype else jax.lax.bitcast_convert_type(x, dtype)


def _depth(head_dim: int) -> int:
    return -(-head_dim // LANES) * LANES


def _grouping(page_size: int, dtype: jnp.dtype) -> tuple[int, int, int]:
    """Slots of a group of keys, and depths of keys and slots of values that share a word."""
    lanes = next(n for n in (16, 8, 1) if page_size % n == 0)
    pack = 2 if dtype == jnp.bfloat16 else 1
    return lanes, pack, pack if page_size % 2 == 0 else 1


def require(problem: Problem) -> None:
    """Raises NotImplementedError for what the kernel does not serve, or where it cannot be built."""
    require_values(problem)
    if problem.platform != "cpu":
        raise NotImplementedError(f"platform {problem.platform}: serves cpu")
    geometry = problem.geometry
    if KEYS_PER_CHUNK % geometry.page_size:
        raise NotImplementedError(
            f"page_size={geometry.page_size}: serves powers of two up to {KEYS_PER_CHUNK}"
        )
    if str(geometry.dtype) not in PAGE_DTYPES:
        raise NotImplementedError(f"pages of {geometry.dtype}: serves {', '.join(PAGE_DTYPES)}")
    if str(problem.dtype) not in ("float32", "bfloat16"):
        raise NotImplementedError(f"queries of {problem.dtype}: serves float32, bfloat16")
    try:
        LIBRARY.targets()
    except BuildError as error:
        raise NotImplementedError(str(error)) from error


def paged_attention_cpu(
    q: Float[Array, "tokens heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads dim"],
    pages: Pages,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " heads"] | None,
    k_scale: Scale | None,
    v_scale: Scale | None,
) -> tuple[Float[Array, "tokens heads dim"], Pages]:
    """See `paged_attention`; the pages are packed as `GroupedSlots`.

    Malformed metadata (a page that is not in the pool, more keys than the table has pages for, rows out of
    order) fails the program with an error that names the entry, and nothing is touched.
    """
    call = jax.ffi.ffi_call(
        LIBRARY.targets()["PagedAttention"],
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype)),
        input_output_aliases={3: 1},
    )
    none = jnp.zeros(0, jnp.float32)
    optional = [none if x is None else x.astype(jnp.float32) for x in (sinks, k_scale, v_scale)]
    out, pages = call(
        q,
        k,
        v,
        pages,
        batch.query_start,
        batch.kv_lens,
        batch.page_table,
        batch.num_rows,
        *optional,
        scale=np.float32(scale),
        soft_cap=np.float32(soft_cap or 0.0),
        window=np.int64(sliding_window or 0),
        page_size=np.int64(pages.shape[3] // _depth(q.shape[2])),
    )
    return out, pages


BACKEND = Backend(
    "cpu", paged_attention_cpu, GroupedSlots(), platform="cpu", require=require, prepare=LIBRARY.prepare
)
