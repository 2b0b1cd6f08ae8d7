// "kernel<bf16, 128>" out of the launching template's __PRETTY_FUNCTION__: for messages.
#pragma once

#include <string>

namespace kronafuse::cuda {

inline std::string kernel_name(const char* pretty) {
  const std::string text = pretty;
  const std::string mark = "Kernel = ";
  const size_t begin = text.find(mark);
  if (begin == std::string::npos) return text;
  const size_t end = text.find_first_of(";]", begin);
  return text.substr(begin + mark.size(), end == std::string::npos ? end : end - begin - mark.size());
}

}  // namespace kronafuse::cuda
