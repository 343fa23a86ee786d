#include "moiety/offload/store.h"

#include <algorithm>
#include <chrono>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int64_t whole_lines(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// The largest read buffer that a version of this precision needs.
int64_t buffer_bytes(const ExpertSource& source, Precision precision) {
  int64_t most = 0;
  for (int64_t l = 0; l < source.layers(); ++l)
    for (int64_t e = 0; e < source.experts(); ++e)
      most = std::max(most, Reader::buffer_bytes(source.pieces({l, e, precision})));
  return most;
}

int64_t buffer_bytes(const ExpertSource& source, bool low) {
  const int64_t high = buffer_bytes(source, Precision::high);
  return low ? std::max(high, buffer_bytes(source, Precision::low)) : high;
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
        &ResidencyCounts::ahead_cancelled, &ResidencyCounts::wanted_of_guessed, &ResidencyCounts::steps,
        &ResidencyCounts::pairs, &ResidencyCounts::altered})
    c.*field -= b.*field;
  out.bytes_read -= before.bytes_read;
  out.experts_read -= before.experts_read;
  out.stall_seconds -= before.stall_seconds;
  out.read_seconds -= before.read_seconds;
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
          {"stall_seconds", stall_seconds},
          {"read_seconds", read_seconds},
          {"guessed", counts.guessed},
          {"guess_precision", ratio(counts.right, counts.guessed)},
          {"guess_recall", ratio(counts.right, counts.wanted_of_guessed)},
          {"read_ahead", counts.ahead},
          {"read_ahead_used", counts.ahead_used},
          {"read_ahead_dropped", counts.ahead_dropped},
          {"read_ahead_cancelled", counts.ahead_cancelled},
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
    out += fmt::format("; guessed {:.0f} % right, {} read ahead, {} used", percent(c.right, c.guessed), c.ahead,
                       c.ahead_used);
  out += lossless() ? "\nlossless: every expert was used as the file has it"
                    : fmt::format("\nnot lossless: {:.1f} % of the experts' work was in low precision or left out",
                                  percent(c.altered, c.pairs));
  return out;
}

int64_t ExpertStore::slot_stride(const ExpertSource& source, Precision precision) {
  return whole_lines(source.slot_bytes(precision));
}

int64_t ExpertStore::overhead(const ExpertSource& source, bool low) {
  return 2 * buffer_bytes(source, low) + slot_stride(source, Precision::high) +
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
    states_[i].assign(static_cast<size_t>(pool_slots(p)) + 1, State::idle);
  }
  const int64_t bytes = buffer_bytes(*source_, low);
  for (auto& b : buffers_) b = std::make_unique<PageMemory>(bytes);
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

void ExpertStore::load(const ExpertVersion& version, int64_t slot, bool ahead) {
  if (options_.sync) {
    read_now({version, slot});
    return;
  }
  {
    const std::lock_guard<std::mutex> guard(lock_);
    states(version.precision)[static_cast<size_t>(slot)] = State::queued;
    (ahead ? ahead_ : wanted_).push_back({version, slot});
  }
  work_.notify_one();
}

void ExpertStore::hurry(const ExpertVersion& version, int64_t slot) {
  const std::lock_guard<std::mutex> guard(lock_);
  if (states(version.precision)[static_cast<size_t>(slot)] != State::queued) return;
  const auto at = std::find_if(ahead_.begin(), ahead_.end(), [&](const Task& t) { return t.version == version; });
  if (at == ahead_.end()) return;
  wanted_.push_back(*at);
  ahead_.erase(at);
}

Loader::Released ExpertStore::release(const ExpertVersion& version, int64_t slot) {
  const std::lock_guard<std::mutex> guard(lock_);
  State& state = states(version.precision)[static_cast<size_t>(slot)];
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
    const auto& all = states(p);
    return std::count(all.begin(), all.end(), State::reading);
  };
  const auto before = reading();
  if (before > 0) done_.wait(guard, [&] { return failure_ || reading() < before; });
  stall_seconds_ += seconds_since(start);
  rethrow();
}

bool ExpertStore::ready(Precision p, int64_t slot) {
  const std::lock_guard<std::mutex> guard(lock_);
  rethrow();
  return states(p)[static_cast<size_t>(slot)] == State::ready;
}

