#include "cpu/kron_linear/dots.h"
#include "cpu/kron_linear/gather.h"
#include "cpu/kron_linear/reduce_job.h"
#include "cpu/kron_linear/tile.h"

namespace kronafuse::cpu::KRONAFUSE_LEVEL {
namespace {

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// One row of an operand into panels of Width columns: panel j's row k lies at (j · depth + k) · Width.
template <int Width, class T>
KF_INLINE void pack_row(const T* from, int64_t stride, int64_t count, const float* factor, float* row, int64_t depth,
                        float* to) {
  gather(from, int64_t{0}, stride, 1, count, factor, 0, row, 0);
  const int64_t panels = (count + Width - 1) / Width;
  for (int64_t panel = 0; panel < panels; ++panel) {
    __builtin_memcpy(to + panel * depth * Width, row + panel * Width, Width * sizeof(float));
  }
}

// Rows [first, first + depth) of (M·G) by Width, from `column` on. `row` is scratch, padded with zeros.
template <int Width, class T>
void pack(const Operand& operand, int64_t groups, int64_t first, int64_t depth, int64_t column, int64_t count,
          const float* factor, int64_t factor_stride, float* row, float* to) {
  int64_t token = first / groups, group = first % groups;
  for (int64_t k = 0; k < depth; ++k) {
    const T* from = static_cast<const T*>(operand.data) + token * operand.stride[0] + group * operand.stride[1] +
                    column * operand.stride[2];
    pack_row<Width>(from, operand.stride[2], count, factor == nullptr ? nullptr : factor + group * factor_stride, row,
                    depth, to + k * Width);
    if (++group == groups) {
      group = 0;
      ++token;
    }
  }
}

template <class T, int Rows>
void outer_unit(const ReduceJob& job, int64_t slice, int64_t part, float* scratch) {
  const int64_t column = part * job.part_width, columns = least(job.part_width, job.width - column);
  const int64_t begin = slice * job.slice_tokens * job.groups;
  const int64_t end = least((slice + 1) * job.slice_tokens, job.tokens) * job.groups;
  const int64_t wide = rounded_up(columns, kPair), tall = rounded_up(job.height, Rows);
  float* row = scratch;
  const int64_t row_size = rounded_up(job.height > columns ? job.height : columns, kPair);
  float* p_panels = row + row_size;
  float* q_panels = p_panels + tall * job.block;
  float* out = job.partial + slice * job.padded_height * job.padded_width + column;
  bool accumulate = false;
  for (int64_t first = begin; first < end; first += job.block) {
    const int64_t depth = least(job.block, end - first);
    for (int64_t c = 0; c < row_size; ++c) row[c] = 0;
    pack<Rows, T>(job.p, job.groups, first, depth, 0, job.height, job.p_scale, job.height, row, p_panels);
    for (int64_t c = 0; c < row_size; ++c) row[c] = 0;
    pack<kPair, T>(job.q, job.groups, first, depth, column, columns, nullptr, 0, row, q_panels);
    for (int64_t c = 0; c < wide; c += kPair) {
      for (int64_t r = 0; r < tall; r += Rows) {
        outer_tile<Rows, 2>(p_panels + r * depth, depth, q_panels + c * depth, kPair, accumulate,
                            out + r * job.padded_width + c, job.padded_width);
      }
    }
    accumulate = true;
  }
  if (accumulate) return;
  for (int64_t r = 0; r < tall; ++r) {
    for (int64_t c = 0; c < wide; ++c) out[r * job.padded_width + c] = 0;
  }
}

#if KF_HAS_DOTS
// As `pack`, of pairs of rows: panel j's pair k lies at (j · depth + k) · Width, depth counting pairs.
template <int Width>
void pack_pairs(const Operand& operand, int64_t groups, int64_t first, int64_t rows, int64_t column, int64_t count,
                uint32_t* row, uint32_t* to) {
  const int64_t depth = (rows + 1) / 2, panels = (count + Width - 1) / Width;
  const auto row_at = [&](int64_t at) {
    return static_cast<const bf16*>(operand.data) + at / groups * operand.stride[0] + at % groups * operand.stride[1] +
           column * operand.stride[2];
  };
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t at = first + 2 * k;
    pair_rows(row_at(at), 2 * k + 1 < rows ? row_at(at + 1) : nullptr, operand.stride[2], count, row);
    for (int64_t panel = 0; panel < panels; ++panel) {
      __builtin_memcpy(to + (panel * depth + k) * Width, row + panel * Width, Width * sizeof(uint32_t));
    }
  }
}

template <int Rows>
void outer_unit_by_dots(const ReduceJob& job, int64_t slice, int64_t part, float* scratch) {
  const int64_t column = part * job.part_width, columns = least(job.part_width, job.width - column);
  const int64_t begin = slice * job.slice_tokens * job.groups;
  const int64_t end = least((slice + 1) * job.slice_tokens, job.tokens) * job.groups;
  const int64_t wide = rounded_up(columns, kPair), tall = rounded_up(job.height, Rows);
  const int64_t row_size = rounded_up(job.height > columns ? job.height : columns, kPair);
  // Words are as wide as floats: the same scratch, half used.
  auto* row = reinterpret_cast<uint32_t*>(scratch);
  uint32_t* p_panels = row + row_size;
  uint32_t* q_panels = p_panels + tall * job.block;
  float* out = job.partial + slice * job.padded_height * job.padded_width + column;
  bool accumulate = false;
  for (int64_t first = begin; first < end; first += job.block) {
    const int64_t rows = least(job.block, end - first), depth = (rows + 1) / 2;
    for (int64_t c = 0; c < row_size; ++c) row[c] = 0;
    pack_pairs<Rows>(job.p, job.groups, first, rows, 0, job.height, row, p_panels);
    for (int64_t c = 0; c < row_size; ++c) row[c] = 0;
    pack_pairs<kPair>(job.q, job.groups, first, rows, column, columns, row, q_panels);
    for (int64_t c = 0; c < wide; c += kPair) {
      for (int64_t r = 0; r < tall; r += Rows) {
        outer_tile_dots<Rows, 2>(p_panels + r * depth, depth, q_panels + c * depth, kPair, accumulate,
                                 out + r * job.padded_width + c, job.padded_width);
      }
    }
    accumulate = true;
  }
  if (accumulate) return;
  for (int64_t r = 0; r < tall; ++r) {
    for (int64_t c = 0; c < wide; ++c) out[r * job.padded_width + c] = 0;
  }
}

// As `rows_by_groups`, in bf16; neighbours in memory are groups.
void half_rows_by_groups(const Operand& operand, int64_t groups, int64_t token, int64_t tokens, int64_t first,
                         int64_t rows, int64_t padded_rows, int64_t stride, bf16* to) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      const bf16* from = static_cast<const bf16*>(operand.data) + (token + t) * operand.stride[0] +
                         (first + r) * operand.stride[2];
      bf16* row = to + r * stride + t * groups;
      int64_t g = 0;
      for (; g + kLanes <= groups; g += kLanes) {
        Halves halves;
        __builtin_memcpy(&halves, from + g, sizeof halves);
        __builtin_memcpy(row + g, &halves, sizeof halves);
      }
      for (; g < groups; ++g) row[g] = from[g];
    }
  }
  for (int64_t r = 0; r < padded_rows; ++r) {
    for (int64_t c = r < rows ? tokens * groups : 0; c < stride; ++c) to[r * stride + c] = bf16{0};
  }
}

