// Locks for a C++ library built without threads, which then has none: a model library in a browser
// runs on one thread, so they have nothing to do.
#pragma once

#include <mutex>
#include <thread>

#if defined(_LIBCPP_VERSION) && !_LIBCPP_HAS_THREADS

#include <chrono>

namespace std {

class mutex {
 public:
  constexpr mutex() = default;
  mutex(const mutex&) = delete;
  mutex& operator=(const mutex&) = delete;
  void lock() {}
  bool try_lock() { return true; }
  void unlock() {}
};

class recursive_mutex : public mutex {};

template <typename... Mutexes>
class scoped_lock {
 public:
  explicit scoped_lock(Mutexes&...) {}
  scoped_lock(const scoped_lock&) = delete;
  scoped_lock& operator=(const scoped_lock&) = delete;
};

namespace this_thread {

template <typename Rep, typename Period>
void sleep_for(const chrono::duration<Rep, Period>&) {}

}  // namespace this_thread

}  // namespace std

#endif
