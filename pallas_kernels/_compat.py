"""What differs between the versions of jax that the kernels run with."""

import inspect
from typing import Any

import jax
from jax.experimental import io_callback
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import PyTree


def tpu_interpreter() -> Any:
    """Pallas' TPU interpreter: copies happen when they are waited for, races are found, fresh memory is NaN.

    From jax 0.12 on a race is an error by itself; before, see `raise_on_races`.
    """
    options: dict[str, Any] = {"on_race": "raise"} if _raises() else {}
    return pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", **options
    )


def raise_on_races(results: PyTree[jax.Array]) -> PyTree[jax.Array]:
    """The results of an interpreted kernel, once it is known that it had no races.

    Raises:
        RuntimeError: when the results are computed, if it had one; the interpreter prints where.
    """
    if _raises():
        return results
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), results)
    return io_callback(_check_races, shapes, results)


def _raises() -> bool:
    return "on_race" in pltpu.InterpretParams.__dataclass_fields__


def _check_races(results: PyTree[Any]) -> PyTree[Any]:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    races = getattr(interpreter, "get_races", lambda: interpreter.races)()
    if races is not None and races.races_found:
        interpreter.reset_tpu_interpret_mode_state()  # or the next kernel would be blamed for it, too
        raise RuntimeError("the kernel has a race; see the interpreter's output")
    return results


def transposed_ref(ref: Any) -> Any:
    """The matrix that a reference in a GPU's shared memory holds, transposed, as an operand of wgmma."""
    if hasattr(ref, "T"):
        return ref.T
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.transpose_ref(ref, (1, 0))


def load_registers(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """What a reference on a GPU holds, in registers of that layout; `optimized` as in `plgpu.load`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def cuda_version() -> int | None:
    """The CUDA that jax's plugin runs with, as CUDA counts: 12091 is 12.9.1. None: there is none to ask."""
    from jax._src.lib import cuda_versions

    if cuda_versions is None:
        return None
    try:
        return cuda_versions.cuda_runtime_get_version()
    except RuntimeError:  # the plugin is there to compile with, on a machine without CUDA
        return None
