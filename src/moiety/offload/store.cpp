#include "moiety/offload/store.h"

#include <algorithm>
#include <chrono>

#include "moiety/base/error.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int64_t whole_lines(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// Of what reads land in. Two experts' pieces, so that the disk works on the next ones while those that came are
// unpacked; three, where an expert is one piece.
struct BufferPlan {
  int64_t bytes = 0;  // of one buffer: the largest piece
  int64_t count = 0;
};
BufferPlan buffers_for(const ExpertSource& source, bool low) {
  BufferPlan out;
  for (const Precision p : {Precision::high, Precision::low}) {
    if (p == Precision::low && !low) continue;
    for (int64_t l = 0; l < source.layers(); ++l)
      for (int64_t e = 0; e < source.experts(); ++e) {
        const auto pieces = source.pieces({l, e, p});
        for (const StoredPiece& piece : pieces) out.bytes = std::max(out.bytes, Reader::buffer_bytes(piece));
        out.count = std::max(out.count, 2 * static_cast<int64_t>(pieces.size()));
      }
  }
  out.count = std::max<int64_t>(3, out.count);
  return out;
}

}  // namespace

double StoreStats::hit_rate() const {
  const auto hits = static_cast<double>(counts.hit_high + counts.hit_low);
  const double all = hits + static_cast<double>(counts.miss_high + counts.miss_low + counts.skip);
  return all > 0.0 ? hits / all : 0.0;
}

StoreStats StoreStats::since(const StoreStats& before) const {
  StoreStats out = *this;
  ResidencyCounts& c = out.counts;
  const ResidencyCounts& b = before.counts;
  for (int64_t ResidencyCounts::*field :
       {&ResidencyCounts::hit_high, &ResidencyCounts::hit_low, &ResidencyCounts::miss_high, &ResidencyCounts::miss_low,
        &ResidencyCounts::skip, &ResidencyCounts::kept_out, &ResidencyCounts::guessed, &ResidencyCounts::right,
        &ResidencyCounts::ahead, &ResidencyCounts::ahead_used, &ResidencyCounts::ahead_dropped,
        &ResidencyCounts::ahead_cancelled, &ResidencyCounts::ahead_unused, &ResidencyCounts::wanted_of_guessed,
        &ResidencyCounts::steps, &ResidencyCounts::pairs, &ResidencyCounts::altered})
    c.*field -= b.*field;
  out.bytes_read -= before.bytes_read;
  out.experts_read -= before.experts_read;
  out.reads -= before.reads;
  out.stall_seconds -= before.stall_seconds;
  out.read_seconds -= before.read_seconds;
  out.disk_seconds -= before.disk_seconds;
  return out;
}

nlohmann::ordered_json StoreStats::json() const {
  const auto ratio = [](int64_t a, int64_t b) {
    return b > 0 ? nlohmann::ordered_json(static_cast<double>(a) / static_cast<double>(b)) : nlohmann::ordered_json();
  };
  return {{"lossless", lossless()},
          {"altered_share", ratio(counts.altered, counts.pairs)},
          {"hit_rate", hit_rate()},
          {"hit_high", counts.hit_high},
          {"hit_low", counts.hit_low},
          {"miss_high", counts.miss_high},
          {"miss_low", counts.miss_low},
          {"skip", counts.skip},
          {"kept_out", counts.kept_out},
          {"bytes_read", bytes_read},
          {"experts_read", experts_read},
          {"reads", reads},
          {"stall_seconds", stall_seconds},
          {"read_seconds", read_seconds},
          {"disk_seconds", disk_seconds},
          {"guessed", counts.guessed},
          {"guess_precision", ratio(counts.right, counts.guessed)},
          {"guess_recall", ratio(counts.right, counts.wanted_of_guessed)},
          {"read_ahead", counts.ahead},
          {"read_ahead_used", counts.ahead_used},
          {"read_ahead_dropped", counts.ahead_dropped},
          {"read_ahead_cancelled", counts.ahead_cancelled},
          {"read_ahead_unused", counts.ahead_unused},
          {"direct", direct},
          {"io_uring", uring}};
}

