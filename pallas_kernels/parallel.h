// Work shared among the threads of XLA's pool.
#pragma once
#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <thread>

// Runs f(0) ... f(count - 1) on the pool's threads. The caller works too, so it never waits for one to start.
template <class Pool, class F> void parallel_for(Pool& pool, int count, int threads, F f) {
  struct State { std::atomic<int> next{0}, done{0}; };
  auto state = std::make_shared<State>();
  auto work = [state, count, f] {
    for (int i; (i = state->next.fetch_add(1)) < count;) f(i), state->done.fetch_add(1, std::memory_order_release);
  };
  for (int i = 1; i < std::min(threads, count); i++) pool.Schedule(std::function<void()>(work));
  work();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < count;) if (++spins > 1000) std::this_thread::yield();
}
