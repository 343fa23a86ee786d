#include "moiety/io/edge_experts.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <regex>
#include <unordered_map>

#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/io/mapped_file.h"
#include "moiety/io/safetensors.h"
#include "moiety/kernels/half.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMostExperts = 1 << 20;
constexpr int64_t kMostWidth = int64_t{1} << 24;

struct Projection {
  const char* name;
  bool down;
};
constexpr Projection kProjections[] = {{"gate", false}, {"up", false}, {"down", true}};

int64_t rows_of(const EdgeLayout& l, const Projection& p) {
  return p.down ? l.hidden : l.width;
}
int64_t columns_of(const EdgeLayout& l, const Projection& p) {
  return p.down ? l.width : l.hidden;
}

std::string name_of(int64_t block, const char* projection, int64_t expert, const char* what) {
  return fmt::format("blk.{}.ffn_{}.{}.{}", block, projection, expert, what);
}

// The tensors of one expert in the order of the file: all scales before all codes, so that halves stay aligned.
std::vector<TensorInfo> tensors_of(const EdgeLayout& l, int64_t layer, int64_t expert) {
  const int64_t block = l.blocks[static_cast<size_t>(layer)],
                bits = l.bits[static_cast<size_t>(layer * l.experts + expert)];
  std::vector<TensorInfo> out;
  if (bits >= 16) {
    for (const auto& p : kProjections)
      out.push_back({name_of(block, p.name, expert, "weight"),
                     bits == 16 ? Format::F16 : Format::F32,
                     {rows_of(l, p), columns_of(l, p)}});
    return out;
  }
  for (const auto& p : kProjections)
    out.push_back({name_of(block, p.name, expert, "scale"), Format::F16, {rows_of(l, p)}});
  for (const auto& p : kProjections)
    out.push_back({name_of(block, p.name, expert, "q"),
                   Format::U8,
                   {rows_of(l, p), channel_row_bytes(columns_of(l, p), static_cast<int>(bits))}});
  return out;
}

int64_t bytes_of(const std::vector<TensorInfo>& tensors) {
  int64_t bytes = 0;
  for (const auto& t : tensors) bytes += t.bytes();
  return bytes;
}

std::span<const std::byte> halves(const std::vector<uint16_t>& values) {
  return std::as_bytes(std::span(values));
}

}  // namespace

int64_t EdgeLayout::stored_bytes(int64_t bits_of_expert) const {
  EdgeLayout one = *this;
  one.blocks = {0};
  one.experts = 1;
  one.bits = {bits_of_expert};
  return bytes_of(tensors_of(one, 0, 0));
}

void EdgeLayout::validate(const std::string& where) const {
  check(!blocks.empty() && experts > 0 && experts <= kMostExperts, "{}: {} layers of {} experts are no mixture", where,
        blocks.size(), experts);
  check(hidden > 0 && width > 0 && hidden <= kMostWidth && width <= kMostWidth,
        "{}: experts of {} hidden units between {} cannot be", where, width, hidden);
  check(static_cast<int64_t>(bits.size()) == layers() * experts,
        "{}: edgemoe.bits has {} widths, but {} layers of {} experts need {}", where, bits.size(), layers(), experts,
        layers() * experts);
  for (size_t i = 0; i < bits.size(); ++i)
    check(bits[i] == 2 || bits[i] == 4 || bits[i] == 8 || bits[i] == 16 || bits[i] == 32,
          "{}: edgemoe.bits[{}] is {}; widths are 2, 4, 8, 16 and 32", where, i, bits[i]);
  for (size_t i = 0; i < blocks.size(); ++i)
    check(blocks[i] >= 0 && (i == 0 || blocks[i] > blocks[i - 1]), "{}: edgemoe.blocks does not rise", where);
}

fs::path edge_experts_path(const fs::path& model) {
  fs::path out = model;
  return out.replace_extension(".experts.safetensors");
}

