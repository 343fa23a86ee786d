#pragma once
// The recurrence of a selective state space (Gu and Dao 2023, arXiv 2312.00752): for each channel d and state n
//   h[n] = exp(dt a[n]) h[n] + dt u b[n],   y = sum over n of c[n] h[n],
// with dt and u of the token and channel, b and c of the token. Everything is f32.
#include <cstdint>

namespace moiety {

/// What a token does to the recurrence.
enum class ScanToken : uint8_t {
  step,   ///< as above
  fresh,  ///< the same from a state of zeros: a new sequence begins
  skip,   ///< padding: the state stays, y is 0
};

constexpr int64_t kScanChunk = 32;  ///< tokens between states that the backward pass starts from
constexpr int64_t kScanGroup = 64;  ///< channels that one call of scan_backward may have

/// One row of T tokens. Matrices are row-major with `channels` or `states` numbers a row.
struct ScanRow {
  int64_t tokens = 0, channels = 0, states = 0;
  const float *u = nullptr, *dt = nullptr;  // [T, channels]
  const float* a = nullptr;                 // [states, channels]
  const float *b = nullptr, *c = nullptr;   // [T, states]
  const ScanToken* what = nullptr;          // [T]; null: all are steps
};

/// Channels [first, last): writes y [T, channels] and moves h [states, channels] on. `kept`, null or
/// [ceil(T / kScanChunk), states, channels], gets the states in front of every chunk.
void scan(const ScanRow& row, int64_t first, int64_t last, float* h, float* y, float* kept);

/// What scan_backward writes, its channels of each: du, ddt [T, channels], da [states, channels]; its share of db, dc
/// [T, states] whole.
struct ScanGradients {
  float *du = nullptr, *ddt = nullptr, *da = nullptr, *db = nullptr, *dc = nullptr;
};
/// Floats that scan_backward needs to work in.
int64_t scan_scratch(int64_t states);
/// Gradients from dy [T, channels] and `kept`, for at most kScanGroup channels [first, last). dh [states, channels] is
/// the gradient of the last state, and becomes that of the first.
void scan_backward(const ScanRow& row, int64_t first, int64_t last, const float* dy, const float* kept, float* dh,
                   const ScanGradients& out, float* scratch);

}  // namespace moiety