void inner_unit_by_dots(const ReduceJob& job, int64_t slice, int64_t part, float* scratch) {
  const int64_t column = part * job.part_width, columns = least(job.part_width, job.width - column);
  const int64_t begin = slice * job.slice_tokens, end = least(begin + job.slice_tokens, job.tokens);
  const int64_t tall = rounded_up(job.height, 4), wide = rounded_up(columns, 4);
  const int64_t stride = rounded_up(job.block * job.groups, kPair);
  auto* p_rows = reinterpret_cast<bf16*>(scratch);
  bf16* q_rows = p_rows + tall * stride;
  float* out = job.partial + slice * job.padded_height * job.padded_width + column;
  for (int64_t r = 0; r < tall; ++r) {
    for (int64_t c = 0; c < wide; ++c) out[r * job.padded_width + c] = 0;
  }
  for (int64_t token = begin; token < end; token += job.block) {
    const int64_t tokens = least(job.block, end - token);
    const int64_t length = rounded_up(tokens * job.groups, kPair);
    half_rows_by_groups(job.p, job.groups, token, tokens, 0, job.height, tall, length, p_rows);
    half_rows_by_groups(job.q, job.groups, token, tokens, column, columns, wide, length, q_rows);
    for (int64_t r = 0; r < tall; r += 4) {
      for (int64_t c = 0; c < wide; c += 4) {
        inner_tile_dots(p_rows + r * length, length, q_rows + c * length, length, length,
                        out + r * job.padded_width + c, job.padded_width);
      }
    }
  }
}

