// One block of rows through the hidden layer, in three parts:
//   into_hidden    acc = in · firstᵀ, over the features in a ring of stages
//   at_hidden      forward h = act(acc + bias), backward dpre = s · acc ⊙ act'(pre); rounded into shared memory
//   out_of_hidden  out = hidden · second, scaled, plus what is added, over the result's columns in a ring of stages
#pragma once

#include "cuda/bottleneck/activation.cuh"
#include "cuda/bottleneck/tiles.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/warp.cuh"

namespace kronafuse::cuda::bottleneck {

template <class T_, int INDEX, bool BACKWARD_>
struct RowsTraits {
  using T = T_;
  static constexpr Tile TILE = TILES[INDEX];
  static constexpr bool BACKWARD = BACKWARD_;
  static constexpr int BLOCK_M = TILE.block_m;
  static constexpr int THREADS = TILE.threads();
  static constexpr int WARPS_M = TILE.warps_m, WARPS_N = TILE.warps_n, WARPS = WARPS_M * WARPS_N;
  static constexpr int ROWS = BLOCK_M / (16 * WARPS_M);         // fragments of a warp along the rows
  static constexpr int GROUPS = TILE.width / (16 * WARPS_N);    // of 16 columns of the hidden layer
  static constexpr int WARP_COLUMNS = TILE.warp_columns();      // of a step of the result
  static constexpr int STAGED = TILE.staged_columns(), PITCH = TILE.staging_pitch();
  static constexpr int PARTS = WARP_COLUMNS / STAGED;
  static constexpr int CHUNKS = 16 * STAGED / 8 / 32;           // of 8 columns, that a lane stores at a time
  static constexpr int BLOCKS = INDEX == NARROW ? 2 : 1;        // of a multiprocessor, for the register budget
};

template <class Traits>
struct Rows {
  using T = typename Traits::T;
  static constexpr int ROWS = Traits::ROWS, GROUPS = Traits::GROUPS, THREADS = Traits::THREADS;

  const RowsArguments& args;
  unsigned char* hidden_tile;
  unsigned char* ring;
  int64_t block;
  int64_t row0;
  int split;
  int padded;  // H as a multiple of 16
  int warp_m, warp_n;

  KF_DEVICE explicit Rows(const RowsArguments& arguments) : args(arguments) {
    hidden_tile = dynamic_shared();
    ring = hidden_tile + args.layout.hidden_bytes;
    block = static_cast<int64_t>(blockIdx.x) / args.splits;
    split = static_cast<int>(blockIdx.x) % args.splits;
    row0 = block * Traits::BLOCK_M;
    padded = (args.width + 15) / 16 * 16;
    warp_m = warp_index() / Traits::WARPS_N;
    warp_n = warp_index() % Traits::WARPS_N;
  }

  KF_DEVICE unsigned char* in_tile(int slot) const { return ring + slot * args.layout.stage_bytes(); }
  KF_DEVICE unsigned char* first_tile(int slot) const { return in_tile(slot) + args.layout.in_bytes; }
  KF_DEVICE unsigned char* raw_tile(int slot) const { return first_tile(slot) + args.layout.first_bytes; }
  KF_DEVICE int first_column(int group) const { return (group * Traits::WARPS_N + warp_n) * 16; }

  KF_DEVICE void start_step(int step, int steps) const {
    if (step < steps) {
      const int slot = step % args.layout.first_stages, column = step * STEP;
      start_features<T, Traits::BLOCK_M, THREADS>(in_tile(slot), raw_tile(slot), args.in, row0, args.tokens, column,
                                                  args.in_features);
      if (args.product) {
        if constexpr (Traits::BACKWARD) {
          const int pitch = args.layout.hidden_pitch;
          load_factor_tile<T, THREADS>(first_tile(slot), args.first, column, STEP, 0, padded / 8,
                                       args.width_chunks_log2,
                                       [=](int row, int chunk) { return row_chunk(row, chunk, pitch); });
        } else {
          load_factor_tile<T, THREADS>(first_tile(slot), args.first, 0, padded, column, STEP_CHUNKS, STEP_CHUNKS_LOG2,
                                       step_chunk);
        }
      }
    }
    cp_async_commit();
  }