void write_edge_keys(GgufWriter& writer, const EdgeLayout& layout) {
  const auto ints = [](const std::vector<int64_t>& v) { return std::vector<int32_t>(v.begin(), v.end()); };
  writer.set_array_i32("edgemoe.bits", ints(layout.bits));
  writer.set_array_i32("edgemoe.blocks", ints(layout.blocks));
  writer.set_u32("edgemoe.expert_count", static_cast<uint32_t>(layout.experts));
  writer.set_u32("edgemoe.hidden_size", static_cast<uint32_t>(layout.hidden));
  writer.set_u32("edgemoe.expert_width", static_cast<uint32_t>(layout.width));
  writer.set_bool("edgemoe.bf16", layout.bf16);
  writer.set("edgemoe.router_hash", layout.router_hash);
}

WriteReport write_edge_model(const Checkpoint& source, const fs::path& file, const EdgeLayout& layout,
                             WriteOptions options) {
  layout.validate(file.string());
  options.leave_out = [](const std::string& name) {
    static const std::regex form("blk\\.[0-9]+\\.ffn_(gate|up|down|gate_up)(_exps|\\.[0-9]+)\\.weight");
    return std::regex_match(name, form);
  };
  options.keys = [&](GgufWriter& writer) { write_edge_keys(writer, layout); };
  return write_gguf(source, file, options);
}

void round_to_width(std::span<float> weights, int64_t columns, int64_t bits, Int2Scale int2) {
  if (bits == 32) return;
  if (bits == 16) {
    for (float& w : weights) {
      const uint16_t h = float_to_half(w);
      check((h & 0x7fffu) < 0x7c00u, "{} is no half-precision number", w);
      w = half_to_float(h);
    }
    return;
  }
  std::vector<int8_t> codes(static_cast<size_t>(columns));
  for (size_t at = 0; at < weights.size(); at += static_cast<size_t>(columns)) {
    const auto row = weights.subspan(at, static_cast<size_t>(columns));
    const float s = half_to_float(quantize_channel(row, static_cast<int>(bits), int2, codes.data()));
    for (size_t i = 0; i < row.size(); ++i) row[i] = static_cast<float>(codes[i]) * s;
  }
}

