// Which tile runs, how its blocks share the work, and the launch.
#pragma once

#include "cuda/bottleneck/operands.h"
#include "cuda/bottleneck/rows_kernel.cuh"

namespace kronafuse::cuda::bottleneck {

constexpr int64_t blocks_of(int64_t rows, int size) { return (rows + size - 1) / size; }

// config, or by rule where it is -1: 128 rows a block share each read of the factors, which is most of what comes from
// the L2 cache, as long as half of the multiprocessors have a block; else 32. Unmeasured.
template <bool BACKWARD>
int choose_tile(const char* op, int64_t config, int64_t tokens, int width, bool float32, const DeviceInfo& device) {
  const auto fits = [&](int index) {
    const Tile& tile = TILES[index];
    const int64_t limit = device.shared_per_block;
    return width <= tile.width && shared_layout(tile, width, BACKWARD, float32, limit).total(tile) <= limit;
  };
  KF_CHECK(config >= -1 && config < TILE_COUNT, op, ": config must be from -1 to ", TILE_COUNT - 1, "; got ", config);
  if (config >= 0) {
    KF_CHECK(fits(config), op, ": tile \"", TILES[config].name, "\" takes H up to ", TILES[config].width, " and ",
             shared_layout(TILES[config], width, BACKWARD, float32, 0).total(TILES[config]),
             " bytes of shared memory here; got H = ", width, " and ", device.shared_per_block, " bytes");
    return static_cast<int>(config);
  }
  const bool many = 2 * blocks_of(tokens, TILES[WIDE].block_m) >= device.multiprocessors;
  if (many && fits(NARROW)) return NARROW;
  if (many && fits(WIDE)) return WIDE;
  KF_CHECK(fits(SMALL), op, ": H = ", width, " needs ",
           shared_layout(TILES[SMALL], width, BACKWARD, float32, 0).total(TILES[SMALL]),
           " bytes of shared memory; the device has ", device.shared_per_block);
  return SMALL;
}

// How many blocks of rows the chosen tile makes of the call.
template <bool BACKWARD>
int64_t launch_rows(const char* op, RowsArguments& args, DType dtype, int64_t config, Stream stream) {
  const DeviceInfo device = device_info();
  const bool float32 = args.in.reading == Reading::CONVERT;
  const int index = choose_tile<BACKWARD>(op, config, args.tokens, args.width, float32, device);
  const Tile& tile = TILES[index];
  args.layout = shared_layout(tile, args.width, BACKWARD, float32, device.shared_per_block);
  const int chunks = round_up(args.width, 16) / 8;
  args.width_chunks_log2 = 1;
  while (1 << args.width_chunks_log2 < chunks) ++args.width_chunks_log2;

  const int64_t blocks = blocks_of(args.tokens, tile.block_m), steps = blocks_of(args.out_features, COLUMNS);
  int64_t splits = args.out == nullptr || blocks == 0 ? 1 : device.multiprocessors / blocks;
  splits = splits < 1 ? 1 : splits > MOST_SPLITS ? MOST_SPLITS : splits;
  splits = splits > steps ? steps : splits;
  args.split_columns = static_cast<int>(blocks_of(steps, static_cast<int>(splits))) * COLUMNS;
  args.splits = static_cast<int>(blocks_of(args.out_features, args.split_columns));
  KF_CHECK(blocks * args.splits < int64_t{1} << 31, op, ": the grid must have less than 2³¹ blocks; got ",
           blocks * args.splits);
  if (blocks == 0) return 0;

  Launch where;
  where.grid = {static_cast<unsigned>(blocks * args.splits), 1, 1};
  where.threads = tile.threads();
  where.shared_bytes = args.layout.total(tile);
  where.stream = stream;
#ifdef KRONAFUSE_ONE_INSTANCE
  KF_CHECK(dtype == DType::bf16 && index == WIDE, op, ": this build has tile \"", TILES[WIDE].name,
           "\" in bfloat16 alone; got \"", tile.name, "\" in ", dtype);
  launch<rows_kernel<RowsTraits<bf16, WIDE, BACKWARD>>>(where, args);
#else
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (index == WIDE) launch<rows_kernel<RowsTraits<T, WIDE, BACKWARD>>>(where, args);
    if (index == NARROW) launch<rows_kernel<RowsTraits<T, NARROW, BACKWARD>>>(where, args);
    if (index == SMALL) launch<rows_kernel<RowsTraits<T, SMALL, BACKWARD>>>(where, args);
  });
#endif
  return blocks;
}

}  // namespace kronafuse::cuda::bottleneck
