"""Which attention kernel a model runs on a mesh."""

import dataclasses
import inspect
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from jaxllm.models.base import DecoderConfig
from pallas_kernels.paged_attention import (
    AttentionFunction,
    Backend,
    Kernel,
    Problem,
    RaggedBatch,
    as_backend,
    choose_backend,
    list_backends,
)
from pallas_kernels.paged_attention.backends import ORDER
from pallas_kernels.paged_attention.problem import platform_of
from pallas_kernels.registry import Choice

POSITIONAL = ("q", "k", "v", "pages", "batch")
KEYWORDS = ("scale", "sliding_window", "soft_cap", "sinks", "k_scale", "v_scale")
FORM = f"({', '.join(POSITIONAL)}, /, *, {', '.join(KEYWORDS)}) -> (out, pages)"


def check_kernel(kernel: object) -> Kernel:
    """The kernel, if it is one, as far as that shows before there is a model.

    Raises:
        ValueError: there is no backend of that name; the message lists those there are.
        TypeError: not a name, a backend or a function, or a function that takes other arguments.
    """
    if isinstance(kernel, str):
        if kernel != "auto":
            as_backend(kernel)
        return kernel
    function = kernel.attend if isinstance(kernel, Backend) else kernel
    if isinstance(kernel, type) or not isinstance(function, AttentionFunction):
        raise TypeError(
            f"attention_backend={kernel!r}: must be one of {', '.join(['auto', *list_backends()])}, a "
            f"pallas_kernels.paged_attention.Backend, or a function {FORM}"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C: the first call will tell
        return kernel if isinstance(kernel, Backend) else function
    try:
        signature.bind(*POSITIONAL, **dict.fromkeys(KEYWORDS))
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(f"attention_backend={name}{signature}: cannot be called as {FORM}: {error}") from None
    return kernel if isinstance(kernel, Backend) else function


def prepare_attention(kernel: object, mesh: Mesh) -> None:
    """Starts what takes time before a kernel can be chosen, such as building it; returns at once.

    Raises:
        ValueError, TypeError: as `check_kernel`.
    """
    kernel = check_kernel(kernel)
    order = ORDER.get(platform_of(mesh.devices.flat[0].platform), ())
    for candidate in order if kernel == "auto" else (kernel,):
        as_backend(candidate).prepare()


def choose_attention(kernel: object, model: DecoderConfig, mesh: Mesh, page_size: int) -> Choice[Backend]:
    """The backend for all of the model's layers, as each device of the mesh sees them.

    Args:
        kernel: a registered name, "auto", a backend, or a function.

    Raises:
        ValueError: there is no such backend; the message lists those there are.
        TypeError: not a kernel, or one that returns something else than it should.
        NotImplementedError: it does not serve one of the model's layers; the message says what.
    """
    kernel = check_kernel(kernel)
    problems = attention_problems(model, mesh, page_size)
    try:
        choice = choose_backend(kernel, problems)
        if kernel != "auto":
            with jax.set_mesh(mesh):
                for problem in problems:
                    _try(choice.backend, problem, model)
    except NotImplementedError as error:
        name = kernel if isinstance(kernel, str) else as_backend(kernel).name
        raise NotImplementedError(
            f"attention_backend={name!r} does not serve this model on {problems[0].platform}: {error}; "
            "leave it at 'auto', or name another"
        ) from error
    return choice


def attention_problems(model: DecoderConfig, mesh: Mesh, page_size: int) -> list[Problem]:
    """One for each kind of attention layer that the model has."""
    device = mesh.devices.flat[0]
    dtype = jnp.dtype(model.dtype)
    size = model.devices_per_layer
    whole = model.pages(0, page_size)
    geometry = dataclasses.replace(whole, kv_heads=whole.kv_heads // size)
    return [
        Problem(
            platform_of(device.platform),
            device.device_kind,
            model.num_heads // size,
            geometry,
            dtype,
            sliding_window=window,
            soft_cap=model.attention.soft_cap,
            sinks=model.attention.sinks,
        )
        for window in dict.fromkeys(model.layer_windows)
    ]


def _try(backend: Backend, problem: Problem, model: DecoderConfig) -> None:
    """Traces a call, so that what is wrong with a kernel shows before a model's weights are loaded.

    Raises:
        TypeError: it does not return an output like the queries, and the pages.
        NotImplementedError: it does not serve the problem.
    """
    tokens = 2
    geometry = problem.geometry
    value_dim = geometry.head_dim if model.latent is None else model.latent.latent
    heads = (problem.heads, geometry.kv_heads, geometry.kv_heads, problem.heads)
    dims = (geometry.head_dim, geometry.head_dim, value_dim, value_dim)
    q, k, v, out = (
        jax.ShapeDtypeStruct((tokens, *shape), problem.dtype) for shape in zip(heads, dims, strict=True)
    )
    sinks = jax.ShapeDtypeStruct((problem.heads,), problem.dtype) if problem.sinks else None
    pages = backend.layout.array(geometry.with_pages(2))
    counts = [
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((tokens + 1,), (tokens,), (tokens, 1), (2,))
    ]

    def call(q: Array, k: Array, v: Array, pages: Array, sinks: Array | None, *counts: Array) -> object:
        return backend.attend(
            q,
            k,
            v,
            pages,
            RaggedBatch(*counts),
            scale=model.attention.scale,
            sliding_window=problem.sliding_window,
            soft_cap=problem.soft_cap,
            sinks=sinks,
            k_scale=None,
            v_scale=None,
        )

    found = jax.eval_shape(call, q, k, v, pages, sinks, *counts)
    shapes = [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(found)]
    wanted = [f"{x.dtype}{list(x.shape)}" for x in (out, pages)]
    if shapes != wanted or not isinstance(found, Sequence):
        raise TypeError(
            f"attention_backend={backend.name!r}: returned {', '.join(shapes)} instead of a pair, the output "
            f"{wanted[0]} and the pages {wanted[1]}"
        )
