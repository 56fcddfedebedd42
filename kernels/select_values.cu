// Selects the elements that are large: indices and values of |element + residual| >= threshold, in the order of the
// index, and keeps all others in the residual for the next time.
//
// Three kernels, launched one after the other on one stream. Threads that run in any order have to write in one order,
// so the first kernel counts what each tile of TILE elements selects, the second one turns the counts into the places
// where the tiles begin, and the third one writes. The result depends on nothing but the arguments.
//
// Compiled with -DELEMENT=<dtype>, of the floats, and -DTILE=<elements>; computed in float64 for float64, else in
// float32. What is infinite or NaN is selected, so that those who receive it see the overflow.
//
//   elements   shape (count,), count below 2^31
//   residual   shape (count,), of the type that is computed in
//   threshold  of the type that is computed in; at 0 all are selected
//   places     int32, one for each tile: first how many the tile selects, then how many those before it do
//   total      int32, one element: how many are selected
//   capacity   elements in `indices` and `values`. If more are selected, the first ones in order are written, and
//              the others stay in the residual
//   indices    int32, shape (capacity,)
//   values     ELEMENT, shape (capacity,): rounded, and the residual keeps what rounding has lost
//
// Launch: blocks of THREADS, any number of them; select_values_places one block.

#include "elements.cuh"
#include "groups.cuh"
#include "blocks.cuh"

#ifndef TILE
#define TILE 4096
#endif

#define VALUES_PER_THREAD (TILE / THREADS)
#define WARPS_PER_BLOCK (THREADS / WARP)
// Each warp has a run of consecutive elements in each round.
#define RUNS_PER_TILE (VALUES_PER_THREAD * WARPS_PER_BLOCK)

static_assert(TILE % THREADS == 0, "a thread has as many values as any other");
static_assert(RUNS_PER_TILE <= THREADS, "a thread has at most one run to sum up");

typedef WideOf<ELEMENT>::type Wide;

// NaN is not less than anything.
__device__ inline bool is_selected(Wide value, Wide threshold) { return !(magnitude(value) < threshold); }

// The values of this thread in a tile: neighbouring threads have neighbouring values, round after round.
struct TileValues {
    Wide at[VALUES_PER_THREAD];
    bool is_inside[VALUES_PER_THREAD];
};

__device__ inline TileValues load_tile(const ELEMENT* elements, const Wide* residual, int64 count, int64 tile) {
    TileValues values;
#pragma unroll
    for (int round = 0; round < VALUES_PER_THREAD; ++round) {
        const int64 index = tile * TILE + round * THREADS + threadIdx.x;
        values.is_inside[round] = index < count;
        values.at[round] = index < count ? widen(elements[index]) + residual[index] : 0;
    }
    return values;
}

KERNEL select_values_count(const ELEMENT* elements, const Wide* residual, int64 count, Wide threshold, int32* places) {
    const int64 num_tiles = (count + TILE - 1) / TILE;
    for (int64 tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const TileValues values = load_tile(elements, residual, count, tile);
        int32 num_selected = 0;
#pragma unroll
        for (int round = 0; round < VALUES_PER_THREAD; ++round) {
            num_selected += values.is_inside[round] && is_selected(values.at[round], threshold);
        }
        int32 total;
        block_sum_before(num_selected, total);
        if (threadIdx.x == 0) places[tile] = total;
    }
}

KERNEL select_values_places(int32* places, int64 num_tiles, int32* total) {
    int32 before = 0;
    for (int64 first = 0; first < num_tiles; first += THREADS) {
        const int64 tile = first + threadIdx.x;
        int32 sum;
        const int32 place = block_sum_before(tile < num_tiles ? places[tile] : 0, sum);
        if (tile < num_tiles) places[tile] = before + place;
        before += sum;
    }
    if (threadIdx.x == 0) *total = before;
}

KERNEL select_values_write(const ELEMENT* elements, Wide* residual, int64 count, Wide threshold, const int32* places,
                           int64 capacity, int32* indices, ELEMENT* values) {
    __shared__ int32 run_places[RUNS_PER_TILE];
    const int64 num_tiles = (count + TILE - 1) / TILE;
    const uint32 lanes_before = (1u << lane_index()) - 1u;
    for (int64 tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const TileValues tile_values = load_tile(elements, residual, count, tile);
        uint32 selected[VALUES_PER_THREAD];
#pragma unroll
        for (int round = 0; round < VALUES_PER_THREAD; ++round) {
            selected[round] = __ballot_sync(
                ALL_LANES, tile_values.is_inside[round] && is_selected(tile_values.at[round], threshold));
            if (lane_index() == 0) run_places[round * WARPS_PER_BLOCK + warp_index()] = __popc(selected[round]);
        }
        __syncthreads();
        int32 total;
        const int32 place = block_sum_before(threadIdx.x < RUNS_PER_TILE ? run_places[threadIdx.x] : 0, total);
        if (threadIdx.x < RUNS_PER_TILE) run_places[threadIdx.x] = place;
        __syncthreads();
#pragma unroll
        for (int round = 0; round < VALUES_PER_THREAD; ++round) {
            if (!tile_values.is_inside[round]) continue;
            const int64 index = tile * TILE + round * THREADS + threadIdx.x;
            const int64 at = static_cast<int64>(places[tile]) + run_places[round * WARPS_PER_BLOCK + warp_index()] +
                             __popc(selected[round] & lanes_before);
            Wide rest = tile_values.at[round];
            if ((selected[round] >> lane_index()) & 1u && at < capacity) {
                const ELEMENT value = narrow(rest, As<ELEMENT>());
                indices[at] = static_cast<int32>(index);
                values[at] = value;
                rest -= static_cast<Wide>(widen(value));
                // An overflow was sent; kept, it would spoil every step to come.
                if (!is_finite(rest)) rest = 0;
            }
            residual[index] = rest;
        }
        // The next tile writes the places again.
        __syncthreads();
    }
}
