#include "moiety/io/checkpoint_writer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <future>
#include <map>
#include <mutex>
#include <optional>
#include <regex>
#include <set>
#include <thread>
#include <unordered_map>

#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/text.h"
#include "moiety/io/edge_experts.h"
#include "moiety/io/gguf_names.h"
#include "moiety/io/gguf_tokenizer.h"
#include "moiety/io/hf_defaults.h"
#include "moiety/io/mapped_file.h"
#include "moiety/io/overlay.h"
#include "moiety/io/tokenizer_files.h"

namespace fs = std::filesystem;
using nlohmann::json;

namespace moiety {

void mxfp4_to_gguf(const std::byte* blocks, std::byte scale, std::byte* out) {
  out[0] = scale;
  auto element = [&](int i) { return std::to_integer<unsigned>(blocks[i / 2]) >> (i % 2 * 4) & 15u; };
  for (int j = 0; j < 16; ++j) out[1 + j] = static_cast<std::byte>(element(j) | element(j + 16) << 4);
}

void mxfp4_from_gguf(const std::byte* block, std::byte* blocks, std::byte& scale) {
  scale = block[0];
  auto element = [&](int i) { return std::to_integer<unsigned>(block[1 + i % 16]) >> (i / 16 * 4) & 15u; };
  for (int j = 0; j < 16; ++j) blocks[j] = static_cast<std::byte>(element(2 * j) | element(2 * j + 1) << 4);
}

namespace {

// ---- One tensor to write ----

/// How the rows of a target come about. Either each row is a row of a source (`row`, with `add` put on every value), or
/// whole slabs of rows are computed (`slab`), or the bytes are made directly (`raw`).
/// Pages of a mapped file that were read through go; whoever looks again reads them again.
void give_back(std::span<const std::byte> bytes) {
  if (bytes.empty() || !MappedFile::locate(bytes.data())) return;
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE)), at = reinterpret_cast<uintptr_t>(bytes.data());
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes.size()) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

/// A tensor of the checkpoint whose bytes are fetched when something looks at them. Copies are the same tensor.
class Source : public TensorInfo {
 public:
  struct Held;
  using Live = std::vector<std::shared_ptr<Held>>;  ///< those with bytes
  Source(const TensorInfo& info, std::function<TensorView()> get, std::shared_ptr<Live> live)
      : TensorInfo(info), held_(std::make_shared<Held>(std::move(get), std::move(live))) {}
  /// Safe from several threads.
  std::span<const std::byte> bytes() const {
    Held& h = *held_;
    if (!h.ready.load(std::memory_order_acquire)) fetch(held_);
    if (!h.looked_at.load(std::memory_order_relaxed)) h.looked_at.store(true, std::memory_order_relaxed);
    return h.view.data;
  }
  /// Gives back what nothing has looked at since the last call.
  static void release(Live& live) {
    std::erase_if(live, [](const std::shared_ptr<Held>& h) {
      if (h->looked_at.exchange(false)) return false;
      h->ready = false;
      give_back(h->view.data);
      h->view = {};
      return true;
    });
  }
  struct Held {
    Held(std::function<TensorView()> g, std::shared_ptr<Live> l) : get(std::move(g)), live(std::move(l)) {}
    std::function<TensorView()> get;
    std::shared_ptr<Live> live;
    std::atomic<bool> ready{false}, looked_at{false};
    TensorView view;
  };

 private:
  static void fetch(const std::shared_ptr<Held>& held) {
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    if (held->ready.load(std::memory_order_relaxed)) return;
    held->view = held->get();
    held->live->push_back(held);
    held->ready.store(true, std::memory_order_release);
  }
  std::shared_ptr<Held> held_;
};

/// All tensors of a checkpoint by name. Each is fetched when it is written and is no longer in memory behind the next.
class Sources {
 public:
  explicit Sources(const Checkpoint& checkpoint) {
    for (const TensorInfo& t : checkpoint.tensors()) {
      index_.emplace(t.name, all_.size());
      all_.push_back(of(t, [&checkpoint, name = t.name] { return checkpoint.get(name); }));
    }
  }
  ~Sources() { live_->clear(); }  // they hold the list themselves
  Sources(const Sources&) = delete;
  Sources& operator=(const Sources&) = delete;
  const Source& get(const std::string& name) const {
    const auto it = index_.find(name);
    check(it != index_.end(), "there is no tensor '{}'", shown(name));
    return all_[it->second];
  }
  /// One that the checkpoint does not name.
  Source of(const TensorInfo& info, std::function<TensorView()> get) const { return {info, std::move(get), live_}; }
  /// Behind every written target.
  void release() const { Source::release(*live_); }

 private:
  std::shared_ptr<Source::Live> live_ = std::make_shared<Source::Live>();
  std::vector<Source> all_;
  std::unordered_map<std::string, size_t> index_;
};

struct Target {
  TensorInfo info;
  std::string hf_name;  ///< the HF name that patterns may mean
  std::vector<Source> sources;
  int64_t cols = 0;  ///< row length; 1 for vectors whose elements are permuted
  std::function<std::pair<size_t, int64_t>(int64_t row)> row;
  float add = 0;
  int64_t slabs = 0;
  std::function<void(int64_t slab, float* out)> slab;
  std::function<void(std::byte* out)> raw;
};

Target copy_of(Source view, std::string name) {
  Target t;
  t.info = static_cast<const TensorInfo&>(view);
  t.hf_name = view.name;
  t.info.name = std::move(name);
  t.cols = view.cols();
  t.row = [](int64_t r) { return std::pair<size_t, int64_t>{0, r}; };
  t.sources.push_back(std::move(view));
  return t;
}

int threads_of(const WriteOptions& options) {
  if (options.threads > 0) return options.threads;
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

/// Calls work(begin, end) for pieces of [0, count) on several threads; passes the first exception on.
void in_parallel(int64_t count, int64_t piece, int threads, const std::function<void(int64_t, int64_t)>& work) {
  const int64_t pieces = (count + piece - 1) / piece;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  auto run = [&] {
    try {
      for (int64_t p; (p = next.fetch_add(1)) < pieces;) work(p * piece, std::min(count, (p + 1) * piece));
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
      next = pieces;
    }
  };
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < std::min<int64_t>(threads, pieces); ++i) pool.emplace_back(run);
  run();
  for (auto& t : pool) t.join();
  if (error) std::rethrow_exception(error);
}

void source_row(const Source& view, int64_t cols, int64_t row, float* out) {
  const int64_t bytes = row_bytes(view.format, cols);
  dequantize_row(view.format, view.bytes().data() + row * bytes, out, cols);
}

// Rounds to infinity.
constexpr float kAboveF16 = 65520.f;