void write_edge_experts(const fs::path& file, const EdgeLayout& layout, Int2Scale int2,
                        const std::function<EdgeExpert(int64_t layer, int64_t expert)>& expert,
                        const std::function<void(int64_t done, int64_t total)>& progress) {
  layout.validate(file.string());
  std::vector<TensorInfo> all;
  int64_t total = 0;
  const auto padding = [](int64_t bytes) { return (8 - bytes % 8) % 8; };
  for (int64_t l = 0; l < layout.layers(); ++l)
    for (int64_t e = 0; e < layout.experts; ++e) {
      const auto tensors = tensors_of(layout, l, e);
      const int64_t bytes = bytes_of(tensors), pad = padding(bytes);
      all.insert(all.end(), tensors.begin(), tensors.end());
      if (pad > 0)
        all.push_back({fmt::format("blk.{}.ffn_pad.{}", layout.blocks[static_cast<size_t>(l)], e), Format::U8, {pad}});
      total += bytes;
    }
  SafetensorsWriter writer(file, std::move(all), {{"format", "edgemoe"}, {"router_hash", layout.router_hash}});
  int64_t done = 0;
  for (int64_t l = 0; l < layout.layers(); ++l)
    for (int64_t e = 0; e < layout.experts; ++e) {
      const EdgeExpert weights = expert(l, e);
      const std::vector<float>* values[] = {&weights.gate, &weights.up, &weights.down};
      const auto tensors = tensors_of(layout, l, e);
      const int64_t bits = layout.bits[static_cast<size_t>(l * layout.experts + e)];
      std::vector<std::vector<std::byte>> codes;
      for (size_t p = 0; p < 3; ++p) {
        const int64_t rows = rows_of(layout, kProjections[p]), columns = columns_of(layout, kProjections[p]);
        const auto& w = *values[p];
        check(static_cast<int64_t>(w.size()) == rows * columns, "layer {}, expert {}: {} has {} weights, not {} x {}",
              l, e, kProjections[p].name, w.size(), rows, columns);
        try {
          if (bits == 32) {
            writer.write(tensors[p].name, std::as_bytes(std::span(w)));
          } else if (bits == 16) {
            std::vector<float> rounded = w;
            round_to_width(rounded, columns, 16, int2);
            std::vector<uint16_t> out(rounded.size());
            std::transform(rounded.begin(), rounded.end(), out.begin(), [](float x) { return float_to_half(x); });
            writer.write(tensors[p].name, halves(out));
          } else {
            const int64_t each = channel_row_bytes(columns, static_cast<int>(bits));
            std::vector<uint16_t> scales(static_cast<size_t>(rows));
            std::vector<int8_t> row(static_cast<size_t>(columns));
            auto& packed = codes.emplace_back(static_cast<size_t>(rows * each));
            for (int64_t r = 0; r < rows; ++r) {
              scales[static_cast<size_t>(r)] =
                  quantize_channel(std::span(w).subspan(static_cast<size_t>(r * columns), static_cast<size_t>(columns)),
                                   static_cast<int>(bits), int2, row.data());
              pack_channel(row, static_cast<int>(bits), packed.data() + r * each);
            }
            writer.write(tensors[p].name, halves(scales));
          }
        } catch (const Error& error) {
          fail("layer {}, expert {}, {}: {}", l, e, kProjections[p].name, error.what());
        }
      }
      for (size_t p = 0; p < codes.size(); ++p) writer.write(tensors[3 + p].name, codes[p]);
      const int64_t bytes = bytes_of(tensors), pad = padding(bytes);
      if (pad > 0)
        writer.write(fmt::format("blk.{}.ffn_pad.{}", layout.blocks[static_cast<size_t>(l)], e),
                     std::vector<std::byte>(static_cast<size_t>(pad)));
      done += bytes;
      if (progress) progress(done, total);
    }
  writer.finish();
}

std::shared_ptr<const EdgeExperts> EdgeExperts::open(const GgufFile& model, const fs::path& path) {
  if (!model.find("edgemoe.bits")) return nullptr;
  const std::string& where = model.where();
  auto out = std::make_shared<EdgeExperts>();
  EdgeLayout& l = out->layout_;
  const auto integers = [&](const char* key) {
    std::vector<int64_t> values;
    for (const double v : model.numbers(key)) {
      check(v >= 0 && v < 2147483648.0 && v == static_cast<double>(static_cast<int64_t>(v)),
            "{}: key {} holds {}, not a count", where, key, v);
      values.push_back(static_cast<int64_t>(v));
    }
    return values;
  };
  l.bits = integers("edgemoe.bits");
  l.blocks = integers("edgemoe.blocks");
  l.experts = model.integer("edgemoe.expert_count").value_or(0);
  l.hidden = model.integer("edgemoe.hidden_size").value_or(0);
  l.width = model.integer("edgemoe.expert_width").value_or(0);
  l.bf16 = model.boolean("edgemoe.bf16").value_or(false);
  l.router_hash = model.string("edgemoe.router_hash").value_or("");
  l.validate(where);

  out->path_ = edge_experts_path(path);
  check(fs::exists(out->path_), "{}: its experts are missing: they are looked for in {}, which belongs beside it",
        where, out->path_.string());
  out->file_ = MappedFile::open(out->path_);
  const auto file = SafetensorsFile::parse(out->file_->bytes(), out->path_.string(), out->file_);
  const auto hash = file->metadata().find("router_hash");
  check(hash != file->metadata().end() && hash->second == l.router_hash,
        "{}: these are the experts of another model than {}", out->path_.string(), where);
  for (int64_t layer = 0; layer < l.layers(); ++layer)
    for (int64_t e = 0; e < l.experts; ++e) {
      Range range;
      for (const TensorInfo& wanted : tensors_of(l, layer, e)) {
        check(file->has(wanted.name), "{}: tensor {} is missing; {} asks for {} bits of this expert",
              out->path_.string(), wanted.name, where, l.bits[out->index(layer, e)]);
        const TensorView v = file->get(wanted.name);
        check(v.format == wanted.format && v.shape == wanted.shape, "{}: tensor {} is {} [{}], not {} [{}]",
              out->path_.string(), wanted.name, info(v.format).name, fmt::join(v.shape, ", "), info(wanted.format).name,
              fmt::join(wanted.shape, ", "));
        const int64_t offset = v.data.data() - out->file_->bytes().data();
        if (range.bytes == 0) range.offset = offset;
        check(offset == range.offset + range.bytes, "{}: tensor {} does not follow the one before it of its expert",
              out->path_.string(), wanted.name);
        range.bytes += static_cast<int64_t>(v.data.size());
      }
      out->ranges_.push_back(range);
    }
  return out;
}

