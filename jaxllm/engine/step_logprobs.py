"""A step's logprobs, as the host reads them."""

import jax
import numpy as np

from jaxllm.engine.assembler import TokenLogprobs


class StepLogprobs:
    """What `token_logprobs` left on the device, read when the first position of it is asked for."""

    def __init__(self, arrays: tuple[jax.Array, ...] | None) -> None:
        self._arrays = arrays
        self._read: list[np.ndarray] = []

    def __getitem__(self, position: int) -> TokenLogprobs:
        if not self._read:
            assert self._arrays is not None
            self._read = [np.asarray(array) for array in self._arrays]
        logprob, rank, ids, top = (array[position] for array in self._read)
        return TokenLogprobs(float(logprob), int(rank), ids.tolist(), top.tolist())
