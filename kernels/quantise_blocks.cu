// Quantises numbers to int8 with one scale for each block of QUANTA, and keeps what was lost for the next time.
//
// Compiled with -DELEMENT=float32|float16|bfloat16 and -DQUANTA=<elements>. In each block, computed in float32:
//
//   value = element + residual
//   scale = largest |value| / 127
//   code = value / scale, rounded to nearest even
//   residual = value - code * scale
//
// A block in which a value is infinite or NaN gets the scale NaN, so that an overflow is seen by those who receive it,
// and the residual 0. Numbers so small that the scale vanishes stay in the residual.
//
//   elements  shape (count,)
//   residual  float32, shape (count,); read and written
//   codes     int8, shape (count,); written
//   scales    float32, one for each block; written
//
// Launch: blocks of THREADS, any number of them; a warp takes one block of QUANTA at a time. Its lanes read neighbours,
// so no alignment is needed, and each has all its values in flight at once.

#include "elements.cuh"
#include "groups.cuh"
#include "blocks.cuh"

#define LARGEST_CODE 127.0f
#define VALUES_PER_LANE (QUANTA / WARP)

static_assert(QUANTA % WARP == 0, "a lane has as many values as any other");

KERNEL quantise_blocks(const ELEMENT* elements, float32* residual, int8* codes, float32* scales, int64 count) {
    const float32 infinity = __uint_as_float(0x7F800000u);
    const int64 num_blocks = (count + QUANTA - 1) / QUANTA;
    const int64 warps_per_grid = static_cast<int64>(gridDim.x) * (THREADS / WARP);
    for (int64 block = static_cast<int64>(blockIdx.x) * (THREADS / WARP) + warp_index(); block < num_blocks;
         block += warps_per_grid) {
        const int64 first = block * QUANTA + lane_index();
        float32 values[VALUES_PER_LANE];
        float32 largest = 0;
#pragma unroll
        for (int index = 0; index < VALUES_PER_LANE; ++index) {
            const int64 at = first + index * WARP;
            values[index] = at < count ? widen(elements[at]) + residual[at] : 0;
        }
#pragma unroll
        for (int index = 0; index < VALUES_PER_LANE; ++index) {
            const float32 size = is_finite(values[index]) ? magnitude(values[index]) : infinity;
            if (size > largest) largest = size;
        }
        largest = warp_maximum(largest);
        const bool is_sane = is_finite(largest);
        const float32 scale = largest / LARGEST_CODE;
#pragma unroll
        for (int index = 0; index < VALUES_PER_LANE; ++index) {
            const int64 at = first + index * WARP;
            if (at >= count) continue;
            float32 code = is_sane && scale > 0 ? rintf(values[index] / scale) : 0;
            // The scale of numbers below the normal ones is coarse.
            if (code > LARGEST_CODE) code = LARGEST_CODE;
            if (code < -LARGEST_CODE) code = -LARGEST_CODE;
            codes[at] = static_cast<int8>(code);
            residual[at] = is_sane ? values[index] - code * scale : 0;
        }
        if (lane_index() == 0) scales[block] = is_sane ? scale : __uint_as_float(0x7FC00000u);
    }
}
