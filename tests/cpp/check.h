// CHECK(condition, message parts...): counts and prints failures; report() is the exit status of a test.
#pragma once

#include <cmath>
#include <cstdio>
#include <iostream>
#include <sstream>

inline int failures = 0;

template <typename... Parts>
void fail(const char* file, int line, const Parts&... parts) {
  if (++failures > 20) return;
  std::ostringstream text;
  ((text << parts), ...);
  std::cerr << file << ":" << line << ": " << text.str() << std::endl;
}

#define CHECK(condition, ...)                                                                         \
  do {                                                                                                \
    if (!(condition)) fail(__FILE__, __LINE__, "failed: " #condition " " __VA_OPT__(, ) __VA_ARGS__); \
  } while (0)

inline int report() {
  std::cout << (failures ? "FAILED, " : "passed, ") << failures << " failures" << std::endl;
  return failures != 0;
}