std::span<const std::byte> encode(const Target& t, int threads, std::vector<std::byte>& memory) {
  const auto size = static_cast<size_t>(t.info.bytes());
  if (memory.size() < size) memory = std::vector<std::byte>(size);  // kept: new pages cost more than what fills them
  const std::span<std::byte> out(memory.data(), size);
  if (t.raw) {
    std::fill(out.begin(), out.end(), std::byte{0});
    t.raw(out.data());
    return out;
  }
  if (t.info.elements() == 0) return out;
  const int64_t rows = t.info.elements() / t.cols, bytes = row_bytes(t.info.format, t.cols);
  auto quantize = [&](const float* x, int64_t row) {
    if (t.info.format == Format::F16)
      for (int64_t i = 0; i < t.cols; ++i)
        check(!(std::abs(x[i]) >= kAboveF16) || std::isinf(x[i]),
              "tensor '{}' holds {} in row {}, column {}, which is beyond f16: write bf16 or f32", t.info.name, x[i],
              row, i);
    try {
      quantize_row(t.info.format, x, out.data() + row * bytes, t.cols);
    } catch (const Error& e) {
      fail("tensor '{}', row {}: {}", t.info.name, row, e.what());
    }
  };
  if (t.slab) {
    const int64_t per_slab = rows / t.slabs;
    in_parallel(t.slabs, 1, threads, [&](int64_t begin, int64_t end) {
      std::vector<float> values(static_cast<size_t>(per_slab * t.cols));
      for (int64_t s = begin; s < end; ++s) {
        t.slab(s, values.data());
        for (int64_t r = 0; r < per_slab; ++r) quantize(values.data() + r * t.cols, s * per_slab + r);
      }
    });
    return out;
  }
  in_parallel(rows, std::max<int64_t>(1, (int64_t{1} << 19) / std::max<int64_t>(t.cols, 1)), threads,
              [&](int64_t begin, int64_t end) {
                std::vector<float> values(static_cast<size_t>(t.cols));
                for (int64_t r = begin; r < end; ++r) {
                  const auto [source, row] = t.row(r);
                  const Source& view = t.sources[source];
                  if (view.format == t.info.format && t.add == 0) {
                    // As many rows as lie behind each other.
                    int64_t run = 1;
                    while (r + run < end && t.row(r + run) == std::pair{source, row + run}) ++run;
                    MappedFile::copy(view.bytes().data() + row * bytes,
                                     out.subspan(static_cast<size_t>(r * bytes), static_cast<size_t>(run * bytes)));
                    r += run - 1;
                    continue;
                  }
                  source_row(view, t.cols, row, values.data());
                  if (t.add != 0)
                    for (float& v : values) v += t.add;
                  quantize(values.data(), r);
                }
              });
  return out;
}

// What is read ahead of a write, and what is worth a thread.
constexpr int64_t kMostAhead = int64_t{1} << 30, kLeastAhead = int64_t{1} << 20;

// Calls `use` with every target's bytes, in order. While it writes one the next is read and encoded, where both are not
// too large to be in memory together: the disk gives and takes at once.
template <class Use>
void for_each_encoded(const std::vector<Target>& targets, const Sources& sources, int threads, Use use) {
  std::vector<std::byte> memory[2];
  std::future<std::span<const std::byte>> next;
  for (size_t i = 0; i < targets.size(); ++i) {
    const auto bytes = next.valid() ? next.get() : encode(targets[i], threads, memory[i % 2]);
    sources.release();  // nobody looks at any now
    const int64_t ahead = i + 1 < targets.size() ? targets[i + 1].info.bytes() : 0;
    if (ahead + static_cast<int64_t>(bytes.size()) > kMostAhead)
      memory[(i + 1) % 2] = {};
    else if (ahead >= kLeastAhead)
      next = std::async(std::launch::async,
                        [&, i, threads] { return encode(targets[i + 1], threads, memory[(i + 1) % 2]); });
    use(targets[i], bytes);
    if (static_cast<int64_t>(bytes.size()) > kMostAhead / 2) memory[i % 2] = {};
  }
  sources.release();
}

bool is_float(Format f) {
  return f == Format::F32 || f == Format::F16 || f == Format::BF16 || f == Format::F64;
}
bool is_real(Format f) {
  return is_float(f) || is_block(f);
}

void need_shape(const TensorInfo& v, size_t dims) {
  check(v.shape.size() == dims, "tensor '{}' has {} dimensions; {} were expected", v.name, v.shape.size(), dims);
}

/// Row r of a head-wise permuted matrix, in the other order. To GGUF: target row (h, i, half) is source row (h, half,
/// i).
int64_t to_neighbours(int64_t r, int64_t head_dim) {
  const int64_t half = head_dim / 2, in = r % head_dim;
  return r - in + in % 2 * half + in / 2;
}
int64_t from_neighbours(int64_t r, int64_t head_dim) {
  const int64_t half = head_dim / 2, in = r % head_dim;
  return r - in + in % half * 2 + in / half;
}

void permute_rows(Target& t, int64_t heads, bool to_gguf) {
  const int64_t rows = t.info.shape.at(0);
  check(heads > 0 && rows % heads == 0 && rows / heads % 2 == 0,
        "tensor '{}': {} rows are not {} heads of an even size", t.info.name, rows, heads);
  const int64_t head_dim = rows / heads;
  if (t.info.shape.size() == 1) t.cols = 1;
  t.row = [=](int64_t r) {
    return std::pair<size_t, int64_t>{0, to_gguf ? to_neighbours(r, head_dim) : from_neighbours(r, head_dim)};
  };
}

int64_t config_int(const json& c, const char* key, int64_t otherwise) {
  const auto it = c.find(key);
  return it != c.end() && it->is_number() ? it->get<int64_t>() : otherwise;
}

bool ends_with_any(const std::string& s, std::initializer_list<const char*> ends) {
  return std::any_of(ends.begin(), ends.end(), [&](const char* e) { return s.ends_with(e); });
}

// ---- Formats of a GGUF file ----

struct Scheme {
  const char* name;
  Format base;
  int file_type;  ///< general.file_type
};
constexpr Scheme kSchemes[] = {
    {"f32", Format::F32, 0},      {"f16", Format::F16, 1},      {"bf16", Format::BF16, 32},
    {"q8_0", Format::Q8_0, 7},    {"q4_0", Format::Q4_0, 2},    {"q4_1", Format::Q4_1, 3},
    {"q5_0", Format::Q5_0, 8},    {"q5_1", Format::Q5_1, 9},    {"q4_k_s", Format::Q4_K, 14},
    {"q4_k_m", Format::Q4_K, 15}, {"q5_k_s", Format::Q5_K, 16}, {"q5_k_m", Format::Q5_K, 17},
    {"q6_k", Format::Q6_K, 18},   {"tq1_0", Format::TQ1_0, 36}, {"tq2_0", Format::TQ2_0, 37},
    {"mxfp4", Format::MXFP4, 38}, {"q4_k", Format::Q4_K, 15},   {"q5_k", Format::Q5_K, 17},
};

