#pragma once
// Streaming decode for the small tokenizers of tests: decodes everything again at each id and holds back what is not yet a character.
#include <memory>
#include <string>
#include <vector>

#include "moiety/io/tokenizer.h"

namespace moiety::test {

class WholeDecoding : public Tokenizer::Decoding {
 public:
  WholeDecoding(const Tokenizer& tokenizer, bool skip_special) : tokenizer_(tokenizer), skip_special_(skip_special) {}
  std::string push(int64_t id) override {
    ids_.push_back(id);
    const std::string text = tokenizer_.decode(ids_, skip_special_);
    return text.ends_with("\xEF\xBF\xBD") ? "" : rest(text);
  }
  std::string flush() override { return rest(tokenizer_.decode(ids_, skip_special_)); }

 private:
  std::string rest(const std::string& text) {
    std::string out = text.substr(std::min(given_, text.size()));
    given_ = text.size();
    return out;
  }

  const Tokenizer& tokenizer_;
  bool skip_special_;
  std::vector<int64_t> ids_;
  size_t given_ = 0;
};

}  // namespace moiety::test
