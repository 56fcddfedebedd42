// Reduces the arrays of n peers, element by element in the order of the peers, and writes the result to m arrays.
//
// Compiled with -DELEMENT=<dtype>, -DCOMBINE=add|multiply|smaller|larger and -DPEERS=<n>, or 0 for any n up to 64.
//
//   peers        pointers to the first element of n sources and m targets; a target may be a source, and no array may
//                overlap another one otherwise
//   num_sources  n
//   num_targets  m
//   count        elements in each array
//   head         first element from which on all arrays are aligned to 16 bytes; `count` if there is none
//   divisor      what the result is divided by at the end, at least 1
//
// Launch: blocks of THREADS, any number of them, each thread goes over the arrays in strides of the grid. A thread
// has 16 bytes of each peer in flight, so an SM full of threads has 64 KiB for two peers and 128 KiB for four: more
// than bandwidth times latency of HBM3 asks of one SM (about 4.8 TB/s x 700 ns / 132 = 25 KiB).

#include "elements.cuh"
#include "groups.cuh"
#include "reductions.cuh"

#define MAX_PEERS 64
// Sources in flight where their number is not known to the compiler.
#define BATCH 4

typedef WideOf<ELEMENT>::type Wide;

struct Peers {
    const ELEMENT* sources[MAX_PEERS];
    ELEMENT* targets[MAX_PEERS];
};

template <int count>
__device__ inline void combine_group(Group<Wide, count>& total, const Group<ELEMENT, count>& operand, bool is_first) {
#pragma unroll
    for (int index = 0; index < count; ++index) {
        const Wide wide = widen(operand.at[index]);
        total.at[index] = is_first ? wide : COMBINE(total.at[index], wide);
    }
}

struct Reduction {
    const Peers& peers;
    int num_sources, num_targets;
    int64 divisor;

    template <int count>
    __device__ void run(int64 first) const {
        // Everything is read before anything is written: a target may be a source.
        Group<Wide, count> total = {};
        if (PEERS > 0) {
            reduce_known<count>(first, total);
        } else {
            reduce_any<count>(first, total);
        }
        Group<ELEMENT, count> result;
#pragma unroll
        for (int index = 0; index < count; ++index) {
            result.at[index] = narrow_quotient(total.at[index], divisor, As<ELEMENT>());
        }
        for (int target = 0; target < num_targets; ++target) store_group(peers.targets[target] + first, result);
    }

    template <int count>
    __device__ void reduce_known(int64 first, Group<Wide, count>& total) const {
        Group<ELEMENT, count> loaded[PEERS > 0 ? PEERS : 1];
#pragma unroll
        for (int source = 0; source < PEERS; ++source) {
            loaded[source] = load_group<count>(peers.sources[source] + first);
        }
#pragma unroll
        for (int source = 0; source < PEERS; ++source) combine_group(total, loaded[source], source == 0);
    }

    template <int count>
    __device__ void reduce_any(int64 first, Group<Wide, count>& total) const {
        Group<ELEMENT, count> loaded[BATCH];
        for (int start = 0; start < num_sources; start += BATCH) {
#pragma unroll
            for (int index = 0; index < BATCH; ++index) {
                if (start + index < num_sources) {
                    loaded[index] = load_group<count>(peers.sources[start + index] + first);
                }
            }
#pragma unroll
            for (int index = 0; index < BATCH; ++index) {
                if (start + index < num_sources) combine_group(total, loaded[index], start + index == 0);
            }
        }
    }
};

KERNEL reduce_peers(const __grid_constant__ Peers peers, int num_sources, int num_targets, int64 count, int64 head,
                    int64 divisor) {
    const Reduction reduction = {peers, num_sources, num_targets, divisor};
    cover_with_grid<GroupOf<ELEMENT>::count>(count, head, reduction);
}