/// The format itself if its blocks divide a row and it can be written, else the nearest that does.
Format fitting(Format f, int64_t cols) {
  for (int step = 0; step < 4; ++step) {
    if (cols % info(f).block == 0 && info(f).can_quantize) return f;
    switch (f) {
      case Format::TQ1_0:
      case Format::TQ2_0:
        f = Format::Q4_0;
        break;
      case Format::Q4_K:
        f = Format::Q5_0;
        break;
      case Format::Q5_K:
        f = Format::Q5_1;
        break;
      case Format::Q6_K:
      case Format::Q5_0:
      case Format::Q5_1:
      case Format::Q4_0:
      case Format::Q4_1:
      case Format::MXFP4:
        f = Format::Q8_0;
        break;
      default:
        f = Format::F16;
    }
    if (f == Format::Q8_0 && cols % 32 != 0) f = Format::F16;
  }
  return Format::F16;
}

class Chooser {
 public:
  Chooser(const WriteOptions& options, int64_t layers, int64_t experts, bool tied)
      : layers_(layers), experts_(experts), tied_(tied) {
    if (!options.type.empty()) {
      std::string wanted = options.type;
      std::transform(wanted.begin(), wanted.end(), wanted.begin(), [](unsigned char c) { return std::tolower(c); });
      for (const auto& s : kSchemes)
        if (wanted == s.name) scheme_ = &s;
      check(scheme_ != nullptr, "there is no type '{}'{}; the types are {}", shown(options.type),
            did_you_mean(wanted, gguf_type_names()), list_of(gguf_type_names()));
      check(info(scheme_->base).can_quantize, "type '{}' can be read but not written", scheme_->name);
    }
    for (const auto& [pattern, type] : options.tensor_types) {
      const FormatInfo* f = find_format(type);
      check(f && f->gguf_id >= 0 && f->can_quantize,
            "tensor type '{}={}': '{}' is not a format that can be written to GGUF", pattern, type, type);
      try {
        patterns_.emplace_back(std::regex(pattern), f->format);
      } catch (const std::regex_error& e) {
        fail("tensor type '{}={}': '{}' is not a regular expression: {}", pattern, type, pattern, e.what());
      }
    }
  }

  int file_type(Format fallback) const {
    if (scheme_) return scheme_->file_type;
    for (const auto& s : kSchemes)
      if (s.base == fallback) return s.file_type;
    return 0;
  }

  Format choose(const Target& t) const {
    const std::string& name = t.info.name;
    const int64_t cols = t.info.cols();
    if (t.info.shape.size() < 2) return Format::F32;
    for (const auto& [pattern, format] : patterns_)
      if (std::regex_search(name, pattern) || std::regex_search(t.hf_name, pattern)) {
        check(cols % info(format).block == 0, "tensor '{}': rows of {} elements are not whole blocks of {} ({})", name,
              cols, info(format).block, info(format).name);
        return format;
      }
    const bool small = !name.ends_with(".weight") || name.find("norm") != std::string::npos ||
                       name.find("ffn_gate_inp") != std::string::npos || name.starts_with("position_embd") ||
                       name.starts_with("token_types") || name.starts_with("rope_");
    if (small) return Format::F32;
    const Format own = t.info.format;
    const bool keeps = info(own).gguf_id >= 0 && (is_float(own) || is_block(own)) && own != Format::F64;
    if (!scheme_) return keeps ? own : Format::F32;
    if (own == Format::MXFP4 && is_block(scheme_->base)) return own;  // as trained: requantizing could only lose
    return fitting(mixed(name), cols);
  }

 private:
  Format mixed(const std::string& name) const {
    const Format base = scheme_->base;
    if (!is_block(base)) return base;
    const std::string_view type = scheme_->name;
    const bool output = name == "output.weight" || (tied_ && name == "token_embd.weight");
    if (output) return base == Format::Q8_0 ? base : Format::Q6_K;
    if (name == "token_embd.weight" && (base == Format::TQ1_0 || base == Format::TQ2_0)) return Format::Q4_K;
    int64_t layer = -1;
    if (name.starts_with("blk.")) layer = std::atoll(name.c_str() + 4);
    const bool value = name.find(".attn_v.") != std::string::npos || name.find(".attn_v_b.") != std::string::npos ||
                       name.find(".attn_kv_b.") != std::string::npos;
    const bool down = name.find(".ffn_down") != std::string::npos;
    const int64_t n = std::max<int64_t>(layers_, 1);
    const bool more = layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2;
    if (base == Format::Q4_K || base == Format::Q5_K) {
      if (experts_ >= 8 && (value || name.find(".attn_k.") != std::string::npos))
        return Format::Q8_0;  // small beside the experts
      const bool medium = !type.ends_with("_s");
      if (medium && (value || down) && more) return Format::Q6_K;
      if (!medium && base == Format::Q4_K && ((value && layer < 4) || (down && layer < n / 8))) return Format::Q5_K;
    }
    return base;
  }

  const Scheme* scheme_ = nullptr;
  int64_t layers_, experts_;
  bool tied_;
  std::vector<std::pair<std::regex, Format>> patterns_;
};

// ---- HF -> GGUF ----

/// Name without what wraps a text model in multimodal and task-specific checkpoints; "" for parts that are not the text
/// model.
std::string plain_name(std::string name, const std::string& type) {
  for (const char* prefix : {"model.language_model.", "language_model.model."})
    if (name.starts_with(prefix)) return "model." + name.substr(std::string_view(prefix).size());
  if (name.starts_with("language_model.")) return name.substr(15);
  for (const char* other :
       {"vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."})
    if (name.starts_with(other)) return "";
  if (type == "bert" || type == "roberta" || type == "distilbert") {
    for (const char* prefix : {"bert.", "roberta.", "distilbert."})
      if (name.starts_with(prefix)) name = name.substr(std::string_view(prefix).size());
    for (const char* head : {"pooler.", "cls.", "lm_head.", "vocab_", "classifier", "pre_classifier", "qa_outputs"})
      if (name.starts_with(head)) return "";
    for (const auto& [old, now] : {std::pair{".gamma", ".weight"}, {".beta", ".bias"}})
      if (name.ends_with(old)) name = name.substr(0, name.size() - std::string_view(old).size()) + now;
  }
  if (ends_with_any(name, {".rotary_emb.inv_freq", ".position_ids", ".masked_bias", ".attn.bias"})) return "";
  return name;
}

struct Plan {
  std::vector<Target> targets;
  std::vector<std::string> warnings;

  /// Adds a target of rows gathered from one source.
  Target& gather(const Source& view, const std::string& name, std::vector<int64_t> shape,
                 std::function<int64_t(int64_t)> row) {
    Target t = copy_of(view, name);
    t.info.shape = std::move(shape);
    t.row = [row = std::move(row)](int64_t r) { return std::pair<size_t, int64_t>{0, row(r)}; };
    targets.push_back(std::move(t));
    return targets.back();
  }
  Target& computed(const Source& view, const std::string& name, std::vector<int64_t> shape, int64_t slabs,
                   std::function<void(int64_t, float*)> slab) {
    Target t = copy_of(view, name);
    t.info.shape = std::move(shape);
    t.cols = t.info.cols();
    t.slabs = slabs;
    t.slab = std::move(slab);
    if (is_block(t.info.format)) t.info.format = Format::F32;  // a new layout cannot keep the old blocks
    targets.push_back(std::move(t));
    return targets.back();
  }
};

