// The one way in which this library reports a broken rule: an Error whose message holds the numbers it saw.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace kronafuse {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

// Out of line of the hot path: a failing check may cost what it likes, a passing one is a branch.
template <class... Values>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Values&... values) {
  std::ostringstream text;
  (text << ... << values);
  throw Error(text.str());
}

}  // namespace detail
}  // namespace kronafuse

// KF_CHECK(x.size[1] == k, "mix: x's K must equal I1·I2 = ", k, "; got ", x.size[1]);
#define KF_CHECK(condition, ...)               \
  do {                                         \
    if (!(condition)) [[unlikely]] {           \
      ::kronafuse::detail::fail(__VA_ARGS__);  \
    }                                          \
  } while (false)