std::string StoreStats::summary() const {
  const ResidencyCounts& c = counts;
  const auto percent = [](int64_t a, int64_t b) {
    return b > 0 ? 100.0 * static_cast<double>(a) / static_cast<double>(b) : 0.0;
  };
  std::string out = fmt::format("experts: {:.1f} % in memory ({} hits, {} misses", 100.0 * hit_rate(),
                                c.hit_high + c.hit_low, c.miss_high + c.miss_low);
  if (c.hit_low + c.miss_low + c.skip > 0)
    out += fmt::format("; {} of them in low precision, {} left out", c.hit_low + c.miss_low, c.skip);
  out += fmt::format("); read {:.1f} MiB in {} experts, {:.0f} MB/s; waited {:.2f} s",
                     static_cast<double>(bytes_read) / 1048576, experts_read,
                     read_seconds > 0 ? static_cast<double>(bytes_read) / read_seconds * 1e-6 : 0.0, stall_seconds);
  if (c.guessed > 0)
    out += fmt::format("; guessed {:.0f} % right, {} read ahead, {} used, {} left unused", percent(c.right, c.guessed),
                       c.ahead - c.ahead_cancelled, c.ahead_used, c.ahead_unused);
  out += lossless() ? "\nlossless: every expert was used as the file has it"
                    : fmt::format("\nnot lossless: {:.1f} % of the experts' work was in low precision or left out",
                                  percent(c.altered, c.pairs));
  return out;
}

int64_t ExpertStore::slot_stride(const ExpertSource& source, Precision precision) {
  return whole_lines(source.slot_bytes(precision));
}

int64_t ExpertStore::overhead(const ExpertSource& source, bool low) {
  const BufferPlan buffers = buffers_for(source, low);
  return buffers.count * buffers.bytes + slot_stride(source, Precision::high) +
         (low ? slot_stride(source, Precision::low) : 0);
}

int64_t ExpertStore::memory(const ExpertSource& source, int64_t capacity_high, int64_t capacity_low) {
  const bool low = source.has_low() && capacity_low >= 0;
  return overhead(source, low) + capacity_high * slot_stride(source, Precision::high) +
         (low ? capacity_low * slot_stride(source, Precision::low) : 0);
}

ExpertStore::ExpertStore(std::shared_ptr<const ExpertSource> source, std::shared_ptr<OffloadPolicy> policy,
                         PolicySetup setup, StoreOptions options)
    : source_(std::move(source)),
      options_(options),
      slots_high_(std::min(options.capacity_high, source_->layers() * source_->experts())),
      slots_low_(std::min(options.capacity_low, source_->layers() * source_->experts())),
      reader_(source_->files(), options.read),
      residency_({source_->layers(), source_->experts(), options.capacity_high, options.capacity_low}, policy, this) {
  check(options.capacity_high >= policy->least_high(setup),
        "the high-precision cache holds {} experts, a token needs {}", options.capacity_high,
        policy->least_high(setup));
  const bool low = policy->uses_low();
  check(!low || source_->has_low(), "the policy uses low-precision copies, which the file does not have");
  for (const Precision p : {Precision::low, Precision::high}) {
    const size_t i = p == Precision::high ? 1 : 0;
    if (p == Precision::low && !low) continue;
    stride_[i] = slot_stride(*source_, p);
    arena_[i] = std::make_unique<PageMemory>((pool_slots(p) + 1) * stride_[i], /*huge=*/true);
    slots_of_[i].resize(static_cast<size_t>(pool_slots(p)) + 1);
  }
  const BufferPlan plan = buffers_for(*source_, low);
  buffer_memory_ = std::make_unique<PageMemory>(plan.count * plan.bytes);
  buffers_.resize(static_cast<size_t>(plan.count));
  for (size_t i = 0; i < buffers_.size(); ++i)
    buffers_[i].memory = buffer_memory_->data() + static_cast<int64_t>(i) * plan.bytes;
  setup.capacity_high = options.capacity_high;
  setup.capacity_low = low ? options.capacity_low : 0;
  policy->begin(setup);
  if (!options_.sync) thread_ = std::thread([this] { read_loop(); });
  for (const ExpertVersion& v : policy->initial()) residency_.put(v);
}

ExpertStore::~ExpertStore() {
  {
    const std::lock_guard<std::mutex> guard(lock_);
    stop_ = true;
  }
  work_.notify_all();
  if (thread_.joinable()) thread_.join();
  reader_.settle();
}

std::byte* ExpertStore::memory_of(Precision p, int64_t slot) const {
  const size_t i = p == Precision::high ? 1 : 0;
  return arena_[i]->data() + slot * stride_[i];
}

// ---- The computing thread ----

void ExpertStore::load(const ExpertVersion& version, int64_t at, bool ahead) {
  if (options_.sync) {
    read_now({version, at});
    return;
  }
  {
    const std::lock_guard<std::mutex> guard(lock_);
    slot(version.precision, at).state = State::queued;
    (ahead ? ahead_ : wanted_).push_back({version, at});
  }
  work_.notify_one();
}