std::span<const std::byte> EdgeExperts::stored(int64_t layer, int64_t expert) const {
  const Range r = range(layer, expert);
  return file_->bytes().subspan(static_cast<size_t>(r.offset), static_cast<size_t>(r.bytes));
}

void EdgeExperts::decode(int64_t layer, int64_t expert, std::span<const std::byte> stored,
                         const std::array<std::byte*, 3>& out) const {
  const EdgeLayout& l = layout_;
  const auto bits = static_cast<int>(l.bits[index(layer, expert)]);
  check(static_cast<int64_t>(stored.size()) == range(layer, expert).bytes, "layer {}, expert {}: {} bytes read, not {}",
        layer, expert, stored.size(), range(layer, expert).bytes);
  const std::byte* scales = stored.data();
  const std::byte* from = bits < 16 ? scales + 2 * (2 * l.width + l.hidden) : scales;
  std::vector<float> row;
  for (size_t which = 0; which < 3; ++which) {
    const Projection& p = kProjections[which];
    const int64_t rows = rows_of(l, p), columns = columns_of(l, p);
    const int64_t each = bits < 16 ? channel_row_bytes(columns, bits) : columns * bits / 8;
    std::byte* to = out[which];
    if (to == nullptr) {
      from += rows * each;
      scales += 2 * rows;
      continue;
    }
    // Whole rows at a time through f32, then the compute dtype.
    row.resize(static_cast<size_t>(columns));
    for (int64_t r = 0; r < rows; ++r, from += each) {
      if (bits == 32) {
        std::memcpy(row.data(), from, static_cast<size_t>(each));
      } else if (bits == 16) {
        for (size_t i = 0; i < row.size(); ++i) {
          uint16_t h = 0;
          std::memcpy(&h, from + 2 * i, sizeof h);
          row[i] = half_to_float(h);
        }
      } else {
        uint16_t scale = 0;
        std::memcpy(&scale, scales, sizeof scale);
        scales += sizeof scale;
        dequantize_channel(from, scale, bits, row);
      }
      if (!l.bf16) {
        std::memcpy(to, row.data(), row.size() * 4);
        to += row.size() * 4;
        continue;
      }
      for (const float v : row) {
        const uint16_t b = float_to_bf16(v);
        std::memcpy(to, &b, sizeof b);
        to += sizeof b;
      }
    }
  }
}

