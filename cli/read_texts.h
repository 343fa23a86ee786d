#pragma once
// Text files as token ids, for the verbs that read a model's own way through a text.
#include <string>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/io/tokenizer.h"

namespace moiety::cli {

/// Error: a file that is not there or gives no tokens.
inline std::vector<std::vector<int64_t>> read_texts(const Tokenizer& tokenizer, const std::vector<std::string>& paths,
                                                    int64_t limit_tokens) {
  std::vector<std::vector<int64_t>> out;
  for (const auto& path : paths) {
    auto ids = tokenizer.encode(read_text(path, int64_t{4} << 30), false);
    check(!ids.empty(), "{} gives no tokens", path);
    if (limit_tokens > 0 && static_cast<int64_t>(ids.size()) > limit_tokens)
      ids.resize(static_cast<size_t>(limit_tokens));
    out.push_back(std::move(ids));
  }
  return out;
}

}  // namespace moiety::cli