void ExpertStore::hurry(const ExpertVersion& version, int64_t) {
  const std::lock_guard<std::mutex> guard(lock_);
  const auto at = std::find_if(ahead_.begin(), ahead_.end(), [&](const Task& t) { return t.version == version; });
  if (at == ahead_.end()) return;
  wanted_.push_back(*at);
  ahead_.erase(at);
}

Loader::Released ExpertStore::release(const ExpertVersion& version, int64_t at) {
  const std::lock_guard<std::mutex> guard(lock_);
  State& state = slot(version.precision, at).state;
  if (state == State::reading) return Released::busy;
  if (state != State::queued) return Released::idle;
  for (auto* queue : {&wanted_, &ahead_}) std::erase_if(*queue, [&](const Task& t) { return t.version == version; });
  state = State::idle;
  return Released::cancelled;
}

void ExpertStore::rethrow() {
  if (failure_) std::rethrow_exception(failure_);
}

void ExpertStore::wait_for_one(Precision p) {
  const auto start = Clock::now();
  std::unique_lock<std::mutex> guard(lock_);
  const auto reading = [&] {
    return std::count_if(slots(p).begin(), slots(p).end(), [](const Slot& s) { return s.state == State::reading; });
  };
  // Others may begin in the meantime: who ends counts.
  const int64_t before = experts_read_;
  if (reading() > 0) done_.wait(guard, [&] { return failure_ || experts_read_ > before || reading() == 0; });
  stall_seconds_ += seconds_since(start);
  rethrow();
}

bool ExpertStore::ready(Precision p, int64_t at) {
  const std::lock_guard<std::mutex> guard(lock_);
  rethrow();
  return slot(p, at).state == State::ready;
}

void ExpertStore::wait_ready(const std::vector<Place>& any) {
  const auto start = Clock::now();
  std::unique_lock<std::mutex> guard(lock_);
  done_.wait(guard, [&] {
    return failure_ || std::any_of(any.begin(), any.end(),
                                   [&](const Place& w) { return slot(w.precision, w.slot).state == State::ready; });
  });
  stall_seconds_ += seconds_since(start);
  rethrow();
}

std::vector<Use> ExpertStore::preview(const Demand& demand) {
  std::vector<Use> out;
  for (const Wanted& w : residency_.policy().ask(demand)) {
    Use u{.expert = w.expert, .asked = w.asked, .tokens = w.tokens};
    u.used = residency_.Cached::look_up(demand.layer, w.expert, w.asked);
    u.hit = residency_.has({demand.layer, w.expert, u.used});
    out.push_back(u);
  }
  return out;
}

std::vector<Use> ExpertStore::run(const Demand& demand, LookAhead* look,
                                  const std::function<void(std::span<const ReadyExpert>)>& compute) {
  std::vector<Use> uses = residency_.look_up(demand);
  std::vector<Use*> waiting, late;  // have a place, have none yet
  for (Use& u : uses)
    if (u.hit) waiting.push_back(&u);
  const bool prompt = demand.rows > 1;
  for (Use& u : uses) {
    residency_.record(u, demand);
    if (u.hit || u.used == Precision::skip) continue;
    // Of a prompt, what comes behind one that found no place takes its turn behind it.
    const bool placed = (!prompt || late.empty()) && residency_.place(u, demand);
    (placed ? waiting : late).push_back(&u);
  }
  bool guessed = late.empty() || !prompt;
  if (guessed) residency_.guess_ahead(demand, look);
  std::vector<ReadyExpert> now;
  while (!waiting.empty()) {
    now.clear();
    std::vector<Use*> through, later;
    for (Use* u : waiting) (ready(u->used, u->slot) ? through : later).push_back(u);
    if (through.empty()) {
      std::vector<Place> any;
      for (const Use* u : waiting) any.push_back({u->used, u->slot});
      wait_ready(any);
      continue;
    }
    for (const Use* u : through) now.push_back({u->expert, u->used, memory_of(u->used, u->slot)});
    compute(now);
    waiting = std::move(later);
    if (!prompt || late.empty()) continue;
    // Places of experts that are through go to those that found none.
    for (const Use* u : through) residency_.unpin(*u, demand.layer);
    while (!late.empty() && residency_.place(*late.front(), demand)) {
      waiting.push_back(late.front());
      late.erase(late.begin());
    }
    if (late.empty() && !guessed) {
      residency_.guess_ahead(demand, look);
      guessed = true;
    }
  }
  for (Use* u : late) {
    residency_.keep_out();
    const int64_t staging = pool_slots(u->used);
    load({demand.layer, u->expert, u->used}, staging, false);
    if (!options_.sync) wait_ready({{u->used, staging}});
    now.assign(1, {u->expert, u->used, memory_of(u->used, staging)});
    compute(now);
  }
  if (!guessed) residency_.guess_ahead(demand, look);
  residency_.end_layer(demand.layer);
  return uses;
}

