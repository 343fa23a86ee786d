#include "moiety/train/ranks.h"

#include <torch/torch.h>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr auto kTimeout = std::chrono::minutes(30);  // evaluation and saving keep the others waiting
constexpr int64_t kBucket = int64_t{1} << 23;        // elements that are summed at a time

int64_t number(const char* name, int64_t most) {
  const char* text = std::getenv(name);
  check(text != nullptr, "{} is not set: start several processes with torchrun --no-python", name);
  int64_t value = -1;
  const auto [end, error] = std::from_chars(text, text + std::strlen(text), value);
  check(error == std::errc() && *end == 0 && value >= 0 && value <= most, "{}={} is no number from 0 to {}", name, text,
        most);
  return value;
}

class GlooRanks : public Ranks {
 public:
  GlooRanks(c10::intrusive_ptr<c10d::Store> store, std::string host, int64_t rank, int64_t size)
      : store_(std::move(store)), host_(std::move(host)), rank_(rank), size_(size) {
    auto gloo = c10d::ProcessGroupGloo::Options::create(kTimeout);
    const bool local = host_ == "127.0.0.1" || host_ == "localhost";
    gloo->devices.push_back(local ? c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1")
                                  : c10d::ProcessGroupGloo::createDefaultDevice());
    group_ = c10::make_intrusive<c10d::ProcessGroupGloo>(store_, static_cast<int>(rank), static_cast<int>(size), gloo);
  }

  std::unique_ptr<Ranks> part(const std::vector<int64_t>& members) override {
    const auto own = std::find(members.begin(), members.end(), rank_);
    check(own != members.end(), "process {} is not in the group that it asks for", rank_);
    return std::make_unique<GlooRanks>(
        c10::make_intrusive<c10d::PrefixStore>(fmt::format("part-{}", fmt::join(members, "-")), store_), host_,
        own - members.begin(), static_cast<int64_t>(members.size()));
  }

  int64_t rank() const override { return rank_; }
  int64_t size() const override { return size_; }

  void sum(const std::vector<torch::Tensor>& tensors) override {
    const torch::NoGradGuard frozen;
    // Many small tensors travel as one.
    for (size_t begin = 0; begin < tensors.size();) {
      size_t end = begin;
      int64_t elements = 0;
      while (end < tensors.size() && (end == begin || (elements + tensors[end].numel() <= kBucket &&
                                                       tensors[end].scalar_type() == tensors[begin].scalar_type())))
        elements += tensors[end++].numel();
      std::vector<torch::Tensor> flat;
      for (size_t i = begin; i < end; ++i) flat.push_back(tensors[i].reshape({-1}));
      std::vector<torch::Tensor> bucket{torch::cat(flat).to(torch::kCPU)};
      group_->allreduce(bucket)->wait();
      int64_t at = 0;
      for (size_t i = begin; i < end; ++i) {
        tensors[i].copy_(bucket[0].narrow(0, at, tensors[i].numel()).view(tensors[i].sizes()));
        at += tensors[i].numel();
      }
      begin = end;
    }
  }

  Tensor all_to_all(const Tensor& rows, const std::vector<int64_t>& send,
                    const std::vector<int64_t>& receive) override {
    const torch::NoGradGuard frozen;
    // As bytes: Gloo does not know every dtype.
    auto out = torch::empty({std::accumulate(receive.begin(), receive.end(), int64_t{0}), rows.size(1)},
                            rows.options().device(torch::kCPU));
    auto from = rows.to(torch::kCPU).contiguous().view(torch::kUInt8), to = out.view(torch::kUInt8);
    auto receive_counts = receive, send_counts = send;
    group_->alltoall_base(to, from, receive_counts, send_counts)->wait();
    return out.to(rows.device());
  }

  void barrier() override { group_->barrier()->wait(); }

 private:
  c10::intrusive_ptr<c10d::Store> store_;
  std::string host_;
  int64_t rank_, size_;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> group_;
};

// Where the processes of a run find each other.
c10::intrusive_ptr<c10d::Store> meeting_place(const std::string& address, int64_t rank) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(number("MASTER_PORT", 65535));
  // torchrun keeps the store itself and says so.
  const char* agent = std::getenv("TORCHELASTIC_USE_AGENT_STORE");
  options.isServer = rank == 0 && !(agent != nullptr && std::strcmp(agent, "True") == 0);
  options.waitWorkers = false;
  options.timeout = kTimeout;
  const char* attempt = std::getenv("TORCHELASTIC_RESTART_COUNT");
  return c10::make_intrusive<c10d::PrefixStore>(fmt::format("moiety-{}", attempt != nullptr ? attempt : "0"),
                                                c10::make_intrusive<c10d::TCPStore>(address, options));
}

}  // namespace

std::unique_ptr<Ranks> Ranks::from_environment() {
  const char* world = std::getenv("WORLD_SIZE");
  if (world == nullptr || std::getenv("RANK") == nullptr) return nullptr;
  const int64_t size = number("WORLD_SIZE", 1 << 16);
  if (size <= 1) return nullptr;
  const char* address = std::getenv("MASTER_ADDR");
  check(address != nullptr, "MASTER_ADDR is not set: start several processes with torchrun --no-python");
  const int64_t rank = number("RANK", size - 1);
  return std::make_unique<GlooRanks>(meeting_place(address, rank), address, rank, size);
}

}  // namespace moiety
