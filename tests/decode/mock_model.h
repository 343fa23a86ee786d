#pragma once
// A model whose logits are a fixed function of the real tokens seen so far: any mistake in masks, caches, crops or row
// order changes them. And a tokenizer whose ids are bytes.
#include <torch/torch.h>

#include <set>

#include "moiety/io/tokenizer.h"
#include "moiety/models/model.h"

namespace moiety::test {

class MockModel : public CausalModel {
 public:
  explicit MockModel(int64_t vocabulary = 300, int64_t context = 4096) : vocabulary_(vocabulary), context_(context) {
    register_parameter("unused", torch::zeros({1}));
  }

  torch::Tensor forward(const torch::Tensor& ids, Pass& pass) override {
    const auto state = hidden(ids, pass);
    auto h = pass.last_logits_only ? state.slice(1, -1) : state;
    auto logits = torch::empty({h.size(0), h.size(1), vocabulary_});
    for (int64_t b = 0; b < h.size(0); ++b)
      for (int64_t t = 0; t < h.size(1); ++t) {
        auto x = static_cast<uint64_t>(h[b][t][0].item<int64_t>());
        float* out = logits[b][t].data_ptr<float>();
        for (int64_t v = 0; v < vocabulary_; ++v) {
          x = x * 6364136223846793005ull + 1442695040888963407ull;
          out[v] = static_cast<float>(x >> 40) * (8.0f / (1 << 24)) - 4.0f;
        }
        if (!favourite.empty())
          out[favourite[static_cast<size_t>(h[b][t][1].item<int64_t>()) % favourite.size()]] += 20.0f;
      }
    return logits;
  }

  // [B, T, 2]: a hash of the tokens so far, and how many they are.
  torch::Tensor hidden(const torch::Tensor& ids, Pass& pass) override {
    ++passes;
    fed += ids.numel();
    const int64_t batch = ids.size(0), tokens = ids.size(1);
    auto mask = pass.mask.defined() ? pass.mask : torch::ones({batch, tokens}, torch::kBool);
    auto k = ids.to(torch::kFloat64).view({batch, 1, tokens, 1});
    int64_t past = 0;
    if (pass.cache) {
      past = pass.cache->length();
      k = pass.cache->append(0, k, k).first;
      if (past > 0)
        mask = torch::cat(
            {pass.cache->mask().defined() ? pass.cache->mask() : torch::ones({batch, past}, torch::kBool), mask}, 1);
      pass.cache->advance(tokens, mask, mask.sum(1));
    }
    auto out = torch::empty({batch, tokens, 2}, torch::kInt64);
    for (int64_t b = 0; b < batch; ++b) {
      uint64_t hash = 1469598103934665603ull;
      int64_t count = 0;
      for (int64_t s = 0; s < past + tokens; ++s) {
        if (mask[b][s].item<bool>()) {
          hash = (hash ^ static_cast<uint64_t>(k[b][0][s][0].item<double>())) * 1099511628211ull;
          ++count;
        }
        if (s >= past) {
          out[b][s - past][0] = static_cast<int64_t>(hash >> 1);
          out[b][s - past][1] = count;
        }
      }
    }
    return out;
  }
  KvCache make_cache() const override { return KvCache(1); }
  int64_t vocab_size() const override { return vocabulary_; }
  int64_t context_length() const override { return context_; }
  int64_t blocks() const override { return 1; }
  int64_t experts(int64_t) const override { return 0; }
  const nlohmann::json& config() const override { return config_; }

  std::vector<int64_t> favourite;  ///< when set: the token chosen behind n tokens is favourite[n % size]
  int64_t passes = 0;
  int64_t fed = 0;

 private:
  int64_t vocabulary_, context_;
  nlohmann::json config_ = nlohmann::json::object();
};

/// Ids below 256 are bytes, 256 is the end, the others are the letter 'x'.
class ByteTokenizer : public Tokenizer {
 public:
  std::vector<int64_t> encode(std::string_view text, bool, bool) const override {
    std::vector<int64_t> ids;
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::string decode(std::span<const int64_t> ids, bool skip_special) const override {
    std::string text, out;
    for (const int64_t id : ids)
      if (id != 256)
        text += id < 256 ? static_cast<char>(id) : 'x';
      else if (!skip_special)
        text += "<end>";
    // Ill-formed bytes become U+FFFD, one each.
    for (size_t i = 0; i < text.size();) {
      const auto lead = static_cast<unsigned char>(text[i]);
      const size_t size = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
      size_t good = size == 0 ? 0 : 1;
      while (good > 0 && good < size && i + good < text.size() && (text[i + good] & 0xC0) == 0x80) ++good;
      if (size > 0 && good == size)
        out += text.substr(i, size);
      else
        out += "\xEF\xBF\xBD";
      i += std::max<size_t>(good, 1);
    }
    return out;
  }
  std::string piece(int64_t id) const override { return id == 256 ? "<end>" : decode(std::vector<int64_t>{id}, false); }
  std::optional<int64_t> id(std::string_view piece) const override {
    return piece == "<end>"    ? std::optional<int64_t>(256)
           : piece.size() == 1 ? std::optional<int64_t>(piece[0])
                               : std::nullopt;
  }
  int64_t size() const override { return 300; }
  bool is_special(int64_t id) const override { return id == 256; }
  std::string kind() const override { return "bytes"; }
  std::optional<int64_t> bos() const override { return std::nullopt; }
  std::optional<int64_t> eos() const override { return 256; }
  std::optional<int64_t> pad() const override { return std::nullopt; }
  std::optional<int64_t> unk() const override { return std::nullopt; }
  std::string chat_template() const override { return ""; }
  std::unique_ptr<Decoding> decoding(bool skip_special) const override {
    return std::make_unique<Stream>(*this, skip_special, hold);
  }
  size_t hold = 0;  ///< bytes that a stream keeps back until it is flushed or goes on, as some decoders must

 private:
  class Stream : public Decoding {
   public:
    Stream(const ByteTokenizer& owner, bool skip_special, size_t hold)
        : owner_(owner), skip_special_(skip_special), hold_(hold) {}
    std::string push(int64_t id) override {
      ids_.push_back(id);
      std::string text = owner_.decode(ids_, skip_special_);
      while (text.ends_with("\xEF\xBF\xBD")) text.resize(text.size() - 3);
      return give(text.substr(0, text.size() - std::min(hold_, text.size())));
    }
    std::string flush() override { return give(owner_.decode(ids_, skip_special_)); }

   private:
    std::string give(const std::string& text) {
      if (text.size() <= given_) return {};
      std::string fresh = text.substr(given_);
      given_ = text.size();
      return fresh;
    }
    const ByteTokenizer& owner_;
    bool skip_special_;
    size_t hold_, given_ = 0;
    std::vector<int64_t> ids_;
  };
};

}  // namespace moiety::test
