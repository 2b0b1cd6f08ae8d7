#include "cpu/kron_linear/dots.h"
#include "cpu/kron_linear/finish.h"
#include "cpu/kron_linear/gather.h"
#include "cpu/kron_linear/mix_job.h"
#include "cpu/kron_linear/tile.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {
namespace {

constexpr int kMostRows = 8;

int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

// p of these tokens and columns as rows of floats, tokens side by side; where it lies so already, p itself.
template <class T>
const float* rows_of(const MixJob& job, int64_t token, int64_t tokens, int64_t column, int64_t columns, int64_t stride,
                     float* scratch, int64_t* found_stride) {
  const Place at{token, 0, column};
  if (sizeof(T) == sizeof(float) && tokens == 1 && job.p.stride[2] == 1 && job.in_scale == nullptr &&
      columns % kLanes == 0) {
    *found_stride = job.p.stride[1];
    return reinterpret_cast<const float*>(address<T>(job.p, at));
  }
  for (int64_t t = 0; t < tokens; ++t) {
    gather(address<T>(job.p, {token + t, 0, column}), job.p.stride[1], job.p.stride[2], job.in_rows, columns,
           job.in_scale == nullptr ? nullptr : job.in_scale + column, job.columns, scratch + t * columns, stride);
  }
  // What pads the rows takes part in sums that no one reads; it must only be no trap for the processor.
  const int64_t used = tokens * columns;
  for (int64_t r = 0; r < job.in_rows && used < stride; ++r) {
    for (int64_t c = used; c < stride; ++c) scratch[r * stride + c] = 0;
  }
  *found_stride = stride;
  return scratch;
}

#if KF_HAS_DOTS
// As `rows_of`, in pairs of rows.
const uint32_t* paired_rows_of(const MixJob& job, int64_t token, int64_t tokens, int64_t column, int64_t columns,
                               int64_t stride, uint32_t* scratch) {
  for (int64_t r = 0; r < job.in_rows; r += 2) {
    uint32_t* row = scratch + r / 2 * stride;
    for (int64_t t = 0; t < tokens; ++t) {
      const bf16* first = address<bf16>(job.p, {token + t, r, column});
      const bf16* second = r + 1 < job.in_rows ? first + job.p.stride[1] : nullptr;
      pair_rows(first, second, job.p.stride[2], columns, row + t * columns);
    }
    for (int64_t c = tokens * columns; c < stride; ++c) row[c] = 0;
  }
  return scratch;
}

template <int Rows>
void dots_row(const uint32_t* panel, int64_t pairs, const uint32_t* rows, int64_t width, float* sums) {
  int64_t c = 0;
  for (; c + kLanes < width; c += kPair) {
    outer_tile_dots<Rows, 2>(panel, pairs, rows + c, width, false, sums + c, width);
  }
  if (c < width) outer_tile_dots<Rows, 1>(panel, pairs, rows + c, width, false, sums + c, width);
}

// The unit's products by pairs, written as `mix_unit` does.
void mix_unit_by_dots(const MixJob& job, int64_t token, int64_t tokens, int64_t column, int64_t columns,
                      float* scratch) {
  const int64_t width = padded(tokens * columns), pairs = (job.in_rows + 1) / 2;
  float* sums = scratch;
  const uint32_t* rows = paired_rows_of(job, token, tokens, column, columns, width,
                                        reinterpret_cast<uint32_t*>(scratch + kMostRows * width));
  const auto* panel = reinterpret_cast<const uint32_t*>(job.panels);
  for (int64_t row = 0; row < job.out_rows; row += job.panel_rows, panel += job.panel_rows * pairs) {
    if (job.panel_rows == 8) {
      dots_row<8>(panel, pairs, rows, width, sums);
    } else {
      dots_row<4>(panel, pairs, rows, width, sums);
    }
    const int64_t here = job.out_rows - row < job.panel_rows ? job.out_rows - row : job.panel_rows;
    for (int64_t t = 0; t < tokens; ++t) {
      finish<bf16>(job, {token + t, row, column}, here, columns, sums + t * columns, width);
    }
  }
}
#endif

template <class T>
void mix_unit(const MixJob& job, int64_t unit, float* scratch) {
  const int64_t token = unit / job.column_blocks * job.token_block;
  const int64_t column = unit % job.column_blocks * job.column_block;
  const int64_t tokens = job.tokens - token < job.token_block ? job.tokens - token : job.token_block;
  const int64_t columns = job.columns - column < job.column_block ? job.columns - column : job.column_block;
  const int64_t width = padded(tokens * columns);
  float* sums = scratch;
  if (job.p.data == nullptr || job.panels == nullptr) {
    for (int64_t c = 0; c < width; ++c) sums[c] = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t row = 0; row < job.out_rows; ++row) {
        const Place at{token + t, row, column};
        if (job.p.data != nullptr) {
          gather(address<T>(job.p, at), job.p.stride[1], job.p.stride[2], 1, columns,
                 job.in_scale == nullptr ? nullptr : job.in_scale + row * job.columns + column, job.columns, sums,
                 columns);
        }
        finish<T>(job, at, 1, columns, sums, columns);
      }
    }
    return;
  }
#if KF_HAS_DOTS
  if (job.by_dots) {
    mix_unit_by_dots(job, token, tokens, column, columns, scratch);
    return;
  }
#endif
  int64_t stride = 0;
  const float* rows = rows_of<T>(job, token, tokens, column, columns, width, scratch + kMostRows * width, &stride);
  const float* panel = job.panels;
  for (int64_t row = 0; row < job.out_rows; row += job.panel_rows, panel += job.panel_rows * job.in_rows) {
    if (job.panel_rows == 8) {
      outer_row<8>(panel, job.in_rows, rows, stride, width, sums, width);
    } else {
      outer_row<4>(panel, job.in_rows, rows, stride, width, sums, width);
    }
    const int64_t here = job.out_rows - row < job.panel_rows ? job.out_rows - row : job.panel_rows;
    for (int64_t t = 0; t < tokens; ++t) {
      finish<T>(job, {token + t, row, column}, here, columns, sums + t * columns, width);
    }
  }
}

}  // namespace

int64_t mix_scratch(const MixJob& job) {
  const int64_t rows = kMostRows + (job.panels == nullptr ? 0 : job.in_rows);
  return rows * padded(job.token_block * job.column_block) + kLanes;
}

void mix_units(const MixJob& job, int64_t begin, int64_t end, float* scratch) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (job.is_bf16) {
      mix_unit<bf16>(job, unit, scratch);
    } else {
      mix_unit<float>(job, unit, scratch);
    }
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