bool ExpertStore::preload(const ExpertVersion& version) {
  if (!residency_.put(version)) return false;
  wait_ready({{version.precision, residency_.slot(version)}});
  return true;
}

StoreStats ExpertStore::stats() const {
  const std::lock_guard<std::mutex> guard(lock_);
  return {.counts = residency_.counts(),
          .bytes_read = bytes_read_,
          .experts_read = experts_read_,
          .reads = reads_,
          .stall_seconds = stall_seconds_,
          .read_seconds = read_seconds_,
          .disk_seconds = disk_seconds_,
          .direct = reader_.direct(),
          .uring = reader_.uring()};
}

// ---- The reading thread (or, with sync, the computing one) ----

// Begins to read what there are buffers for: of what is wanted all, of what is read ahead so much that the disk is not
// idle before the reading thread comes back.
void ExpertStore::begin_reads() {
  const size_t most_ahead = (buffers_.size() + 1) / 2;
  for (;;) {
    const auto buffer = std::find_if(buffers_.begin(), buffers_.end(), [](const Buffer& b) { return !b.taken; });
    if (buffer == buffers_.end()) return;
    bool ahead = false;
    std::vector<StoredPiece> pieces;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      ahead = wanted_.empty();
      auto& queue = ahead ? ahead_ : wanted_;
      if (stop_ || queue.empty() || (ahead && reader_.flying() >= most_ahead)) return;
      Task& task = queue.front();
      pieces = source_->pieces(task.version);
      if (task.begun == 0) slot(task.version.precision, task.slot) = {State::reading, pieces.size()};
      buffer->piece = task.begun++;
      buffer->task = task;
      if (task.begun == pieces.size()) queue.pop_front();
    }
    buffer->taken = true;
    const ExpertVersion& v = buffer->task.version;
    reader_.start(buffer->read, pieces[buffer->piece], buffer->memory,
                  fmt::format("expert {} of layer {} ({} precision)", v.expert, v.layer,
                              v.precision == Precision::high ? "high" : "low"),
                  ahead);
  }
}

// Waits for a piece, has the disk go on, and unpacks the piece.
void ExpertStore::end_read() {
  const auto start = Clock::now();
  const Reader::Read& read = reader_.next();
  const double waited = seconds_since(start);
  auto& buffer = *std::find_if(buffers_.begin(), buffers_.end(), [&](const Buffer& b) { return &b.read == &read; });
  begin_reads();
  const Task& t = buffer.task;
  const auto raw = read.bytes();
  source_->unpack(t.version, buffer.piece, raw, memory_of(t.version.precision, t.slot));
  buffer.taken = false;
  bool whole = false;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    bytes_read_ += static_cast<int64_t>(raw.size());
    ++reads_;
    disk_seconds_ += waited;
    read_seconds_ += seconds_since(start);
    Slot& s = slot(t.version.precision, t.slot);
    whole = --s.left == 0;
    if (whole) {
      s.state = State::ready;
      ++experts_read_;
    }
  }
  if (whole) done_.notify_all();
}

void ExpertStore::read_now(const Task& t) {
  const auto start = Clock::now();
  rethrow();
  try {
    wanted_.push_back(t);
    for (begin_reads(); reader_.flying() > 0; begin_reads()) end_read();
  } catch (...) {
    reader_.settle();  // what is under way ends in memory that lives
    failure_ = std::current_exception();
    throw;
  }
  stall_seconds_ += seconds_since(start);
}

void ExpertStore::read_loop() {
  // Threads of OpenMP wait for each other spinning, which takes the core that this thread needs, and slows all of them
  // where one is not running. With a region of its own here the runtime counts more threads than cores where that is
  // so, and its threads sleep instead.
  parallel::on_threads(2, [](int, int) {});
  try {
    for (;;) {
      begin_reads();
      if (reader_.flying() > 0) {
        end_read();
        continue;
      }
      std::unique_lock<std::mutex> guard(lock_);
      work_.wait(guard, [&] { return stop_ || !wanted_.empty() || !ahead_.empty(); });
      if (stop_) return;
    }
  } catch (...) {
    reader_.settle();
    const std::lock_guard<std::mutex> guard(lock_);
    failure_ = std::current_exception();
  }
  done_.notify_all();
}

}  // namespace moiety
