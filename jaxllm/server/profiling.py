"""Profiles of the running server, for XProf and Perfetto: https://docs.jax.dev/en/latest/profiling.html"""

import asyncio
from pathlib import Path

import jax

from jaxllm.server.errors import ApiError


class Profiler:
    """Records what host and devices do, between two calls.

    Args:
        folder: where profiles go; None: there are none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._running = False
        self._busy = asyncio.Lock()

    async def start(self) -> Path:
        """Begins to record; the folder.

        Raises:
            ApiError: 400, there is no folder; 409, it records already.
        """
        if self._folder is None:
            raise ApiError(400, "there is no folder for profiles; start the server with --profile-dir")
        async with self._busy:
            if self._running:
                raise ApiError(409, "a profile is being recorded; end it with /stop_profile", code="busy")
            self._folder.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(jax.profiler.start_trace, str(self._folder))
            self._running = True
        return self._folder

    async def stop(self) -> Path:
        """Ends it, and writes the profile; the folder.

        Raises:
            ApiError: 409, none is being recorded.
        """
        async with self._busy:
            if not self._running or self._folder is None:
                raise ApiError(409, "no profile is being recorded; begin one with /start_profile")
            self._running = False
            await asyncio.to_thread(jax.profiler.stop_trace)
        return self._folder

    async def close(self) -> None:
        """Writes the profile that is being recorded, if there is one."""
        if self._running:
            await self.stop()
