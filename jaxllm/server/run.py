"""The server as a process: from its start to its end by a signal."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn

from jaxllm.config import EngineConfig
from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.server import logs
from jaxllm.server.app import create_app
from jaxllm.server.config import ListenConfig, ServerConfig
from jaxllm.server.keys import make_keys
from jaxllm.server.service import Service

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
"""Seconds that the event loop's thread keeps Python's lock while the step loop waits for it. With Python's
0.005, a tenth of a step, 32 streams of a small model on 2 cores were 4 and 7% slower in two pairs of runs."""
LOST_HOST_SECONDS = 15.0
"""Seconds that the server has to end in order once a host is lost and its clients have been told."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server(uvicorn.Server):
    """Ends in order at the first signal: what runs is finished, nothing new is taken. Ends at the second."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes signals while the server runs; they do not end the process by themselves, as uvicorn's do.

        The event loop hears of them between two callbacks. A handler of Python's own runs within whatever it
        meets: within the writing of a line of the log ours could write none, failed, and the signal was lost.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self.should_exit:
            self.force_exit = True
            return
        self.stop()

    def stop(self) -> None:
        """Begins to end. Where a host is lost, it is ended in any case: a step may wait for that forever."""
        if self._service.host_lost:
            last = threading.Timer(LOST_HOST_SECONDS, os._exit, (1,))
            last.daemon = True
            last.start()
        limit = self._service.config.limits.shutdown_timeout
        logger.info("stopping: %d requests have %g s to finish", self._service.requests, limit)
        self._service.draining = True
        self.should_exit = True


def run(config: ServerConfig, engine_config: EngineConfig) -> int:
    """Serves until a signal ends it.

    Returns:
        The exit code: 0 after a signal, 1 if it could not listen or the model could not be loaded.

    Raises:
        OSError, ValueError: a file of keys, a template or a certificate that cannot be read.
        ValueError: a host without an address.
    """
    check_listen(config.listen)
    logs.configure(config.log)
    sys.setswitchinterval(SWITCH_SECONDS)
    server, service = make_server(config, engine_config)
    service.on_loaded = leave_to_themselves
    code = 0
    try:
        server.run()
    except SystemExit:  # uvicorn's way of saying that it cannot listen; it has logged why
        code = 1
    if service.failure is not None or service.host_lost:
        code = 1
    if service.failure is None:
        logger.info("stopped")
    else:  # said before, but in the middle of what is logged of start and end
        logger.error("stopped: the model cannot be loaded: %s", service.failure)
    alone = engine_config.parallel.num_hosts == 1
    if server.force_exit or service.is_loading or (code and not alone):
        # A thread may be in the middle of compiling or of a step, and has nothing to save. With several hosts
        # jax would wait at its end for the others, which have ended for the same reason.
        sys.stderr.flush()
        os._exit(code)
    return code


def check_listen(config: ListenConfig) -> None:
    """Names, before anything is loaded, what uvicorn would complain about without its name.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a host without an address.
    """
    for file in (config.ssl_keyfile, config.ssl_certfile, config.ssl_ca_certs):
        if file is not None:
            open(file, "rb").close()
    if config.uds is None:
        try:
            socket.getaddrinfo(config.host or None, config.port)
        except socket.gaierror as error:
            raise ValueError(f"host={config.host!r}: {error.strerror}") from error


def leave_to_themselves(engine: AsyncEngine) -> None:
    """Has the garbage collector look no more through what stays: 340,000 objects for a small model.

    A full collection took 60 to 600 ms of two cores that were more or less busy, and no step began meanwhile;
    now it takes 2. What programs leave behind that are still being compiled follows once they are done.
    """
    gc.collect()
    gc.freeze()

    def follow() -> None:
        with contextlib.suppress(Exception):  # a program that cannot be compiled has been logged
            asyncio.run(engine.wait_for_programs())
        gc.freeze()

    threading.Thread(target=follow, name="jaxllm-freeze", daemon=True).start()


def make_server(config: ServerConfig, engine_config: EngineConfig) -> tuple[Server, Service]:
    """The server, not yet started, and what its endpoints share.

    Raises:
        OSError, ValueError: as `run` does.
    """
    keys = make_keys(config.access)
    service = Service(config, engine_config)
    server = Server(_uvicorn_config(config, create_app(service, keys)), service)
    service.on_failure = server.stop
    return server, service


def _uvicorn_config(config: ServerConfig, app: object) -> uvicorn.Config:
    listen = config.listen
    return uvicorn.Config(
        app,  # pyright: ignore[reportArgumentType]
        host=listen.host,
        port=listen.port,
        uds=listen.uds,
        ssl_keyfile=listen.ssl_keyfile,
        ssl_certfile=listen.ssl_certfile,
        ssl_ca_certs=listen.ssl_ca_certs,
        ssl_cert_reqs=listen.ssl_cert_reqs,
        http="h11",  # the one that bounds headers
        h11_max_incomplete_event_size=listen.h11_max_incomplete_event_size,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=config.limits.shutdown_timeout,
    )