/// [.., R, C] slab number `slab` as floats.
std::vector<float> slab_of(const Source& v, int64_t slab, int64_t rows) {
  const int64_t cols = v.cols();
  std::vector<float> out(static_cast<size_t>(rows * cols));
  for (int64_t r = 0; r < rows; ++r) source_row(v, cols, slab * rows + r, out.data() + r * cols);
  return out;
}

void plan_mxfp4(Plan& plan, const Source& blocks, const Source& scales, const std::string& layer, bool gate_up) {
  need_shape(blocks, 4);
  const int64_t experts = blocks.shape[0], rows = blocks.shape[1], groups = blocks.shape[2];
  check(blocks.shape[3] == 16 && scales.shape == std::vector<int64_t>({experts, rows, groups}) &&
            blocks.format == Format::U8 && scales.format == Format::U8,
        "tensor '{}' and its scales are not the two halves of MXFP4: U8 [E, rows, groups, 16] and U8 [E, rows, groups] "
        "were expected",
        blocks.name);
  auto add = [&](const std::string& part, int64_t first, int64_t step) {
    Target t;
    const int64_t kept = rows / step;
    t.info = {fmt::format("{}.ffn_{}_exps.weight", layer, part), Format::MXFP4, {experts, kept, groups * 32}};
    t.hf_name = blocks.name;
    t.cols = groups * 32;
    t.slabs = experts;
    auto pack = [=](int64_t e, int64_t r, std::byte* out) {
      const int64_t at = (e * rows + first + r * step) * groups;
      for (int64_t g = 0; g < groups; ++g)
        mxfp4_to_gguf(blocks.bytes().data() + (at + g) * 16, scales.bytes()[static_cast<size_t>(at + g)], out + g * 17);
    };
    t.raw = [=](std::byte* out) {
      for (int64_t e = 0; e < experts; ++e)
        for (int64_t r = 0; r < kept; ++r) pack(e, r, out + (e * kept + r) * groups * 17);
    };
    t.slab = [=](int64_t e, float* out) {
      std::vector<std::byte> row(static_cast<size_t>(groups * 17));
      for (int64_t r = 0; r < kept; ++r) {
        pack(e, r, row.data());
        dequantize_row(Format::MXFP4, row.data(), out + r * groups * 32, groups * 32);
      }
    };
    plan.targets.push_back(std::move(t));
  };
  if (gate_up) {
    check(rows % 2 == 0, "tensor '{}' interleaves gate and up but has an odd number of rows", blocks.name);
    add("gate", 0, 2);
    add("up", 1, 2);
  } else {
    add("down", 0, 1);
  }
}

