// The mix of tokens that lie together, for narrow columns and a left factor with one short side.
//
// spread: y[(o, c)] = Σ_i A[o, i] · p[i, c], vectors over (o, c): the table holds A[o, i] at (i, (o, c)), and p[i] is
//         repeated.
// fold:   y[o, c] = Σ_i A[o, i] · p[(i, c)], vectors over (i, c): the table holds A[o, i] at (o, (i, c)), and the sums
//         are those of the repeated columns, added up at the end.
#include "cpu/kron_linear/finish.h"
#include "cpu/kron_linear/gather.h"
#include "cpu/kron_linear/pattern.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {
namespace {

constexpr int kTokens = 4;  // that share the reads of the table

// sums[t][(o, c)] of kTokens tokens; patterns [t][i][vectors].
KF_INLINE void spread_sums(const MixJob& job, const float* patterns, int64_t vectors, int64_t length, float* sums) {
  const int64_t row = vectors * kLanes, token = job.in_rows * row;
  int64_t at = 0;
  for (int64_t c = 0; c < length; c += kLanes) {
    Vector sum[kTokens] = {};
    const float* table = job.spread + c;
    const float* pattern = patterns + at;
    for (int64_t i = 0; i < job.in_rows; ++i) {
      const Vector left = load(table);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sum[t] += left * load(pattern + t * token);
      table += length;
      pattern += row;
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) store(sums + t * length + c, sum[t]);
    at = at + kLanes == row ? 0 : at + kLanes;
  }
}

template <class T>
void spread_tokens(const MixJob& job, int64_t token, int64_t tokens, float* scratch) {
  const int64_t vectors = pattern_vectors(job.columns), row = vectors * kLanes;
  const int64_t width = job.out_rows * job.columns, length = job.flat_length;
  float* patterns = scratch;
  float* sums = scratch + kTokens * job.in_rows * row;
  for (int64_t t = 0; t < tokens; ++t) {
    float* own = patterns + t * job.in_rows * row;
    gather(address<T>(job.p, {token + t, 0, 0}), job.p.stride[1], job.p.stride[2], job.in_rows, job.columns,
           job.in_scale, job.columns, own, row);
    for (int64_t i = 0; i < job.in_rows; ++i) repeat(own + i * row, job.columns, vectors);
  }
  // Tokens that are not there take part in sums that no one reads.
  for (int64_t at = tokens * job.in_rows * row; at < kTokens * job.in_rows * row; ++at) patterns[at] = 0;
  spread_sums(job, patterns, vectors, length, sums);
  for (int64_t t = 0; t < tokens; ++t) finish_row<T>(job, {token + t, 0, 0}, width, sums + t * length);
}

// sums[t][o][(repeats, c)] of kTokens tokens and Rows rows; rows [t][(i, c)].
template <int Rows>
KF_INLINE void fold_sums(const float* table, const float* rows, int64_t vectors, int64_t length, float* sums,
                         int64_t token_stride) {
  const int64_t row = vectors * kLanes;
  for (int64_t at = 0; at < row; at += kLanes) {
    Vector sum[kTokens][Rows] = {};
    for (int64_t c = at; c < length; c += row) {
      Vector left[Rows];
#pragma GCC unroll 4
      for (int o = 0; o < Rows; ++o) left[o] = load(table + o * length + c);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const Vector right = load(rows + t * length + c);
#pragma GCC unroll 4
        for (int o = 0; o < Rows; ++o) sum[t][o] += left[o] * right;
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int o = 0; o < Rows; ++o) store(sums + t * token_stride + o * row + at, sum[t][o]);
    }
  }
}

template <class T>
void fold_tokens(const MixJob& job, int64_t token, int64_t tokens, float* scratch) {
  const int64_t vectors = pattern_vectors(job.columns), row = vectors * kLanes;
  const int64_t width = job.in_rows * job.columns, length = job.flat_length;
  float* rows = scratch;
  float* sums = scratch + kTokens * length;
  for (int64_t t = 0; t < kTokens; ++t) {
    float* own = rows + t * length;
    if (t < tokens) gather_row(address<T>(job.p, {token + t, 0, 0}), width, nullptr, own);
    for (int64_t c = t < tokens ? width : 0; c < length; ++c) own[c] = 0;
  }
  const int64_t token_stride = job.out_rows * row;
  int64_t o = 0;
  for (; o + 4 <= job.out_rows; o += 4) {
    fold_sums<4>(job.fold + o * length, rows, vectors, length, sums + o * row, token_stride);
  }
  for (; o < job.out_rows; ++o) {
    fold_sums<1>(job.fold + o * length, rows, vectors, length, sums + o * row, token_stride);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float* own = sums + t * token_stride;
    for (int64_t r = 0; r < job.out_rows; ++r) fold_repeats(own + r * row, job.columns, vectors);
    finish<T>(job, {token + t, 0, 0}, job.out_rows, job.columns, own, row);
  }
}

template <class T>
void flat_unit(const MixJob& job, int64_t unit, float* scratch) {
  const int64_t begin = unit * job.token_block;
  const int64_t last = begin + job.token_block, end = last < job.tokens ? last : job.tokens;
  for (int64_t token = begin; token < end; token += kTokens) {
    const int64_t tokens = end - token < kTokens ? end - token : kTokens;
    if (job.spread != nullptr) {
      spread_tokens<T>(job, token, tokens, scratch);
    } else {
      fold_tokens<T>(job, token, tokens, scratch);
    }
  }
}

}  // namespace

int64_t flat_mix_scratch(const MixJob& job) {
  const int64_t row = pattern_vectors(job.columns) * kLanes;
  return kTokens * (job.flat_length + (job.spread != nullptr ? job.in_rows : job.out_rows) * row);
}

void flat_mix_units(const MixJob& job, int64_t begin, int64_t end, float* scratch) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (job.is_bf16) {
      flat_unit<bf16>(job, unit, scratch);
    } else {
      flat_unit<float>(job, unit, scratch);
    }
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