  KF_DEVICE void multiply_step(float (&acc)[ROWS][GROUPS][2][4], int slot) const {
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
      uint32_t a[ROWS][4];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        fragment_of_a(a[i], in_tile(slot), (warp_m * ROWS + i) * 16, k, step_chunk);
      }
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        if (first_column(group) >= padded) continue;
        uint32_t b[2][2];
        if constexpr (Traits::BACKWARD) {
          const int pitch = args.layout.hidden_pitch;
          fragments_of_columns(b, first_tile(slot), k, first_column(group),
                               [=](int row, int chunk) { return row_chunk(row, chunk, pitch); });
        } else {
          fragments_of_rows(b, first_tile(slot), k, first_column(group), step_chunk);
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          mma_m16n8k16<T>(acc[i][group][0], a[i], b[0]);
          mma_m16n8k16<T>(acc[i][group][1], a[i], b[1]);
        }
      }
    }
  }

  // Sums over the block's rows of 16 columns of a tile with its rows along k, by a product with ones: exact terms, fp32
  // sums, a fixed order. `sums` begins at the block's row and has `count` columns.
  template <class Place>
  KF_DEVICE void store_sums(float* sums, int column0, int count, const unsigned char* tile, int column,
                            Place place) const {
    const uint32_t one = pack2<T>(1.0f, 1.0f);
    const uint32_t ones[4] = {one, one, one, one};
    float total[2][4] = {};
#pragma unroll 2
    for (int row = 0; row < Traits::BLOCK_M; row += 16) {
      uint32_t b[2][2];
      fragments_of_columns(b, tile, row, column, place);
      mma_m16n8k16<T>(total[0], ones, b[0]);
      mma_m16n8k16<T>(total[1], ones, b[1]);
    }
    if (lane() >= 4) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = column0 + column + j * 8 + lane() * 2 + i;
        if (at < count) sums[at] = total[j][i];
      }
    }
  }

  KF_DEVICE void into_hidden(float (&acc)[ROWS][GROUPS][2][4]) const {
    const int stages = args.layout.first_stages;
    const bool reads = args.product || args.in_sums != nullptr;
    const int steps = reads ? (args.in_features + STEP - 1) / STEP : 0;
    if (Traits::BACKWARD && args.reads_pre) start_pre();
    for (int step = 0; step < stages - 1; ++step) start_step(step, steps);
    for (int step = 0; step < steps; ++step) {
      const int slot = step % stages;
      wait_for_oldest(stages);
      finish_features<T, Traits::BLOCK_M, THREADS>(in_tile(slot), raw_tile(slot), args.in, row0, args.tokens,
                                                   step * STEP, args.in_features);
      __syncthreads();
      start_step(step + stages - 1, steps);
      if (args.product) multiply_step(acc, slot);
      if constexpr (Traits::BACKWARD) {
        // Two warps a step, in turns.
        const int turn = step % (Traits::WARPS / 2), half = warp_index() % 2;
        if (args.in_sums != nullptr && split == 0 && warp_index() / 2 == turn) {
          store_sums(args.in_sums + block * args.in_features, step * STEP, args.in_features, in_tile(slot), half * 16,
                     step_chunk);
        }
      }
    }
    // The ring is free for what comes next, and the pre-activation is there.
    cp_async_wait<0>();
    __syncthreads();
  }

  // Two neighbours of a row of a (M, H) tensor, as far as they are inside of it.
  KF_DEVICE void store_pair(void* data, int64_t row, int column, uint32_t pair) const {
    if (data == nullptr || split != 0 || row >= args.tokens || column >= args.width) return;
    T* const place = static_cast<T*>(data) + row * args.width + column;
    if (args.width % 2 == 0) {
      *reinterpret_cast<uint32_t*>(place) = pair;
      return;
    }
    place[0].bits = static_cast<uint16_t>(pair);
    if (column + 1 < args.width) place[1].bits = static_cast<uint16_t>(pair >> 16);
  }

  // Two neighbours of the hidden layer: sums of the first product become operands of the second. `place` is theirs in
  // the hidden tile, where backward finds the pre-activation.
  KF_DEVICE void pair_at_hidden(const float* sums, unsigned char* place, int64_t row, int column, float factor) const {
    uint32_t pair;
    if constexpr (Traits::BACKWARD) {
      const Float2 pre = unpack2<T>(*reinterpret_cast<const uint32_t*>(place));
      if (args.hidden != nullptr) {
        store_pair(args.hidden, row, column,
                   pack2<T>(activate(pre.x, args.activation), activate(pre.y, args.activation)));
      }
      // Rounding point 1: the pre-activation's gradient, an operand.
      pair = pack2<T>(sums[0] * factor * derivative(pre.x, args.activation),
                      sums[1] * factor * derivative(pre.y, args.activation));
      store_pair(args.dpre, row, column, pair);
    } else {
      float pre[2] = {sums[0], sums[1]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (args.in_bias.data == nullptr || column + i >= args.width) continue;
        const int64_t at = (column + i) * args.in_bias.stride;
        pre[i] += round_to<T>(load_element(args.in_bias.data, at, args.in_bias.dtype));
      }
      // Rounding point 1: what backward reads; the activation here takes the sum itself.
      store_pair(args.pre, row, column, pack2<T>(pre[0], pre[1]));
      // Rounding point 2: the hidden layer, an operand.
      pair = pack2<T>(activate(pre[0], args.activation), activate(pre[1], args.activation));
    }
    // The columns that only fill the last fragment.
    if (column + 1 >= args.width) pair = column >= args.width ? 0u : pair & 0xffffu;
    *reinterpret_cast<uint32_t*>(place) = pair;
  }

  // The group at hand is always acc[..][0] and the others move up: one copy of the code, at the price of some moves.
  KF_DEVICE void at_hidden(float (&acc)[ROWS][GROUPS][2][4], float factor) const {
    const int pitch = args.layout.hidden_pitch;
#pragma unroll 1
    for (int group = 0; group < GROUPS; ++group) {
      if (first_column(group) >= padded) break;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = (warp_m * ROWS + i) * 16 + half * 8 + lane() / 4;
            const int column = first_column(group) + j * 8 + lane() % 4 * 2;
            unsigned char* place = hidden_tile + row_chunk(row, column / 8, pitch) + column % 8 * 2;
            pair_at_hidden(&acc[i][0][j][2 * half], place, row0 + row, column, factor);
          }
#pragma unroll
          for (int other = 1; other < GROUPS; ++other) {
#pragma unroll
            for (int k = 0; k < 4; ++k) acc[i][other - 1][j][k] = acc[i][other][j][k];
          }
        }
      }
    }
  }

  // The pre-activation, into the hidden tile: by asynchronous copies of the first group where its rows are aligned.
  KF_DEVICE void start_pre() const {
    const int pitch = args.layout.hidden_pitch, width = args.width;
    const auto place = [=](int row, int chunk) { return row_chunk(row, chunk, pitch); };
    const int64_t left = args.tokens - row0;
    const int rows = left < Traits::BLOCK_M ? static_cast<int>(left) : Traits::BLOCK_M;
    const T* const source = static_cast<const T*>(args.pre) + row0 * width;
    if (args.pre_vectors) {
      const Factor pre{source, width, rows, width};
      load_factor_tile<T, THREADS>(hidden_tile, pre, 0, Traits::BLOCK_M, 0, padded / 8, args.width_chunks_log2, place);
      return;
    }
    const int thread = static_cast<int>(threadIdx.x), chunk = thread & ((1 << args.width_chunks_log2) - 1);
    if (chunk >= padded / 8) return;
    for (int row = thread >> args.width_chunks_log2; row < Traits::BLOCK_M; row += THREADS >> args.width_chunks_log2) {
      Vec16<T> values;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int column = chunk * 8 + i;
        values[i] = row < rows && column < width ? source[static_cast<int64_t>(row) * width + column] : T{0};
      }
      store_16(hidden_tile + place(row, chunk), values);
    }
  }

  KF_DEVICE void hidden_sums() const {
    if (args.hidden_sums == nullptr || split != 0) return;
    const int pitch = args.layout.hidden_pitch;
    for (int column = warp_index() * 16; column < padded; column += Traits::WARPS * 16) {
      store_sums(args.hidden_sums + block * args.width, 0, args.width, hidden_tile, column,
                 [=](int row, int chunk) { return row_chunk(row, chunk, pitch); });
    }
  }

  KF_DEVICE unsigned char* second_tile(int slot) const { return ring + slot * args.layout.second_bytes; }

  KF_DEVICE void start_columns(int step, int begin, int end) const {
    const int column = begin + step * COLUMNS;
    if (column < end) {
      unsigned char* tile = second_tile(step % args.layout.second_stages);
      if constexpr (Traits::BACKWARD) {
        load_factor_tile<T, THREADS>(tile, args.second, 0, padded, column, COLUMNS / 8, COLUMN_CHUNKS_LOG2,
                                     [](int row, int chunk) { return row_chunk(row, chunk, COLUMNS); });
      } else {
        const int pitch = args.layout.hidden_pitch;
        load_factor_tile<T, THREADS>(tile, args.second, column, COLUMNS, 0, padded / 8, args.width_chunks_log2,
                                     [=](int row, int chunk) { return row_chunk(row, chunk, pitch); });
      }
    }
    cp_async_commit();
  }

  KF_DEVICE void multiply_columns(float (&acc)[ROWS][Traits::WARP_COLUMNS / 16][2][4], int slot) const {
    const int pitch = args.layout.hidden_pitch;
    const auto along_hidden = [=](int row, int chunk) { return row_chunk(row, chunk, pitch); };
    for (int k = 0; k < padded; k += 16) {
      uint32_t a[ROWS][4];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) fragment_of_a(a[i], hidden_tile, (warp_m * ROWS + i) * 16, k, along_hidden);
#pragma unroll
      for (int group = 0; group < Traits::WARP_COLUMNS / 16; ++group) {
        const int column = warp_n * Traits::WARP_COLUMNS + group * 16;
        uint32_t b[2][2];
        if constexpr (Traits::BACKWARD) {
          fragments_of_columns(b, second_tile(slot), k, column,
                               [](int row, int chunk) { return row_chunk(row, chunk, COLUMNS); });
        } else {
          fragments_of_rows(b, second_tile(slot), k, column, along_hidden);
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          mma_m16n8k16<T>(acc[i][group][0], a[i], b[0]);
          mma_m16n8k16<T>(acc[i][group][1], a[i], b[1]);
        }
      }
    }
  }

  // Where a lane's chunk of eight columns lies: the row among the warp's 16 and the column among those staged.
  static KF_DEVICE int chunk_row(int chunk) { return (lane() + chunk * 32) / (Traits::STAGED / 8); }
  static KF_DEVICE int chunk_column(int chunk) { return (lane() + chunk * 32) % (Traits::STAGED / 8) * 8; }
  KF_DEVICE int64_t first_row(int i) const { return row0 + (warp_m * ROWS + i) * 16; }
  KF_DEVICE int first_staged(int column0, int part) const {
    return column0 + warp_n * Traits::WARP_COLUMNS + part * Traits::STAGED;
  }

  // What is added to a lane's chunks of a step: asked for before the product, used after it.
  struct Added {
    Words4 words[ROWS][Traits::PARTS][Traits::CHUNKS][2];
  };

  KF_DEVICE void load_added(Added& added, int column0) const {
    const bool float32 = args.added.reading == Reading::CONVERT;
    if (!float32 && args.added.reading != Reading::COPY) return;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
#pragma unroll
      for (int part = 0; part < Traits::PARTS; ++part) {
#pragma unroll
        for (int chunk = 0; chunk < Traits::CHUNKS; ++chunk) {
          const int64_t row = first_row(i) + chunk_row(chunk);
          const int column = first_staged(column0, part) + chunk_column(chunk);
          if (row >= args.tokens || column >= args.out_features) continue;
          const int64_t offset = row * args.added.stride_row + column;
          if (float32) {
            const float* source = static_cast<const float*>(args.added.data) + offset;
            added.words[i][part][chunk][0] = words_of_vec16(load_16<float>(source));
            added.words[i][part][chunk][1] = words_of_vec16(load_16<float>(source + 4));
          } else {
            const T* source = static_cast<const T*>(args.added.data) + offset;
            added.words[i][part][chunk][0] = words_of_vec16(load_16<T>(source));
          }
        }
      }
    }
  }

  // Eight neighbours of the result, plus what is added to them; rounding point 3: once.
  KF_DEVICE void store_chunk(float (&value)[8], int64_t row, int column, const Words4 (&added)[2]) const {
    if (row >= args.tokens || column >= args.out_features) return;
    const int64_t at = row * args.out_features + column;
    if (!args.out_vectors) return store_elements(value, row, column);
    if (args.added.reading == Reading::COPY) {
      const Vec16<T> other = vec16_of_words<T>(added[0]);
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] += to_float(other[i]);
    } else if (args.added.reading == Reading::CONVERT) {
      const Vec16<float> low = vec16_of_words<float>(added[0]), high = vec16_of_words<float>(added[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[i] += low[i];
        value[i + 4] += high[i];
      }
    }
    if (args.out_dtype == DType::f32) {
      float* target = static_cast<float*>(args.out) + at;
      store_16(target, Vec16<float>{{value[0], value[1], value[2], value[3]}});
      store_16(target + 4, Vec16<float>{{value[4], value[5], value[6], value[7]}});
    } else {
      store_16(static_cast<T*>(args.out) + at, rounded<T>(value));
    }
  }

  KF_DEVICE void store_elements(const float (&value)[8], int64_t row, int column) const {
    const int64_t at = row * args.out_features + column;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i >= args.out_features) continue;
      double sum = value[i];
      if (args.added.reading != Reading::NONE) {
        const int64_t offset = row * args.added.stride_row + (column + i) * args.added.stride_column;
        sum += load_element_wide(args.added.data, offset, args.added.dtype);
      }
      store_element(args.out, at + i, args.out_dtype, sum);
    }
  }

  // s · (sum + bias) of one fragment, into the warp's part of shared memory.
  KF_DEVICE void stage_fragment(float* staging, const float (&sums)[4], int first, int column, float factor) const {
    float bias[2] = {0.0f, 0.0f};
    if constexpr (!Traits::BACKWARD) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = first + column + i;
        if (args.out_bias.data == nullptr || at >= args.out_features) continue;
        bias[i] = round_to<T>(load_element(args.out_bias.data, at * args.out_bias.stride, args.out_bias.dtype));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* place = staging + (half * 8 + lane() / 4) * Traits::PITCH + column;
      place[0] = (sums[2 * half] + bias[0]) * factor;
      place[1] = (sums[2 * half + 1] + bias[1]) * factor;
    }
  }

  // The fragments of a warp, through its own part of shared memory, as chunks of eight columns of one row.
  KF_DEVICE void store_columns(const float (&acc)[ROWS][Traits::WARP_COLUMNS / 16][2][4], int column0, float factor,
                               const Added& added) const {
    constexpr int PITCH = Traits::PITCH, GROUPS_STAGED = Traits::STAGED / 16;
    float* staging = reinterpret_cast<float*>(ring + args.layout.second_stages * args.layout.second_bytes) +
                     warp_index() * 16 * PITCH;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
#pragma unroll
      for (int part = 0; part < Traits::PARTS; ++part) {
        const int first = first_staged(column0, part);
        sync_warp();
#pragma unroll
        for (int group = 0; group < GROUPS_STAGED; ++group) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int column = group * 16 + j * 8 + lane() % 4 * 2;
            stage_fragment(staging, acc[i][part * GROUPS_STAGED + group][j], first, column, factor);
          }
        }
        sync_warp();