namespace {

// Addresses without memory behind them until something is read.
std::shared_ptr<const void> reserved(size_t bytes, const std::byte*& data) {
  void* at = ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  check(at != MAP_FAILED, "{} bytes of addresses cannot be reserved: {}", bytes, std::strerror(errno));
  data = static_cast<const std::byte*>(at);
  return {at, [bytes](const void* p) { ::munmap(const_cast<void*>(p), bytes); }};
}

class EdgeCheckpoint : public Checkpoint {
 public:
  EdgeCheckpoint(std::shared_ptr<const Checkpoint> model, std::shared_ptr<const EdgeExperts> e, bool outline = false)
      : experts(std::move(e)), model_(std::move(model)), outline_(outline), tensors_(model_->tensors()) {
    const EdgeLayout& l = experts->layout();
    for (int64_t layer = 0; layer < l.layers(); ++layer)
      for (size_t p = 0; p < 3; ++p) {
        TensorInfo t{fmt::format("model.layers.{}.mlp.experts.{}_proj", l.blocks[static_cast<size_t>(layer)],
                                 kProjections[p].name),
                     l.bf16 ? Format::BF16 : Format::F32,
                     {l.experts, rows_of(l, kProjections[p]), columns_of(l, kProjections[p])}};
        check(!model_->has(t.name), "{}: tensor {} is in the model file and among its experts", model_->path().string(),
              t.name);
        stacks_[t.name] = {layer, p};
        tensors_.push_back(std::move(t));
      }
  }
  const nlohmann::json& config() const override { return model_->config(); }
  const nlohmann::json& generation_config() const override { return model_->generation_config(); }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  bool has(const std::string& name) const override { return stacks_.count(name) > 0 || model_->has(name); }
  TensorView get(const std::string& name) const override {
    const auto it = stacks_.find(name);
    if (it == stacks_.end()) return model_->get(name);
    const EdgeLayout& l = experts->layout();
    const int64_t one = experts->matrix_bytes(), layer = it->second.first;
    TensorView v;
    v.name = name;
    v.format = l.bf16 ? Format::BF16 : Format::F32;
    const Projection& p = kProjections[it->second.second];
    v.shape = {l.experts, rows_of(l, p), columns_of(l, p)};
    const auto size = static_cast<size_t>(one * l.experts);
    if (outline_) {
      const std::byte* data = nullptr;
      v.owner = reserved(size, data);
      v.data = {data, size};
      return v;
    }
    auto bytes = std::make_shared<std::vector<std::byte>>(size);
    for (int64_t e = 0; e < l.experts; ++e) {
      std::array<std::byte*, 3> to{};
      to[it->second.second] = bytes->data() + e * one;
      experts->decode(layer, e, experts->stored(layer, e), to);
    }
    v.data = *bytes;
    v.owner = bytes;
    return v;
  }
  std::shared_ptr<const Checkpoint> outline() const { return std::make_shared<EdgeCheckpoint>(model_, experts, true); }
  fs::path path() const override { return model_->path(); }
  std::shared_ptr<const GgufFile> gguf() const override { return model_->gguf(); }
  int64_t bytes_on_disk() const override {
    return model_->bytes_on_disk() + static_cast<int64_t>(fs::file_size(experts->path()));
  }

  std::shared_ptr<const EdgeExperts> experts;

 private:
  std::shared_ptr<const Checkpoint> model_;
  bool outline_;
  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, std::pair<int64_t, size_t>> stacks_;  // layer, projection
};

}  // namespace

std::shared_ptr<const Checkpoint> with_edge_experts(std::shared_ptr<const Checkpoint> model,
                                                    std::shared_ptr<const EdgeExperts> experts) {
  return std::make_shared<EdgeCheckpoint>(std::move(model), std::move(experts));
}

std::shared_ptr<const Checkpoint> edge_outline(std::shared_ptr<const Checkpoint> checkpoint) {
  const auto* edge = dynamic_cast<const EdgeCheckpoint*>(checkpoint.get());
  return edge ? edge->outline() : checkpoint;
}

std::shared_ptr<const EdgeExperts> edge_experts_of(const Checkpoint& checkpoint) {
  const auto* edge = dynamic_cast<const EdgeCheckpoint*>(&checkpoint);
  return edge ? edge->experts : nullptr;
}

}  // namespace moiety
