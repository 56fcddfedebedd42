// Many tensors beside one flat bucket, in one launch.
//
// Each tensor is cut into tiles of TILE elements, and blocks go over the tiles of all. So a launch is as fast for a
// thousand small tensors as for a large one.

#ifndef MPITRAIN_SEGMENTS
#define MPITRAIN_SEGMENTS

// Elements in a tile, given by the loader; a multiple of 16, so that all tiles of a tensor are aligned alike.
#ifndef TILE
#define TILE 4096
#endif

// One tensor and its place in the bucket. `head` is the first element from which on tensor and bucket are aligned to
// their groups, -1 if there is none. `first_tile` is the number of tiles of all segments before.
struct Segment {
    uint64 address;
    int64 offset;
    int64 count;
    int64 head;
    int64 first_tile;
};

// The last segment that starts at `tile` or before: empty ones have no tile and are never found.
__device__ inline Segment segment_of(const Segment* segments, int num_segments, int64 tile) {
    int low = 0, high = num_segments;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (segments[middle].first_tile <= tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return segments[low];
}

// target[i] = source[i] * scale, computed in `Wide` and rounded once.
template <class Source, class Target>
struct ScaledCopy {
    typedef typename CommonOf<Source, Target>::type Wide;

    const Source* __restrict__ source;
    Target* __restrict__ target;
    Wide scale;

    template <int count>
    __device__ void run(int64 first) const {
        const Group<Source, count> loaded = load_group<count>(source + first);
        Group<Target, count> result;
#pragma unroll
        for (int index = 0; index < count; ++index) {
            const Wide wide = static_cast<Wide>(widen(loaded.at[index]));
            result.at[index] = narrow(wide * scale, As<Target>());
        }
        store_group(target + first, result);
    }
};

template <class Source, class Target>
__device__ inline void copy_tile(const Source* source, Target* target, int64 count, int64 head,
                                 typename CommonOf<Source, Target>::type scale) {
    const ScaledCopy<Source, Target> copy = {source, target, scale};
    if (head < 0 || head > count) head = count;
    cover<GroupOf<Source, Target>::count>(count, head, threadIdx.x, blockDim.x, copy);
}

#endif
