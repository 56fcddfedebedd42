// Copies one flat bucket into many tensors, scaled and cast: tensor[i] = bucket[offset + i] * scale.
//
// The counterpart of pack_segments, with the same arguments and the same launch; the bucket is read only.

#include "elements.cuh"
#include "groups.cuh"
#include "segments.cuh"

KERNEL unpack_segments(const Segment* segments, int num_segments, int64 num_tiles, const BUCKET* bucket,
                       CommonOf<TENSOR, BUCKET>::type scale) {
    for (int64 tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const Segment segment = segment_of(segments, num_segments, tile);
        const int64 first = (tile - segment.first_tile) * TILE;
        const int64 rest = segment.count - first;
        TENSOR* tensor = reinterpret_cast<TENSOR*>(segment.address);
        copy_tile(bucket + segment.offset + first, tensor + first, rest < TILE ? rest : TILE, segment.head, scale);
    }
}