void ExpertStore::wait_ready(Precision p, int64_t slot) {
  const auto start = Clock::now();
  std::unique_lock<std::mutex> guard(lock_);
  done_.wait(guard, [&] { return failure_ || states(p)[static_cast<size_t>(slot)] == State::ready; });
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
      wait_ready(waiting.front()->used, waiting.front()->slot);
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
    if (!options_.sync) wait_ready(u->used, staging);
    now.assign(1, {u->expert, u->used, memory_of(u->used, staging)});
    compute(now);
  }
  if (!guessed) residency_.guess_ahead(demand, look);
  residency_.end_layer(demand.layer);
  return uses;
}

bool ExpertStore::preload(const ExpertVersion& version) {
  if (!residency_.put(version)) return false;
  wait_ready(version.precision, residency_.slot(version));
  return true;
}

StoreStats ExpertStore::stats() const {
  const std::lock_guard<std::mutex> guard(lock_);
  return {.counts = residency_.counts(),
          .bytes_read = bytes_read_,
          .experts_read = experts_read_,
          .stall_seconds = stall_seconds_,
          .read_seconds = read_seconds_,
          .direct = reader_.direct(),
          .uring = reader_.uring()};
}

// ---- The reading thread (or, with sync, the computing one) ----

void ExpertStore::begin_task(Reader::Job& job, const Task& t, size_t buffer) {
  reader_.start(job, source_->pieces(t.version), buffers_[buffer]->data(),
                fmt::format("expert {} of layer {} ({} precision)", t.version.expert, t.version.layer,
                            t.version.precision == Precision::high ? "high" : "low"));
}

void ExpertStore::unpack_task(Reader::Job& job, const Task& t, const std::function<void(size_t left)>& between) {
  std::byte* slot = memory_of(t.version.precision, t.slot);
  int64_t bytes = 0;
  for (size_t left = Reader::left(job), i = 0; left > 0; ++i) {
    const auto raw = reader_.wait(job, i);
    bytes += static_cast<int64_t>(raw.size());
    between(--left);
    source_->unpack(t.version, i, raw, slot);
  }
  {
    const std::lock_guard<std::mutex> guard(lock_);
    states(t.version.precision)[static_cast<size_t>(t.slot)] = State::ready;
    bytes_read_ += bytes;
    ++experts_read_;
  }
  done_.notify_all();
}

void ExpertStore::read_now(const Task& t) {
  const auto start = Clock::now();
  rethrow();
  Reader::Job job;
  try {
    begin_task(job, t, 0);
    unpack_task(job, t, [](size_t) {});
  } catch (...) {
    reader_.settle();  // what is under way ends in memory that lives
    failure_ = std::current_exception();
    throw;
  }
  const double took = seconds_since(start);
  stall_seconds_ += took;
  read_seconds_ += took;
}

// The next task, marked as begun; with `only_wanted` none that is read ahead. The lock is held.
bool ExpertStore::next_task(Task& task, bool only_wanted) {
  auto& queue = wanted_.empty() && !only_wanted ? ahead_ : wanted_;
  if (stop_ || queue.empty()) return false;
  task = queue.front();
  queue.pop_front();
  states(task.version.precision)[static_cast<size_t>(task.slot)] = State::reading;
  return true;
}

void ExpertStore::read_loop() {
  try {
    Reader::Job jobs[2];
    Task tasks[2];
    size_t at = 0;
    bool begun = false;  // tasks[at] is being read
    for (;;) {
      if (!begun) {
        std::unique_lock<std::mutex> guard(lock_);
        work_.wait(guard, [&] { return stop_ || !wanted_.empty() || !ahead_.empty(); });
        if (!next_task(tasks[at], false)) return;
        guard.unlock();
        begin_task(jobs[at], tasks[at], at);
      }
      const auto start = Clock::now();
      bool next = false;
      // While the last matrix of an expert is on its way the next expert's are asked for, so that the disk is never
      // idle while there is work; what is read ahead waits until the disk has nothing else to do.
      unpack_task(jobs[at], tasks[at], [&](size_t left) {
        if (next || left > 1) return;
        {
          const std::lock_guard<std::mutex> guard(lock_);
          next = next_task(tasks[1 - at], left > 0);
        }
        if (next) begin_task(jobs[1 - at], tasks[1 - at], 1 - at);
      });
      {
        const std::lock_guard<std::mutex> guard(lock_);
        read_seconds_ += seconds_since(start);
      }
      at = 1 - at;
      begun = next;
    }
  } catch (...) {
    reader_.settle();
    const std::lock_guard<std::mutex> guard(lock_);
    failure_ = std::current_exception();
  }
  done_.notify_all();
}

}  // namespace moiety
