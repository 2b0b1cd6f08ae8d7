#include "cuda/bottleneck/operands.h"

#include "cuda/bottleneck/activation.cuh"
#include "cuda/bottleneck/pack.h"

namespace kronafuse::cuda::bottleneck {

namespace {

bool is_aligned(const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16 == 0; }

// Whether rows of a matrix may be read 16 bytes at a time, eight elements each time.
bool reads_in_chunks(const View& view) {
  const int64_t elements = 16 / size_of(view.dtype);
  return (view.stride[1] == 1 || view.size[1] == 1) && view.size[1] % 8 == 0 &&
         (view.stride[0] % elements == 0 || view.size[0] <= 1) && is_aligned(view);
}

constexpr int64_t MOST_FEATURES = int64_t{1} << 30;

}  // namespace

Features features_of(const View& view, DType compute) {
  Reading reading = Reading::ELEMENTS;
  if (reads_in_chunks(view)) {
    if (view.dtype == compute) reading = Reading::COPY;
    if (view.dtype == DType::f32) reading = Reading::CONVERT;
  }
  return {view.data, view.stride[0], view.stride[1], view.dtype, reading};
}

Features no_features() { return {nullptr, 0, 0, DType::f32, Reading::NONE}; }

bool stores_in_chunks(const View& view, DType compute) {
  return (view.dtype == compute || view.dtype == DType::f32) && reads_in_chunks(view);
}

Vector vector_of(const View* view) {
  if (view == nullptr) return {nullptr, 0, DType::f32};
  return {view->data, view->dim > 0 ? view->stride[0] : 0, view->dtype};
}

bool is_direct(const View& factor, DType compute) { return factor.dtype == compute && reads_in_chunks(factor); }

Factor direct_factor(const View& factor) {
  return {factor.data, factor.stride[0], static_cast<int>(factor.size[0]), static_cast<int>(factor.size[1])};
}

int64_t packed_elements(const View& factor) { return factor.size[0] * ((factor.size[1] + 7) / 8 * 8); }

Factors ready_factors(const char* op, const View& down, const View& up, DType compute, const View* packed,
                      void* stream) {
  const View* views[2] = {&down, &up};
  Factor ready[2];
  PackJob jobs[2];
  int count = 0;
  int64_t used = 0;
  for (int i = 0; i < 2; ++i) {
    const View& view = *views[i];
    if (is_direct(view, compute)) {
      ready[i] = direct_factor(view);
      continue;
    }
    const int64_t needed = packed_elements(view);
    KF_CHECK(packed != nullptr, op, ": a factor of ", view.dtype, ", shape ", Shape{view}, " and strides ", Strides{view},
             " must be packed: `packed` must have ", packed_elements(down) + packed_elements(up), " elements; got none");
    KF_CHECK(packed->dtype == compute && packed->dim == 1 && packed->stride[0] == 1 && packed->size[0] >= used + needed &&
                 is_aligned(*packed),
             op, ": packed must be ", used + needed, " contiguous elements of ", compute, " on 16 bytes; got ",
             Shape{*packed}, " of ", packed->dtype);
    char* target = static_cast<char*>(packed->data) + used * size_of(compute);
    const int columns = static_cast<int>((view.size[1] + 7) / 8 * 8);
    jobs[count++] = {view.data,  view.stride[0], view.stride[1], view.dtype, static_cast<int>(view.size[0]),
                     static_cast<int>(view.size[1]), columns, target};
    ready[i] = {target, columns, static_cast<int>(view.size[0]), columns};
    used += needed;
  }
  if (count > 0) pack(jobs, count, compute, stream);
  return {ready[0], ready[1]};
}

void check_factors(const char* op, const View& down, const View& up, const View* scale, int64_t activation, DType compute) {
  KF_CHECK(compute == DType::bf16 || compute == DType::f16, op, ": pre must be float16 or bfloat16; got ", compute);
  KF_CHECK(down.dim == 2 && up.dim == 2, op, ": down must be (H, K) and up (N, H); got ", Shape{down}, ", ", Shape{up});
  const int64_t width = down.size[0];
  KF_CHECK(width >= 1 && width <= MAX_WIDTH, op, ": down (H, K) must have H from 1 to ", MAX_WIDTH, "; got ",
           Shape{down});
  KF_CHECK(up.size[1] == width, op, ": down (H, K) and up (N, H) must share H; got down ", Shape{down}, ", up ",
           Shape{up});
  KF_CHECK(down.size[1] >= 1 && down.size[1] < MOST_FEATURES && up.size[0] >= 1 && up.size[0] < MOST_FEATURES, op,
           ": K and N must be from 1 to below ", MOST_FEATURES, "; got ", down.size[1], " and ", up.size[0]);
  KF_CHECK(activation >= 0 && activation < ACTIVATION_COUNT, op, ": activation must be from 0 to ",
           ACTIVATION_COUNT - 1, "; got ", activation);
  KF_CHECK(scale == nullptr || scale->elements() == 1, op, ": a tensor scale must have one element; got ",
           Shape{*scale});
}

void check_contiguous(const char* op, const char* name, const View& view, int64_t rows, int64_t columns) {
  KF_CHECK(view.dim == 2 && view.size[0] == rows && view.size[1] == columns, op, ": ", name, " must be (", rows, ", ",
           columns, "); got ", Shape{view});
  const bool contiguous = (view.stride[1] == 1 || columns == 1) && (view.stride[0] == columns || rows <= 1);
  KF_CHECK(contiguous || view.empty(), op, ": ", name, " must be contiguous; got strides ", Strides{view});
}

void check_written_hidden(const char* op, const char* name, const View& view, int64_t rows, int64_t width) {
  check_contiguous(op, name, view, rows, width);
  const auto beyond = reinterpret_cast<uintptr_t>(view.data) % 4;
  KF_CHECK(width % 2 != 0 || beyond == 0, op, ": ", name, " must lie on 4 bytes where H is even; got H = ", width,
           " and an address that is ", beyond, " beyond");
}

}  // namespace kronafuse::cuda::bottleneck
