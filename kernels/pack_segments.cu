// Copies many tensors into one flat bucket, scaled and cast: bucket[offset + i] = tensor[i] * scale.
//
// Compiled with -DTENSOR=<dtype> and -DBUCKET=<dtype>, of the floats, and -DTILE=<elements>. Computed in float64 if
// one of them is float64, else in float32, and rounded once.
//
//   segments      table of tensors, in device memory, see segments.cuh
//   num_segments  at least 1
//   num_tiles     tiles of all tensors together
//   bucket        flat, overlapping no tensor
//   scale         factor, of the type that is computed in
//
// Launch: blocks of THREADS, any number of them.

#include "elements.cuh"
#include "groups.cuh"
#include "segments.cuh"

KERNEL pack_segments(const Segment* segments, int num_segments, int64 num_tiles, BUCKET* bucket,
                     CommonOf<TENSOR, BUCKET>::type scale) {
    for (int64 tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const Segment segment = segment_of(segments, num_segments, tile);
        const int64 first = (tile - segment.first_tile) * TILE;
        const int64 rest = segment.count - first;
        const TENSOR* tensor = reinterpret_cast<const TENSOR*>(segment.address);
        copy_tile(tensor + first, bucket + segment.offset + first, rest < TILE ? rest : TILE, segment.head, scale);
    }
}
