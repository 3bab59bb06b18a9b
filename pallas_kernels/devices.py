"""The device that a call is for."""

import jax


def current_device() -> tuple[str, str]:
    """Platform and kind of the current mesh's devices, which one may only compile for, or else of jax's."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return platform_of(str(device.platform)), device.device_kind


def platform_of(device_platform: str) -> str:
    """The platform of an op's `Problem` for what a device calls its own; topologies call a GPU's "cuda"."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(device_platform, device_platform)
