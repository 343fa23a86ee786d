#include "moiety/offload/residency.h"

#include <algorithm>

#include "moiety/base/error.h"

namespace moiety {

Residency::Residency(PoolSizes sizes, std::shared_ptr<OffloadPolicy> policy, Loader* loader)
    : sizes_(sizes), policy_(std::move(policy)), loader_(loader) {
  check(sizes.layers > 0 && sizes.experts > 0, "no expert layers: there is nothing to offload");
  check(sizes.high >= 1 && sizes.low >= 0, "pools of {} and {} experts are impossible", sizes.high, sizes.low);
  const auto all = static_cast<size_t>(sizes.layers * sizes.experts);
  for (const Precision p : {Precision::low, Precision::high}) {
    Pool& pool = this->pool(p);
    // No pool needs more slots than there are experts.
    const int64_t slots = std::min<int64_t>(p == Precision::high ? sizes.high : sizes.low, static_cast<int64_t>(all));
    pool.slots.resize(static_cast<size_t>(slots));
    for (int64_t s = slots; s > 0; --s) pool.free.push_back(s - 1);
    pool.where.assign(all, -1);
  }
  guessed_layer_.assign(static_cast<size_t>(sizes.layers), 0);
  expected_.assign(all, 0);
}

int64_t Residency::slot(const ExpertVersion& v) const {
  return v.precision == Precision::skip ? -1 : pool(v.precision).where[flat(v)];
}

bool Residency::has(const ExpertVersion& v) const {
  return slot(v) >= 0;
}

void Residency::insert(const ExpertVersion& v, int64_t slot, bool ahead) {
  Pool& p = pool(v.precision);
  p.slots[static_cast<size_t>(slot)] = {.taken = true, .version = v, .ahead = ahead};
  p.where[flat(v)] = static_cast<int32_t>(slot);
}

void Residency::remove(Pool& pool, int64_t slot) {
  Slot& s = pool.slots[static_cast<size_t>(slot)];
  pool.where[flat(s.version)] = -1;
  s = {};
}

// The slot of a victim, or -1. guesses_of -1: among what nobody has pinned; else among guesses for that layer. Slots
// that are being read are left and named in `busy`.
int64_t Residency::evict(Pool& pool, const Moment& now, int64_t guesses_of, std::vector<int64_t>& busy) {
  std::vector<ExpertVersion> candidates;  // ascending by layer * experts + expert
  std::vector<int64_t> open;              // their slots
  for (const int32_t slot : pool.where) {
    if (slot < 0) continue;
    const Slot& s = pool.slots[static_cast<size_t>(slot)];
    const bool guess = s.guessed && s.version.layer == guesses_of;
    if (s.in_use || (guesses_of < 0 ? s.guessed : !guess)) continue;
    candidates.push_back(s.version);
    open.push_back(slot);
  }
  while (!candidates.empty()) {
    const size_t chosen = policy_->victim(candidates, now);
    check(chosen < candidates.size(), "a policy chose victim {} of {}", chosen, candidates.size());
    const int64_t slot = open[chosen];
    const auto released = loader_ == nullptr ? Loader::Released::idle : loader_->release(candidates[chosen], slot);
    if (released != Loader::Released::busy) {
      if (released == Loader::Released::cancelled)
        ++counts_.ahead_cancelled;
      else if (pool.slots[static_cast<size_t>(slot)].ahead)
        ++counts_.ahead_unused;
      remove(pool, slot);
      return slot;
    }
    busy.push_back(slot);
    candidates.erase(candidates.begin() + static_cast<int64_t>(chosen));
    open.erase(open.begin() + static_cast<int64_t>(chosen));
  }
  return -1;
}

// Gives up a read ahead that has not begun.
void Residency::cancel(Pool& pool, int64_t slot) {
  const Slot& s = pool.slots[static_cast<size_t>(slot)];
  if (!s.ahead || loader_ == nullptr || loader_->release(s.version, slot) != Loader::Released::cancelled) return;
  ++counts_.ahead_cancelled;
  remove(pool, slot);
  pool.free.push_back(slot);
}

int64_t Residency::take(Precision precision, const Moment& now, bool from_guesses) {
  Pool& p = pool(precision);
  if (!p.free.empty()) {
    const int64_t slot = p.free.back();
    p.free.pop_back();
    return slot;
  }
  for (;;) {
    std::vector<int64_t> busy;
    if (const int64_t slot = evict(p, now, -1, busy); slot >= 0) return slot;
    if (!from_guesses) return -1;
    for (int64_t ahead = sizes_.layers - 1; ahead >= 0; --ahead)
      if (const int64_t slot = evict(p, now, (now.layer + ahead) % sizes_.layers, busy); slot >= 0) return slot;
    if (busy.empty()) return -1;
    loader_->wait_for_one(precision);
  }
}

std::vector<Use> Residency::look_up(const Demand& demand) {
  ++counts_.steps;
  counts_.pairs += static_cast<int64_t>(demand.pairs.size());
  std::vector<Use> uses;
  for (const Wanted& w : policy_->ask(demand)) {
    Use u{.expert = w.expert, .asked = w.asked, .tokens = w.tokens};
    u.used = Cached::look_up(demand.layer, w.expert, w.asked);
    u.slot = slot({demand.layer, w.expert, u.used});
    u.hit = u.slot >= 0;
    uses.push_back(u);
  }
  const bool had = guessed_layer_[static_cast<size_t>(demand.layer)] != 0;
  for (const Use& u : uses) {
    if (had) {
      ++counts_.wanted_of_guessed;
      if (expected_[static_cast<size_t>(demand.layer * sizes_.experts + u.expert)]) ++counts_.right;
    }
    if (u.hit) pool(u.used).slots[static_cast<size_t>(u.slot)].in_use = true;
  }
  // What was guessed wrong has nothing to wait for.
  for (Pool& p : pools_)
    for (size_t i = 0; i < p.slots.size(); ++i) {
      Slot& s = p.slots[i];
      if (!s.taken || s.in_use || !s.guessed || s.version.layer != demand.layer) continue;
      if (policy_->give_up_when_routed()) s.guessed = false;
      cancel(p, static_cast<int64_t>(i));
    }
  for (const Use& u : uses) {
    if (!u.hit) continue;
    Slot& s = pool(u.used).slots[static_cast<size_t>(u.slot)];
    if (s.ahead) ++counts_.ahead_used;
    s.ahead = false;
    if (loader_ != nullptr) loader_->hurry(s.version, u.slot);
  }
  return uses;
}

void Residency::record(const Use& u, const Demand& demand) {
  if (u.used != Precision::high) counts_.altered += u.tokens;
  switch (u.used) {
    case Precision::skip:
      ++counts_.skip;
      return;
    case Precision::low:
      ++(u.hit ? counts_.hit_low : counts_.miss_low);
      break;
    case Precision::high:
      ++(u.hit ? counts_.hit_high : counts_.miss_high);
      break;
  }
  policy_->used({demand.layer, u.expert, u.used}, u.tokens, u.hit, {demand.layer, demand.token});
}

bool Residency::place(Use& u, const Demand& demand) {
  const int64_t slot = take(u.used, {demand.layer, demand.token}, /*from_guesses=*/true);
  if (slot < 0) return false;
  const ExpertVersion version{demand.layer, u.expert, u.used};
  insert(version, slot, false);
  pool(u.used).slots[static_cast<size_t>(slot)].in_use = true;
  u.slot = slot;
  if (loader_ != nullptr) loader_->load(version, slot, false);
  return true;
}

void Residency::guess_ahead(const Demand& demand, LookAhead* look) {
  for (const Guess& g : policy_->guess(demand, *this, look)) {
    const ExpertVersion& v = g.version;
    check(v.layer >= 0 && v.layer < sizes_.layers && v.expert >= 0 && v.expert < sizes_.experts,
          "a policy guesses expert {} of layer {}: there are {} of {}", v.expert, v.layer, sizes_.experts,
          sizes_.layers);
    guessed_layer_[static_cast<size_t>(v.layer)] = 1;
    auto& expected = expected_[flat(v)];
    if (!expected) ++counts_.guessed;
    expected = 1;
    if (const int64_t held = slot(v); held >= 0) {
      pool(v.precision).slots[static_cast<size_t>(held)].guessed = true;
      continue;
    }
    if (!g.load) continue;
    const int64_t slot = take(v.precision, {demand.layer, demand.token}, /*from_guesses=*/false);
    if (slot < 0) {
      ++counts_.ahead_dropped;
      continue;
    }
    ++counts_.ahead;
    insert(v, slot, true);
    pool(v.precision).slots[static_cast<size_t>(slot)].guessed = true;
    if (loader_ != nullptr) loader_->load(v, slot, true);
  }
}

void Residency::unpin(const Use& u, int64_t layer) {
  if (u.slot < 0) return;
  Slot& s = pool(u.used).slots[static_cast<size_t>(u.slot)];
  check(s.taken && s.version == ExpertVersion{layer, u.expert, u.used}, "expert {} of layer {} left while in use",
        u.expert, layer);
  s.in_use = false;
}

void Residency::end_layer(int64_t layer) {
  for (Pool& p : pools_)
    for (size_t i = 0; i < p.slots.size(); ++i) {
      Slot& s = p.slots[i];
      if (!s.taken || s.version.layer != layer) continue;
      s.in_use = s.guessed = false;
    }
  guessed_layer_[static_cast<size_t>(layer)] = 0;
  std::fill_n(expected_.begin() + layer * sizes_.experts, sizes_.experts, uint8_t{0});
}

bool Residency::put(const ExpertVersion& v) {
  Pool& p = pool(v.precision);
  if (has(v)) return true;
  if (p.free.empty()) return false;
  const int64_t slot = p.free.back();
  p.free.pop_back();
  insert(v, slot, false);
  if (loader_ != nullptr) loader_->load(v, slot, false);
  return true;
}

}  // namespace moiety
