// What the threads of a warp and of a block find out together. Blocks have THREADS threads, in whole warps.

#ifndef MPITRAIN_BLOCKS
#define MPITRAIN_BLOCKS

#define WARP 32
#define ALL_LANES 0xFFFFFFFFu

__device__ inline uint32 lane_index() { return threadIdx.x % WARP; }
__device__ inline uint32 warp_index() { return threadIdx.x / WARP; }

// The largest value of the warp, for all of its threads. None of them is NaN.
__device__ inline float32 warp_maximum(float32 value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        const float32 other = __shfl_xor_sync(ALL_LANES, value, distance);
        if (other > value) value = other;
    }
    return value;
}

// The sum of the values of this thread and of those before it in the warp.
__device__ inline int32 warp_running_sum(int32 value) {
    for (uint32 distance = 1; distance < WARP; distance *= 2) {
        const int32 before = __shfl_up_sync(ALL_LANES, value, distance);
        if (lane_index() >= distance) value += before;
    }
    return value;
}

// The sum of the values of all threads before this one in the block, and in `total` that of all.
__device__ inline int32 block_sum_before(int32 value, int32& total) {
    __shared__ int32 warp_sums[THREADS / WARP];
    const int32 running_sum = warp_running_sum(value);
    if (lane_index() == WARP - 1) warp_sums[warp_index()] = running_sum;
    __syncthreads();
    int32 before = 0;
    total = 0;
    for (uint32 warp = 0; warp < THREADS / WARP; ++warp) {
        if (warp < warp_index()) before += warp_sums[warp];
        total += warp_sums[warp];
    }
    // The next call writes the sums again.
    __syncthreads();
    return before + running_sum - value;
}

#endif