#pragma unroll
        for (int chunk = 0; chunk < Traits::CHUNKS; ++chunk) {
          const float* place = staging + chunk_row(chunk) * PITCH + chunk_column(chunk);
          const Vec16<float> low = load_16<float>(place), high = load_16<float>(place + 4);
          float sum[8] = {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
          store_chunk(sum, first_row(i) + chunk_row(chunk), first + chunk_column(chunk), added.words[i][part][chunk]);
        }
      }
    }
  }

  KF_DEVICE void out_of_hidden(float factor, int begin, int end) const {
    const int stages = args.layout.second_stages, steps = (end - begin + COLUMNS - 1) / COLUMNS;
    for (int step = 0; step < steps; ++step) {
      wait_for_oldest(stages);
      __syncthreads();
      start_columns(step + stages - 1, begin, end);
      const int column = begin + step * COLUMNS;
      Added added;
      load_added(added, column);
      float acc[ROWS][Traits::WARP_COLUMNS / 16][2][4] = {};
      multiply_columns(acc, step % stages);
      store_columns(acc, column, factor, added);
    }
  }

  KF_DEVICE void run() const {
    const float factor = scale_of(args.scale_number, args.scale.data, args.scale.dtype);
    const int begin = split * args.split_columns;
    const int end = begin + args.split_columns < args.out_features ? begin + args.split_columns : args.out_features;
    float acc[ROWS][GROUPS][2][4] = {};
    into_hidden(acc);
    if (args.out != nullptr) {
      for (int step = 0; step < args.layout.second_stages - 1; ++step) start_columns(step, begin, end);
    }
    if (args.reads_pre || !Traits::BACKWARD) at_hidden(acc, factor);
    if (Traits::BACKWARD && args.hidden_sums != nullptr) {
      __syncthreads();
      hidden_sums();
    }
    // Backward's scale is in dpre already.
    if (args.out != nullptr) out_of_hidden(Traits::BACKWARD ? 1.0f : factor, begin, end);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS) rows_kernel(RowsArguments args) {
  Rows<Traits>(args).run();
}

}  // namespace kronafuse::cuda::bottleneck
