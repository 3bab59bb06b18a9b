// Work shared among the threads of XLA's pool.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

namespace jaxllm {

// Calls f(0, ...) ... f(count - 1, ...), each once, on the threads that run it. The caller begins with the first and
// its helpers with the last, which is where they have looked ahead; f's second argument is which way the thread goes,
// 1 or -1.
struct Job {
  std::function<void(int, int)> f;
  int count;
  std::atomic<int> taken{0}, first{0}, last{0}, done{0};
  void run(bool helps) {
    while (taken.fetch_add(1) < count) {
      helps ? f(count - 1 - last.fetch_add(1), -1) : f(first.fetch_add(1), 1);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads that have just worked wait here for the next call: in a step there are hundreds, a few microseconds apart,
// and to wake a thread takes 30 to 50. They leave soon, since the pool has other work for them.
class Lobby {
 public:
  static constexpr std::chrono::microseconds kStay{50};

  // Hands the job to the threads that wait; returns how many there are.
  int offer(const std::shared_ptr<Job>& job) {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = job;
    offered_.fetch_add(1, std::memory_order_release);
    return waiting_.load();
  }

  // What the next call will read, of which threads that wait for it fetch the end.
  void expect(const char* data, int64_t bytes) {
    const int64_t ahead = std::min(bytes, kAhead);
    end_.store(data + bytes), left_.store(ahead);
  }

  // Runs the job, and those that are offered while the thread stays.
  void serve(std::shared_ptr<Job> job) {
    for (; job; job = wait()) job->run(true);
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Job> job_;
  std::atomic<int> waiting_{0};
  std::atomic<unsigned> offered_{0};

  static constexpr int64_t kAhead = 512 << 10, kPiece = 512;
  std::atomic<const char*> end_{nullptr};
  std::atomic<int64_t> left_{0};

  void look_ahead() {
    if (left_.load(std::memory_order_relaxed) <= 0) return pause();
    const char* piece = end_.fetch_sub(kPiece) - kPiece;
    left_.fetch_sub(kPiece);
    for (int line = 0; line < kPiece; line += 64) __builtin_prefetch(piece + line, 0, 2);
  }

  std::shared_ptr<Job> wait() {
    const unsigned seen = offered_.load();
    waiting_.fetch_add(1);
    std::shared_ptr<Job> job;
    for (const auto end = std::chrono::steady_clock::now() + kStay; !job && std::chrono::steady_clock::now() < end;) {
      for (int i = 0; i < 32 && offered_.load(std::memory_order_acquire) == seen; i++) look_ahead();
      if (offered_.load() == seen) continue;
      std::lock_guard<std::mutex> lock(mutex_);
      job = job_;
    }
    waiting_.fetch_sub(1);
    return job;
  }
};

// One for all libraries of a process, where the compiler makes inline variables unique across them, as GCC does.
inline Lobby lobby;

// Runs a `Job` on the pool's threads. The caller works too, so it never waits for one to start.
template <class Pool, class F> void parallel_for(Pool& pool, int count, int threads, F f) {
  const int helpers = std::min(threads, count) - 1;
  if (helpers <= 0) {
    for (int i = 0; i < count; i++) f(i, 1);
    return;
  }
  auto job = std::make_shared<Job>();
  job->f = std::ref(f), job->count = count;
  for (int i = lobby.offer(job); i < helpers; i++) pool.Schedule(std::function<void()>([job] { lobby.serve(job); }));
  job->run(false);
  for (int spins = 0; job->done.load(std::memory_order_acquire) < count;) {
    pause();
    if (++spins > 1000) std::this_thread::yield();
  }
}

}  // namespace jaxllm
