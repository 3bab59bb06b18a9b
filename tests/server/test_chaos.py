"""Clients of every kind while things break: all are answered, and nothing is left behind or grows."""

import chaos
from running import Running


def test_chaos(server: Running) -> None:
    server.wait_idle()
    found = chaos.run_round(server, seed=1, clients=60, broken=0)
    assert {"leave", "stream 200", "whole 200"} <= set(found)
    assert not any(outcome.endswith(("500", "failed")) for outcome in found)
    threads, memory = chaos.threads(), chaos.resident()
    for seed in range(2, 6):
        found += chaos.run_round(server, seed, clients=60, broken=3)
    assert any(outcome.endswith(("500", "503", "failed")) for outcome in found)
    assert chaos.threads() <= threads
    assert chaos.resident() < memory + 50 * 2**20
    assert server.http.get("/health").is_success
    assert server.post("/v1/completions", prompt="still there", max_tokens=2).is_success
