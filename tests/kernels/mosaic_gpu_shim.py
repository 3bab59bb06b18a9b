"""What Mosaic GPU's interpreter lacks to run kernels for Hopper on a CPU; compiled code is not affected.

`layout_cast`, `load` with a layout, stores to a transposed reference, `run_state` with accumulators, and
wgmma with its first operand in registers or either one transposed. wgmma's reads take part in the race
detection here; in the original they do not. Out of reach stay the tensor cores' and copies' asynchrony (both
happen at once), swizzles and layouts, `commit_smem`, `wait_smem_to_gmem`, and races between thread blocks,
which run one after the other.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import core
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.state import discharge, types
from jax._src.state import primitives as state_primitives

Interpreter = jaxpr_interpret.JaxprInterpreter


def install(monkeypatch: Any) -> None:
    """Patches the interpreter for as long as `monkeypatch` lasts."""
    mlir.register_lowering(gpu_core.layout_cast_p, lambda ctx, x, **_: [x], platform="cpu")
    monkeypatch.setattr(gpu_callbacks, "wgmma", _wgmma)
    original = Interpreter.interpret
    monkeypatch.setattr(Interpreter, "interpret", lambda *args: _interpret(original, *args))


def races_found() -> bool:
    """Whether the last kernel had any; the interpreter printed where."""
    races = gpu_callbacks.get_races()
    return bool(races.races_found)


def assert_no_races(capfd: Any) -> None:
    """In no kernel since the output was last read."""
    assert "RACE DETECTED" not in capfd.readouterr().out
    assert not races_found()


def _interpret(original: Any, self: Any, jaxpr: Any, token: Any, *args: Any) -> tuple[Any, list[Any]]:
    """Equation by equation: those known here, and the others as a jaxpr of one equation each."""
    env = dict(zip(jaxpr.constvars + jaxpr.invars, args, strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, core.Literal) else env[x]

    for eqn in jaxpr.eqns:
        values = [read(x) for x in eqn.invars]
        if eqn.primitive is discharge.run_state_p:
            token, out = _run_state(self, eqn, token, values)
        elif eqn.primitive is primitives.load_p:
            token, out = _load(self, eqn, token, values)
        elif eqn.primitive is state_primitives.swap_p and _transposed(eqn, values):
            token, out = _store_transposed(self, eqn, token, values)
        else:
            inputs = list(dict.fromkeys(x for x in eqn.invars if not isinstance(x, core.Literal)))
            single = core.Jaxpr((), inputs, eqn.outvars, [eqn], eqn.effects, jaxpr.debug_info)
            token, out = original(self, single, token, *[env[x] for x in inputs])
        env.update(zip(eqn.outvars, out, strict=True))
    return token, [read(x) for x in jaxpr.outvars]


def _thread(self: Any, eqn: Any) -> dict[str, Any]:
    return {
        "device_id": jnp.int32(self.device_info.device_id),
        "grid_point_coords": self.grid_point_coords,
        "thread_id": self.thread_id,
        "source_info": eqn.source_info,
    }


def _load(self: Any, eqn: Any, token: Any, values: list[Any]) -> tuple[Any, list[Any]]:
    aval = eqn.outvars[0].aval
    token, out = gpu_callbacks.call_get(
        token=token,
        result_shape_and_dtype=jax.ShapeDtypeStruct(aval.shape, aval.dtype),
        allocation_key_as_array=values[0],
        transforms=jax.tree.unflatten(eqn.params["tree"], values[1:]),
        **_thread(self, eqn),
    )
    return token, [out]


def _transposed(eqn: Any, values: list[Any]) -> bool:
    """Whether the last thing that is done to the reference is to transpose it."""
    transforms = jax.tree.unflatten(eqn.params["tree"], values[2:])
    return bool(transforms) and isinstance(transforms[-1], types.TransposeTransform)


def _store_transposed(self: Any, eqn: Any, token: Any, values: list[Any]) -> tuple[Any, list[Any]]:
    aval = eqn.outvars[0].aval
    token, out = gpu_callbacks.call_swap(
        token=token,
        result_shape_and_dtype=jax.ShapeDtypeStruct(aval.shape[::-1], aval.dtype),
        allocation_key_as_array=values[0],
        transforms=jax.tree.unflatten(eqn.params["tree"], values[2:])[:-1],
        val=values[1].T,
        mask=None,
        **_thread(self, eqn),
    )
    return token, [out.T]


def _run_state(self: Any, eqn: Any, token: Any, values: list[Any]) -> tuple[Any, list[Any]]:
    """Registers for each value that is no reference, for as long as the body runs."""
    where = _thread(self, eqn)
    own = [not isinstance(x.aval, types.AbstractRef) for x in eqn.invars]
    keys = []
    for value, mine in zip(values, own, strict=True):
        if not mine:
            keys.append(value)
            continue
        thread = gpu_callbacks.get_thread_id_for_collective_allocation_key(
            thread_id=jnp.int32(self.thread_id), axes_dims=self.thread_cluster_shape,
            is_last_thread_axis_collective=False,
        )  # fmt: skip
        token, request = gpu_callbacks.call_make_allocation_request_array(
            token=token, device_id=where["device_id"], thread_id=jnp.int32(thread), initial_ref_count=1,
            memory_space_id=gpu_callbacks.get_memory_space_idx(gpu_core.MemorySpace.REGS),
        )  # fmt: skip
        token, key = gpu_callbacks.call_allocate_buffer(
            token=token, allocation_request_as_array=request, value=value, **where
        )
        keys.append(key)
    token, _ = self.interpret(eqn.params["jaxpr"], token, *keys)
    out = []
    for variable, key, mine in zip(eqn.params["jaxpr"].invars, keys, own, strict=True):
        value = key
        if mine:
            inner = variable.aval.inner_aval
            token, value = gpu_callbacks.call_get(
                token=token, result_shape_and_dtype=jax.ShapeDtypeStruct(inner.shape, inner.dtype),
                allocation_key_as_array=key, transforms=(), **where,
            )  # fmt: skip
            token = gpu_callbacks.call_deallocate_buffer(token=token, allocation_key_as_array=key, **where)
        out.append(value)
    return token, out


def _wgmma(
    *, token: Any, device_id: Any, grid_point_coords: Any, thread_id: Any, acc_allocation_key_as_array: Any,
    acc_transforms: Any, acc_dtype: Any, a_allocation_key_as_array: Any, a_transforms: Any,
    b_allocation_key_as_array: Any, b_transforms: Any, source_info: Any = None,
) -> Any:  # fmt: skip
    memory = gpu_callbacks._get_shared_memory()
    device, thread = int(device_id), int(thread_id)
    place = {"device_id": device_id, "grid_point_coords": grid_point_coords, "thread_id": thread_id}

    def read(key: Any, transforms: Any) -> np.ndarray:
        transposed = any(isinstance(t, types.TransposeTransform) for t in transforms)
        transforms = tuple(t for t in transforms if not isinstance(t, types.TransposeTransform))
        transforms = tuple(t for t in transforms if not isinstance(t, gpu_callbacks.NOOP_TRANSFORMS))
        _, value = gpu_callbacks._get(
            token, allocation_key_as_array=key, transforms=transforms, source_info=source_info, **place
        )
        value = np.asarray(value)
        return value.T if transposed else value

    a = np.asarray(a_allocation_key_as_array)
    if a.ndim != 2:  # a key, not a value in registers
        a = read(a_allocation_key_as_array, a_transforms)
    b = read(b_allocation_key_as_array, b_transforms)
    with np.errstate(all="ignore"):
        product = a.astype(np.float32) @ b.astype(np.float32)
    key = gpu_callbacks.HostAllocationKey.from_array(acc_allocation_key_as_array)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(acc_transforms))
    span = utils.to_range(transforms)
    where = {
        "logging_info": utils.GPULoggingInfo(
            device_id=device,
            grid_point_coords=tuple(int(x) for x in grid_point_coords),
            thread_id=thread,
            source_info=source_info,
        )
    }
    global_thread = memory.get_global_thread_id(device, thread)
    acc, _, _ = memory.get_buffer_content(key, span, global_thread, **where)
    assert acc is not None
    memory.store_buffer_content(key, span, (acc + product).astype(acc_dtype), global_thread, **where)
    return token