Plan plan_gguf(const Checkpoint& ckpt, const Sources& sources, const json& config) {
  Plan plan;
  const std::string type = config.value("model_type", ""), arch = gguf_arch_of(config);
  const GgufArch& facts = *find_gguf_arch(arch);
  const json c = with_defaults(config);
  const int64_t heads = config_int(c, "num_attention_heads", config_int(c, "n_heads", 1));
  const int64_t kv_heads = config_int(c, "num_key_value_heads", heads);
  const int64_t layers = config_int(c, "num_hidden_layers", config_int(c, "n_layers", 0));
  const bool tied = c.value("tie_word_embeddings", json(false)) == true;

  std::map<std::string, std::map<int64_t, Source>> per_expert;  // target name -> expert -> tensor
  static const std::regex layer_form("^(?:model\\.layers|encoder\\.layers?|transformer\\.layer)\\.(\\d{1,6})\\.(.+)$");
  static const std::regex expert_form("^(blk\\.\\d+\\.ffn_(?:gate|up|down))\\.(\\d{1,6})\\.(weight|bias)$");
  std::vector<std::string> skipped;

  for (const TensorInfo& source : ckpt.tensors()) {
    const std::string name = plain_name(source.name, type);
    if (name.empty() || (name == "lm_head.weight" && tied)) {
      skipped.push_back(source.name);
      continue;
    }
    check(!name.ends_with("_scale_inv") && !name.ends_with(".qweight") && !name.ends_with(".weight_scale"),
          "tensor '{}': the checkpoint is quantized in a way that GGUF does not have ({}); convert it to bf16 first",
          source.name,
          c.contains("quantization_config") ? "see quantization_config" : "scaled integers or floats of 8 bits");
    const Source& view = sources.get(source.name);
    std::smatch m;
    std::string layer, leaf;
    if (std::regex_match(name, m, layer_form)) {
      if (layers > 0 && std::stoll(m[1]) >= layers) {  // extra layers that predict further tokens
        skipped.push_back(source.name);
        continue;
      }
      layer = fmt::format("blk.{}", std::stoll(m[1]));
      leaf = m[2];
    }

    // Fused and transposed layouts.
    if (leaf.ends_with("experts.gate_up_proj_blocks") || leaf.ends_with("experts.down_proj_blocks")) {
      const std::string scales = source.name.substr(0, source.name.size() - 6) + "scales";
      plan_mxfp4(plan, view, sources.get(scales), layer, leaf.ends_with("gate_up_proj_blocks"));
      continue;
    }
    if (leaf.ends_with("experts.gate_up_proj_scales") || leaf.ends_with("experts.down_proj_scales")) continue;
    if (type == "gpt_oss" && (leaf == "mlp.experts.gate_up_proj" || leaf == "mlp.experts.down_proj")) {
      need_shape(view, 3);  // [E, in, out]
      const int64_t experts = view.shape[0], in = view.shape[1], out = view.shape[2];
      const int64_t step = leaf == "mlp.experts.gate_up_proj" ? 2 : 1;
      for (int64_t first = 0; first < step; ++first) {
        const char* part = step == 1 ? "down" : first == 0 ? "gate" : "up";
        plan.computed(view, fmt::format("{}.ffn_{}_exps.weight", layer, part), {experts, out / step, in}, experts,
                      [=](int64_t e, float* to) {
                        const auto values = slab_of(view, e, in);
                        for (int64_t o = 0; o < out / step; ++o)
                          for (int64_t i = 0; i < in; ++i)
                            to[o * in + i] = values[static_cast<size_t>(i * out + first + o * step)];
                      });
      }
      continue;
    }
    if (type == "gpt_oss" && leaf == "mlp.experts.gate_up_proj_bias") {
      need_shape(view, 2);
      const int64_t experts = view.shape[0], both = view.shape[1];
      for (int64_t first = 0; first < 2; ++first)
        plan.computed(view, fmt::format("{}.ffn_{}_exps.bias", layer, first == 0 ? "gate" : "up"), {experts, both / 2},
                      experts, [=](int64_t e, float* to) {
                        const auto values = slab_of(view, e, 1);
                        for (int64_t i = 0; i < both / 2; ++i) to[i] = values[static_cast<size_t>(first + 2 * i)];
                      });
      continue;
    }
    const bool fused_experts = leaf.ends_with("experts.gate_up_proj") || leaf == "block_sparse_moe.input_linear.weight";
    if (fused_experts || leaf == "shared_mlp.input_linear.weight") {
      need_shape(view, fused_experts ? 3 : 2);
      const int64_t both = view.shape[view.shape.size() - 2], f = both / 2, d = view.cols();
      check(both % 2 == 0, "tensor '{}' holds gate above up but has an odd number of rows", source.name);
      for (int64_t part = 0; part < 2; ++part) {
        auto shape = view.shape;
        shape[shape.size() - 2] = f;
        shape.back() = d;
        plan.gather(
            view,
            fmt::format("{}.ffn_{}_{}.weight", layer, part == 0 ? "gate" : "up", fused_experts ? "exps" : "shexp"),
            shape, [=](int64_t r) { return r / f * both + part * f + r % f; });
      }
      continue;
    }
    if (leaf == "block_sparse_moe.output_linear.weight" || leaf == "block_sparse_moe.experts.down_proj") {
      plan.targets.push_back(copy_of(view, layer + ".ffn_down_exps.weight"));
      continue;
    }
    if (leaf == "self_attn.kv_b_proj.weight" && (type == "deepseek_v2" || type == "deepseek_v3")) {
      need_shape(view, 2);
      const int64_t nope = config_int(c, "qk_nope_head_dim", 0), value = config_int(c, "v_head_dim", 0),
                    rank = view.shape[1];
      check(nope > 0 && value > 0 && view.shape[0] == heads * (nope + value),
            "tensor '{}' has {} rows; {} heads of qk_nope_head_dim + v_head_dim = {} were expected", source.name,
            view.shape[0], heads, nope + value);
      plan.computed(view, layer + ".attn_k_b.weight", {heads, rank, nope}, heads, [=](int64_t h, float* to) {
        std::vector<float> row(static_cast<size_t>(rank));
        for (int64_t j = 0; j < nope; ++j) {
          source_row(view, rank, h * (nope + value) + j, row.data());
          for (int64_t i = 0; i < rank; ++i) to[i * nope + j] = row[static_cast<size_t>(i)];
        }
      });
      plan.gather(view, layer + ".attn_v_b.weight", {heads, value, rank},
                  [=](int64_t r) { return r / value * (nope + value) + nope + r % value; });
      continue;
    }

    const auto gguf = gguf_tensor_name(type == "gemma3" ? "gemma3_text" : type, name);
    check(gguf.has_value(), "tensor '{}' has no place in a GGUF file of architecture '{}'", source.name, arch);
    if (std::regex_match(*gguf, m, expert_form)) {
      per_expert[fmt::format("{}_exps.{}", m[1].str(), m[3].str())].emplace(std::stoll(m[2]), view);
      continue;
    }
    Target t = copy_of(view, *gguf);
    if (facts.rope_interleaved && ends_with_any(*gguf, {".attn_q.weight", ".attn_q.bias"}))
      permute_rows(t, heads, true);
    if (facts.rope_interleaved && ends_with_any(*gguf, {".attn_k.weight", ".attn_k.bias"}))
      permute_rows(t, kv_heads, true);
    if (facts.norm_offset_folded && gguf->ends_with("norm.weight")) t.add = 1;
    if (type == "roberta" && *gguf == "position_embd.weight") {
      const int64_t first = config_int(c, "pad_token_id", 1) + 1;
      need_shape(view, 2);
      check(view.shape[0] > first, "tensor '{}' has only {} rows", source.name, view.shape[0]);
      t.info.shape[0] -= first;
      t.row = [=](int64_t r) { return std::pair<size_t, int64_t>{0, r + first}; };
    }
    plan.targets.push_back(std::move(t));
  }

  for (auto& [name, experts] : per_expert) {
    Target t;
    const Source& one = experts.begin()->second;
    for (auto& [number, view] : experts) {
      check(number == static_cast<int64_t>(t.sources.size()), "expert {} of '{}' is missing", t.sources.size(), name);
      check(view.shape == one.shape && view.format == one.format,
            "tensor '{}' has another shape or format than expert 0", view.name);
      t.sources.push_back(view);
    }
    t.info = {name, one.format, one.shape};
    t.info.shape.insert(t.info.shape.begin(), static_cast<int64_t>(experts.size()));
    t.hf_name = one.name;
    t.cols = one.cols();
    const int64_t rows = one.rows();
    t.row = [rows](int64_t r) { return std::pair<size_t, int64_t>{static_cast<size_t>(r / rows), r % rows}; };
    plan.targets.push_back(std::move(t));
  }

  auto values = [&](const std::string& name, std::vector<float> x) {
    Target t;
    t.info = {name, Format::F32, {static_cast<int64_t>(x.size())}};
    t.hf_name = name;
    t.cols = static_cast<int64_t>(x.size());
    t.slabs = 1;
    t.slab = [x = std::move(x)](int64_t, float* out) { std::copy(x.begin(), x.end(), out); };
    plan.targets.push_back(std::move(t));
  };
  if ((arch == "gemma2" || arch == "gemma3") && layers != (arch == "gemma2" ? 46 : 62) &&
      config_int(c, "query_pre_attn_scalar", 0) != config_int(c, "head_dim", 0))
    plan.warnings.push_back(
        "query_pre_attn_scalar differs from head_dim, which GGUF has no key for: other readers will scale queries "
        "differently");
  if (type == "deepseek_v3" && c.value("rope_interleave", json(true)) == false)
    plan.warnings.push_back(
        "rope_interleave is false, which GGUF has no key for: other readers will rotate neighbours");
  if (arch != "bert" && arch != "nomic-bert") {
    if (auto freqs = llama3_rope_freqs(config); !freqs.empty()) values("rope_freqs.weight", std::move(freqs));
    const json rope = rope_parameters(c);
    if (rope["rope_type"] == "longrope")
      for (const char* which : {"long", "short"}) {
        const std::string key = fmt::format("{}_factor", which);
        check(rope.contains(key) && rope[key].is_array(), "config: rope_parameters of type longrope need a list '{}'",
              key);
        values(fmt::format("rope_factors_{}.weight", which), rope[key].get<std::vector<float>>());
      }
  }

  // Block by block, as readers walk the file.
  auto place = [](const Target& t) {
    const std::string& n = t.info.name;
    if (n.starts_with("blk.")) return int64_t{1} + static_cast<int64_t>(std::atoll(n.c_str() + 4));
    return n.starts_with("output") ? int64_t{1} << 40 : int64_t{0};
  };
  std::stable_sort(plan.targets.begin(), plan.targets.end(),
                   [&](const Target& a, const Target& b) { return place(a) < place(b); });
  if (!skipped.empty())
    plan.warnings.push_back(
        fmt::format("{} tensors have no place in the file and are left out ({})", skipped.size(), skipped[0]));
  return plan;
}

/// Hugging Face files of the tokenizer, or nothing when there are none.
std::optional<HfTokenizer> tokenizer_files(const Checkpoint& ckpt) {
  if (ckpt.gguf()) return hf_tokenizer(*ckpt.gguf());
  return read_tokenizer_files(fs::is_directory(ckpt.path()) ? ckpt.path() : ckpt.path().parent_path());
}

