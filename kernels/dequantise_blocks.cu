// Turns what quantise_blocks made on n peers back into numbers, added up in the order of the peers:
// target[i] = (sum over p of codes[p][i] * scales[p][i / QUANTA]) * factor, in float32, rounded once.
//
// Compiled with -DELEMENT=float32|float16|bfloat16 and -DQUANTA=<elements>.
//
//   codes      int8, those of peer p from element p * codes_stride on
//   scales     float32, those of peer p from element p * scales_stride on
//   num_peers  at least 1
//   target     shape (count,); written
//   head       0 if groups of 8 codes are aligned for all peers and 8 elements for the target, or to 16 bytes;
//              else `count`
//   factor     1 for a sum, 1/n for an average
//
// Launch: blocks of THREADS, any number of them.

#include "elements.cuh"
#include "groups.cuh"

// Elements of one thread; they have one scale, as QUANTA is a multiple.
#define CODES_PER_GROUP 8

static_assert(QUANTA % CODES_PER_GROUP == 0, "the codes of a group have one scale");

struct Dequantisation {
    const int8* codes;
    const float32* scales;
    int64 codes_stride, scales_stride;
    int num_peers;
    ELEMENT* target;
    float32 factor;

    template <int count>
    __device__ void run(int64 first) const {
        float32 sums[count];
#pragma unroll
        for (int index = 0; index < count; ++index) sums[index] = 0;
        for (int peer = 0; peer < num_peers; ++peer) {
            const Group<int8, count> loaded = load_group<count>(codes + peer * codes_stride + first);
            const float32 scale = scales[peer * scales_stride + first / QUANTA];
#pragma unroll
            for (int index = 0; index < count; ++index) {
                sums[index] += static_cast<float32>(loaded.at[index]) * scale;
            }
        }
        Group<ELEMENT, count> result;
#pragma unroll
        for (int index = 0; index < count; ++index) result.at[index] = narrow(sums[index] * factor, As<ELEMENT>());
        store_group(target + first, result);
    }
};

KERNEL dequantise_blocks(const int8* codes, int64 codes_stride, const float32* scales, int64 scales_stride,
                         int num_peers, ELEMENT* target, int64 count, int64 head, float32 factor) {
    const Dequantisation dequantisation = {codes, scales, codes_stride, scales_stride, num_peers, target, factor};
    cover_with_grid<CODES_PER_GROUP>(count, head, dequantisation);
}