void reduce_unit_by_dots(const ReduceJob& job, int64_t unit, float* scratch) {
  const int64_t slice = unit / job.parts, part = unit % job.parts;
  if (job.by_groups) {
    inner_unit_by_dots(job, slice, part, scratch);
  } else if (job.panel_rows == 8) {
    outer_unit_by_dots<8>(job, slice, part, scratch);
  } else {
    outer_unit_by_dots<4>(job, slice, part, scratch);
  }
}
#endif

// Rows (F) of all groups of these tokens side by side, the rest of `stride` and of the rows filled up with zeros.
template <class T>
void rows_by_groups(const Operand& operand, int64_t groups, int64_t token, int64_t tokens, int64_t first, int64_t rows,
                    int64_t padded_rows, const float* factor, int64_t stride, float* to) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* from =
        static_cast<const T*>(operand.data) + (token + t) * operand.stride[0] + first * operand.stride[2];
    gather(from, operand.stride[2], operand.stride[1], rows, groups, factor, groups, to + t * groups, stride);
  }
  for (int64_t r = 0; r < padded_rows; ++r) {
    for (int64_t c = r < rows ? tokens * groups : 0; c < stride; ++c) to[r * stride + c] = 0;
  }
}

template <class T>
void inner_unit(const ReduceJob& job, int64_t slice, int64_t part, float* scratch) {
  const int64_t column = part * job.part_width, columns = least(job.part_width, job.width - column);
  const int64_t begin = slice * job.slice_tokens, end = least(begin + job.slice_tokens, job.tokens);
  const int64_t tall = rounded_up(job.height, 4), wide = rounded_up(columns, 4);
  const int64_t stride = rounded_up(job.block * job.groups, kLanes);
  float* p_rows = scratch;
  float* q_rows = scratch + tall * stride;
  float* out = job.partial + slice * job.padded_height * job.padded_width + column;
  for (int64_t r = 0; r < tall; ++r) {
    for (int64_t c = 0; c < wide; ++c) out[r * job.padded_width + c] = 0;
  }
  for (int64_t token = begin; token < end; token += job.block) {
    const int64_t tokens = least(job.block, end - token);
    const int64_t length = rounded_up(tokens * job.groups, kLanes);
    rows_by_groups<T>(job.p, job.groups, token, tokens, 0, job.height, tall, job.p_scale, length, p_rows);
    rows_by_groups<T>(job.q, job.groups, token, tokens, column, columns, wide, nullptr, length, q_rows);
    for (int64_t r = 0; r < tall; r += 4) {
      for (int64_t c = 0; c < wide; c += 4) {
        inner_tile(p_rows + r * length, length, q_rows + c * length, length, length, out + r * job.padded_width + c,
                   job.padded_width);
      }
    }
  }
}

template <class T>
void reduce_unit(const ReduceJob& job, int64_t unit, float* scratch) {
  const int64_t slice = unit / job.parts, part = unit % job.parts;
  if (job.by_groups) {
    inner_unit<T>(job, slice, part, scratch);
  } else if (job.panel_rows == 8) {
    outer_unit<T, 8>(job, slice, part, scratch);
  } else {
    outer_unit<T, 4>(job, slice, part, scratch);
  }
}

}  // namespace

int64_t reduce_pair() { return kPair; }

int64_t reduce_scratch(const ReduceJob& job) {
  if (job.by_groups) {
    return (rounded_up(job.height, 4) + rounded_up(job.part_width, 4)) * rounded_up(job.block * job.groups, kPair);
  }
  const int64_t tall = rounded_up(job.height, job.panel_rows), wide = rounded_up(job.part_width, kPair);
  return rounded_up(job.height > wide ? job.height : wide, kPair) + (tall + wide) * job.block;
}

void reduce_units(const ReduceJob& job, int64_t begin, int64_t end, float* scratch) {
  for (int64_t unit = begin; unit < end; ++unit) {
#if KF_HAS_DOTS
    if (job.by_dots) {
      reduce_unit_by_dots(job, unit, scratch);
      continue;
    }
#endif
    if (job.is_bf16) {
      reduce_unit<bf16>(job, unit, scratch);
    } else {
      reduce_unit<float>(job, unit, scratch);
    }
  }
}

}  // namespace kronafuse::cpu::KRONAFUSE_LEVEL