void report(WriteReport& out, const std::vector<Target>& targets) {
  for (const auto& t : targets) {
    out.tensors.push_back(t.info);
    out.bytes += t.info.bytes();
    out.elements += t.info.elements();
  }
}

Format most_common(const std::vector<Target>& targets) {
  std::map<Format, int64_t> count;
  for (const auto& t : targets) count[t.info.format] += t.info.elements();
  return std::max_element(count.begin(), count.end(), [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

}  // namespace

std::vector<std::string> gguf_type_names() {
  std::vector<std::string> out;
  for (const auto& s : kSchemes)
    if (info(s.base).can_quantize) out.emplace_back(s.name);
  return out;
}

namespace {

WriteReport write_gguf_checked(const Checkpoint& ckpt, const fs::path& file, const WriteOptions& options) {
  check(options.overwrite || options.dry_run || !fs::exists(file), "{}: exists already; remove it or ask to overwrite",
        file.string());
  WriteReport out;
  const auto source = ckpt.gguf();
  check(!source || !is_overlay(ckpt),
        "{} is a GGUF file: what was changed in it is written as a directory, of which `moiety convert` makes a GGUF "
        "file",
        ckpt.path().string());
  const bool edge = edge_experts_of(ckpt) != nullptr;
  const json& config = ckpt.config();
  const Sources sources(ckpt);
  Plan plan;
  if (source) {
    // Names, order and metadata stay; only formats may change.
    for (const auto& t : source->tensors()) {
      Target copy = copy_of(sources.of(t, [source, name = t.name] { return source->get(name); }), t.name);
      copy.hf_name = hf_tensor_name(config.value("model_type", ""), t.name);
      plan.targets.push_back(std::move(copy));
    }
    // Experts that lie in a file of their own come back as stacks.
    if (edge)
      for (const auto& t : ckpt.tensors())
        if (const auto name = gguf_tensor_name(config.value("model_type", ""), t.name); name && !source->has(*name))
          plan.targets.push_back(copy_of(sources.get(t.name), *name));
  } else {
    plan = plan_gguf(ckpt, sources, config);
  }
  if (options.leave_out) std::erase_if(plan.targets, [&](const Target& t) { return options.leave_out(t.info.name); });
  check(!plan.targets.empty(), "{}: there are no tensors to write", ckpt.path().string());
  const json c = with_defaults(config);
  int64_t experts = 0;
  for (const char* key : {"num_local_experts", "num_experts", "n_routed_experts"})
    experts = std::max(experts, config_int(c, key, 0));
  const bool tied = std::none_of(plan.targets.begin(), plan.targets.end(),
                                 [](const Target& t) { return t.info.name == "output.weight"; });
  const Chooser chooser(options, config_int(c, "num_hidden_layers", config_int(c, "n_layers", 0)), experts, tied);
  for (Target& t : plan.targets) {
    const bool directly = t.raw != nullptr;
    const Format own = t.info.format;
    if (!directly) check(is_real(own), "tensor '{}' is {}, which is not a weight", t.info.name, info(own).name);
    t.info.format = source && !is_real(own) ? own : chooser.choose(t);
    if (directly && t.info.format != own) t.raw = nullptr;
    check(t.info.name.size() < 64, "tensor '{}': GGUF names have fewer than 64 bytes", t.info.name);
  }
  report(out, plan.targets);
  out.warnings = plan.warnings;
  if (const auto own = c.find("moiety"); own != c.end() && own->is_object() && own->contains("experts"))
    out.warnings.push_back(
        "its layers have different numbers of experts, or rows of a router share some: moiety reads that, llama.cpp "
        "does not");

  std::optional<HfTokenizer> tokenizer;
  if (!source) {
    tokenizer = tokenizer_files(ckpt);
    if (!tokenizer) out.warnings.push_back("there is no tokenizer: the file will have none");
  }
  if (options.dry_run) return out;

  GgufWriter writer(file);
  if (source) {
    for (const auto& [key, value] : source->metadata())
      if (key != "general.file_type" && key != "general.quantization_version" && key != "general.alignment" &&
          !key.starts_with("split.") && !(edge && key.starts_with("edgemoe.")))
        writer.set(key, value);
  } else {
    writer.set("general.architecture", gguf_arch_of(config));
    writer.set("general.type", std::string("model"));
    const fs::path named =
        fs::is_directory(ckpt.path()) ? fs::absolute(ckpt.path()).lexically_normal() : ckpt.path().parent_path();
    std::string name = named.filename().empty() ? named.parent_path().filename().string() : named.filename().string();
    writer.set("general.name", name.empty() ? config.value("model_type", "model") : name);
    write_gguf_config(writer, config);
    // The config itself, for a lossless way back. Not of RoBERTa, whose file is a BERT (its first position rows are
    // dropped).
    if (const std::string type = config.value("model_type", ""); type != "roberta") {
      json kept = text_config(config);
      if (type == "gemma3") kept["model_type"] = "gemma3_text", kept["architectures"] = {"Gemma3ForCausalLM"};
      for (const char* flag :
           {"moiety_rope_interleaved", "moiety_norm_offset_folded", "moiety_rope_freqs", "quantization_config"})
        kept.erase(flag);
      writer.set("moiety.config", kept.dump(-1, ' ', false, json::error_handler_t::replace));
    }
    if (!ckpt.generation_config().empty())
      writer.set("moiety.generation_config",
                 ckpt.generation_config().dump(-1, ' ', false, json::error_handler_t::replace));
    if (tokenizer) {
      int64_t vocabulary = config_int(c, "vocab_size", 0);
      for (const auto& t : plan.targets)
        if (t.info.name == "token_embd.weight") vocabulary = t.info.rows();
      for (auto& w : write_gguf_tokenizer(writer, *tokenizer, c, vocabulary)) out.warnings.push_back(std::move(w));
    } else {
      writer.set("tokenizer.ggml.model", std::string("no_vocab"));
    }
  }
  writer.set_u32("general.quantization_version", 2);
  writer.set_u32("general.file_type", static_cast<uint32_t>(chooser.file_type(most_common(plan.targets))));
  if (options.keys) options.keys(writer);
  for (const Target& t : plan.targets) writer.declare(t.info);
  int64_t done = 0;
  for_each_encoded(plan.targets, sources, threads_of(options), [&](const Target& t, std::span<const std::byte> bytes) {
    writer.write(t.info.name, bytes);
    done += static_cast<int64_t>(bytes.size());
    if (options.progress) options.progress(done, out.bytes);
  });
  writer.finish();
  return out;
}

// ---- GGUF -> HF ----

Plan plan_hf(const Checkpoint& ckpt, const Sources& sources, json& config, Format dtype) {
  Plan plan;
  const std::string type = config.value("model_type", "");
  const bool interleaved = config.value("moiety_rope_interleaved", false),
             folded = config.value("moiety_norm_offset_folded", false);
  const int64_t heads = config_int(config, "num_attention_heads", config_int(config, "n_heads", 1));
  const int64_t kv_heads = config_int(config, "num_key_value_heads", heads);
  static const std::regex stack_form("^(model\\.layers\\.(\\d+)\\.)mlp\\.experts\\.(gate|up|down)_proj(_bias)?$");
  std::vector<std::string> dropped;
  bool keeps_mxfp4 = false;

  for (const TensorInfo& source : ckpt.tensors()) {
    const std::string& name = source.name;
    if (name.starts_with("moiety.rope_")) continue;  // the config says the same
    if (name.starts_with("gguf.")) {
      dropped.push_back(name.substr(5));
      continue;
    }
    const Source& view = sources.get(name);
    std::smatch m;
    if (std::regex_match(name, m, stack_form)) {
      const std::string layer = m[1], number = m[2], part = m[3];
      const bool bias = m[4].matched;
      need_shape(view, bias ? 2 : 3);
      const int64_t experts = view.shape[0];
      if (type == "gpt_oss") {
        if (part == "up") continue;  // comes with gate
        const bool fused = part == "gate";
        if (bias && !fused) {
          plan.targets.push_back(copy_of(view, layer + "mlp.experts.down_proj_bias"));
          continue;
        }
        const Source& other =
            fused ? sources.get(layer + (bias ? "mlp.experts.up_proj_bias" : "mlp.experts.up_proj")) : view;
        check(other.shape == view.shape, "tensors '{}' and '{}' differ in shape", view.name, other.name);
        const int64_t step = fused ? 2 : 1;
        if (bias) {
          const int64_t f = view.shape[1];
          plan.computed(view, layer + "mlp.experts.gate_up_proj_bias", {experts, 2 * f}, experts,
                        [=](int64_t e, float* to) {
                          const auto gate = slab_of(view, e, 1), up = slab_of(other, e, 1);
                          for (size_t i = 0; i < gate.size(); ++i) to[2 * i] = gate[i], to[2 * i + 1] = up[i];
                        });
          continue;
        }
        const int64_t rows = view.shape[1], cols = view.shape[2], groups = cols / 32;
        const std::string base = layer + (fused ? "mlp.experts.gate_up_proj" : "mlp.experts.down_proj");
        if (view.format == Format::MXFP4 && other.format == Format::MXFP4 && dtype == Format::MXFP4) {
          keeps_mxfp4 = true;
          for (const bool scales : {false, true}) {
            Target t;
            t.info = {base + (scales ? "_scales" : "_blocks"), Format::U8, {experts, rows * step, groups}};
            if (!scales) t.info.shape.push_back(16);
            t.cols = t.info.cols();
            t.raw = [=](std::byte* out) {
              std::byte packed[16], scale;
              for (int64_t r = 0; r < experts * rows * step; ++r) {
                const Source& from = r % step == 0 ? view : other;
                for (int64_t g = 0; g < groups; ++g) {
                  mxfp4_from_gguf(from.bytes().data() + (r / step * groups + g) * 17, packed, scale);
                  if (scales)
                    out[r * groups + g] = scale;
                  else
                    std::memcpy(out + (r * groups + g) * 16, packed, 16);
                }
              }
            };
            plan.targets.push_back(std::move(t));
          }
          continue;
        }
        plan.computed(view, base, {experts, cols, rows * step}, experts, [=](int64_t e, float* to) {
          for (int64_t which = 0; which < step; ++which) {
            const auto values = slab_of(which == 0 ? view : other, e, rows);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t i = 0; i < cols; ++i)
                to[i * rows * step + r * step + which] = values[static_cast<size_t>(r * cols + i)];
          }
        });
        continue;
      }
      const int64_t rows = bias ? 1 : view.shape[1], cols = view.cols();
      if (type == "granitemoe" || type == "granitemoeshared") {
        if (part == "up") continue;
        if (part == "down") {
          plan.targets.push_back(copy_of(view, layer + "block_sparse_moe.output_linear.weight"));
          continue;
        }
        Target t = copy_of(view, layer + "block_sparse_moe.input_linear.weight");
        t.sources.push_back(sources.get(layer + "mlp.experts.up_proj"));
        check(t.sources[1].shape == view.shape, "tensors '{}' and '{}' differ in shape", view.name, t.sources[1].name);
        t.info.shape = {experts, 2 * rows, cols};
        t.row = [rows](int64_t r) {
          const int64_t e = r / (2 * rows), in = r % (2 * rows);
          return std::pair<size_t, int64_t>{static_cast<size_t>(in / rows), e * rows + in % rows};
        };
        plan.targets.push_back(std::move(t));
        continue;
      }
      for (int64_t e = 0; e < experts; ++e) {
        const std::string one =
            hf_tensor_name(type, fmt::format("blk.{}.ffn_{}.{}.{}", number, part, e, bias ? "bias" : "weight"));
        plan.gather(view, one, bias ? std::vector<int64_t>{cols} : std::vector<int64_t>{rows, cols},
                    [=](int64_t r) { return e * rows + r; });
      }
      continue;
    }
    if (name.ends_with(".shared_mlp.up_proj.weight")) continue;  // comes with gate
    if (name.ends_with(".shared_mlp.gate_proj.weight")) {
      const std::string layer = name.substr(0, name.size() - std::string_view("gate_proj.weight").size());
      Target t = copy_of(view, layer + "input_linear.weight");
      t.sources.push_back(sources.get(layer + "up_proj.weight"));
      need_shape(view, 2);
      check(t.sources[1].shape == view.shape, "tensors '{}' and '{}' differ in shape", view.name, t.sources[1].name);
      const int64_t rows = view.shape[0];
      t.info.shape[0] *= 2;
      t.row = [rows](int64_t r) { return std::pair<size_t, int64_t>{static_cast<size_t>(r / rows), r % rows}; };
      plan.targets.push_back(std::move(t));
      continue;
    }
    if (name.ends_with(".self_attn.v_b_proj")) continue;  // comes with k_b
    if (name.ends_with(".self_attn.k_b_proj")) {
      const std::string layer = name.substr(0, name.size() - std::string_view("k_b_proj").size());
      const Source& v = sources.get(layer + "v_b_proj");
      need_shape(view, 3), need_shape(v, 3);
      const int64_t h = view.shape[0], rank = view.shape[1], nope = view.shape[2], value = v.shape[1];
      check(v.shape[0] == h && v.shape[2] == rank, "tensors '{}' and '{}' do not fit together", view.name, v.name);
      plan.computed(view, layer + "kv_b_proj.weight", {h * (nope + value), rank}, h, [=](int64_t head, float* to) {
        const auto k = slab_of(view, head, rank);
        for (int64_t i = 0; i < rank; ++i)
          for (int64_t j = 0; j < nope; ++j) to[j * rank + i] = k[static_cast<size_t>(i * nope + j)];
        const auto values = slab_of(v, head, value);
        std::copy(values.begin(), values.end(), to + nope * rank);
      });
      continue;
    }
    Target t = copy_of(view, name);
    if (interleaved && ends_with_any(name, {".q_proj.weight", ".q_proj.bias"})) permute_rows(t, heads, false);
    if (interleaved && ends_with_any(name, {".k_proj.weight", ".k_proj.bias"})) permute_rows(t, kv_heads, false);
    if (folded && name.ends_with("norm.weight")) t.add = -1;
    plan.targets.push_back(std::move(t));
  }
  if (!dropped.empty())
    plan.warnings.push_back(
        fmt::format("{} tensors have no Hugging Face counterpart and are left out ({})", dropped.size(), dropped[0]));
  if (config.value("moiety_rope_freqs", false))
    plan.warnings.push_back(
        "the file's rope frequency divisors are of no kind that config.json can name: the result will not scale rope "
        "as the file does");
  for (const char* flag : {"moiety_rope_interleaved", "moiety_norm_offset_folded", "moiety_rope_freqs"})
    config.erase(flag);
  if (keeps_mxfp4)
    config["quantization_config"] = {
        {"quant_method", "mxfp4"},
        {"modules_to_not_convert",
         {"model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"}}};
  return plan;
}

/// Small files that belong to a model beside its weights and config.
void copy_companions(const fs::path& from, const fs::path& to) {
  for (const auto& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    if (entry.is_directory()) {
      // Modules of sentence-transformers: 1_Pooling, 2_Normalize, ...
      if (name.empty() || !std::isdigit(static_cast<unsigned char>(name[0]))) continue;
      fs::create_directories(to / name);
      for (const auto& file : fs::directory_iterator(entry.path()))
        if (file.is_regular_file())
          fs::copy_file(file.path(), to / name / file.path().filename(), fs::copy_options::overwrite_existing);
      continue;
    }
    if (!entry.is_regular_file() || name == "config.json" || name.ends_with(".index.json") || name.starts_with("."))
      continue;
    if (ends_with_any(name, {".json", ".txt", ".jinja", ".model", ".md"}) || name.starts_with("LICENSE") ||
        name.starts_with("NOTICE"))
      fs::copy_file(entry.path(), to / name, fs::copy_options::overwrite_existing);
  }
}

WriteReport write_hf_checked(const Checkpoint& ckpt, const fs::path& folder, const WriteOptions& options) {
  const Sources sources(ckpt);
  if (fs::exists(folder)) {
    check(fs::is_directory(folder), "{}: exists and is not a folder", folder.string());
    std::error_code ec;
    check(!fs::equivalent(folder, ckpt.path(), ec), "{}: is the model itself; write to another folder",
          folder.string());
    if (!options.overwrite && !options.dry_run)
      for (const auto& entry : fs::directory_iterator(folder)) {
        const std::string name = entry.path().filename().string();
        check(name != "config.json" && !name.ends_with(".safetensors"),
              "{}: holds a model already ({}); remove it or ask to overwrite", folder.string(), name);
      }
  }
  std::optional<Format> wanted;
  if (!options.dtype.empty()) {
    const FormatInfo* f = find_format(options.dtype);
    check(f && (f->format == Format::F32 || f->format == Format::F16 || f->format == Format::BF16),
          "dtype '{}' is not f32, f16 or bf16", shown(options.dtype));
    wanted = f->format;
  }
  WriteReport out;
  json config = ckpt.config();
  Plan plan;
  if (ckpt.gguf()) {
    plan = plan_hf(ckpt, sources, config, wanted.value_or(Format::MXFP4));
    if (!wanted) {
      const std::string dtype = ckpt.gguf() ? hf_config(*ckpt.gguf(), true).value("dtype", "bfloat16") : "bfloat16";
      wanted = dtype == "float32" ? Format::F32 : dtype == "float16" ? Format::F16 : Format::BF16;
    }
  } else {
    for (const auto& t : ckpt.tensors()) plan.targets.push_back(copy_of(sources.get(t.name), t.name));
  }
  for (Target& t : plan.targets) {
    if (t.raw || !is_real(t.info.format)) continue;
    // The bias that only chooses experts is always single precision.
    if (t.info.name.ends_with("e_score_correction_bias")) {
      t.info.format = Format::F32;
      continue;
    }
    if (wanted) t.info.format = *wanted;
  }
  report(out, plan.targets);
  out.warnings = plan.warnings;
  if (wanted && !config.empty()) {
    const char* dtype = *wanted == Format::F32 ? "float32" : *wanted == Format::F16 ? "float16" : "bfloat16";
    for (json* c :
         {&config,
          config.contains("text_config") && config["text_config"].is_object() ? &config["text_config"] : nullptr}) {
      if (!c) continue;
      if (c->contains("torch_dtype")) (*c)["torch_dtype"] = dtype;
      if (!c->contains("torch_dtype") || c->contains("dtype")) (*c)["dtype"] = dtype;
    }
  }
  if (options.dry_run) return out;

  fs::create_directories(folder);
  int64_t done = 0;
  {
    ShardedWriter writer(folder, options.shard_bytes);
    for_each_encoded(plan.targets, sources, threads_of(options),
                     [&](const Target& t, std::span<const std::byte> bytes) {
                       writer.add(t.info, bytes);
                       done += static_cast<int64_t>(bytes.size());
                       if (options.progress) options.progress(done, out.bytes);
                     });
    writer.finish();
  }
  if (ckpt.gguf()) {
    if (ckpt.gguf()->find("tokenizer.ggml.tokens")) {
      const HfTokenizer t = hf_tokenizer(*ckpt.gguf());
      auto dump = [](const json& j) { return j.dump(2, ' ', false, json::error_handler_t::replace) + "\n"; };
      write_file(folder / "tokenizer.json", dump(t.tokenizer));
      write_file(folder / "tokenizer_config.json", dump(t.config));
      write_file(folder / "special_tokens_map.json", dump(t.special_tokens));
    } else {
      out.warnings.push_back("the file has no tokenizer");
    }
    if (!ckpt.generation_config().empty())
      write_file(folder / "generation_config.json", ckpt.generation_config().dump(2) + "\n");
  } else {
    copy_companions(fs::is_directory(ckpt.path()) ? ckpt.path() : ckpt.path().parent_path(), folder);
  }
  // Last: a folder without config.json is not a model.
  write_file(folder / "config.json", config.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
  return out;
}

template <class F>
WriteReport guarded(const Checkpoint& ckpt, const F& write) {
  try {
    return write();
  } catch (const json::exception& e) {
    fail("{}: config or tokenizer: {}", ckpt.path().string(), shown(e.what(), 200));
  } catch (const fs::filesystem_error& e) {
    fail("{}: {}", e.path1().string(), e.code().message());
  }
}

}  // namespace

WriteReport write_gguf(const Checkpoint& checkpoint, const fs::path& file, const WriteOptions& options) {
  return guarded(checkpoint, [&] { return write_gguf_checked(checkpoint, file, options); });
}

WriteReport write_hf(const Checkpoint& checkpoint, const fs::path& folder, const WriteOptions& options) {
  return guarded(checkpoint, [&] { return write_hf_checked(checkpoint, folder, options); });
}

}  // namespace moiety
