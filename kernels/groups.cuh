// Arrays walked through in groups of elements that one access moves: 16 bytes where alignment allows.

#ifndef MPITRAIN_GROUPS
#define MPITRAIN_GROUPS

// THREADS in a block, given by the loader. Eight blocks of 256 fill an SM if a thread has at most 32 registers.
#ifndef THREADS
#define THREADS 256
#endif

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

// Elements of these types that 16 bytes of the smallest hold.
template <class First, class Second = First>
struct GroupOf {
    static const int smallest = sizeof(First) < sizeof(Second) ? sizeof(First) : sizeof(Second);
    static const int count = 16 / smallest;
};

template <class Element, int count>
struct Group {
    Element at[count];
};

// The widest word of which so many bytes are a multiple.
template <int nbytes>
struct WordOf {
    typedef typename WordOf<(nbytes % 16 == 0 && nbytes > 16) ? 16 : nbytes / 2>::type type;
};
template <>
struct WordOf<16> {
    typedef uint4 type;
};
template <>
struct WordOf<8> {
    typedef uint2 type;
};
template <>
struct WordOf<4> {
    typedef uint32 type;
};
template <>
struct WordOf<2> {
    typedef uint16 type;
};
template <>
struct WordOf<1> {
    typedef uint8 type;
};

template <class Element, int count>
union Words {
    static const int nbytes = count * sizeof(Element);
    typedef typename WordOf<nbytes>::type Word;
    static const int num_words = nbytes / sizeof(Word);

    Group<Element, count> group;
    Word words[num_words];
};

// One access to device memory. The larger words are told to the machine outright: the compiler would take them apart
// and store the parts one by one, and cannot know of a pointer from a table that it points to device memory.
template <class Word>
__device__ inline Word load_word(const Word* place) {
    return *place;
}
template <class Word>
__device__ inline void store_word(Word* place, Word word) {
    *place = word;
}
#ifdef __CUDACC__
__device__ inline uint4 load_word(const uint4* place) {
    uint4 word;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "l"(place)
                 : "memory");
    return word;
}
__device__ inline void store_word(uint4* place, uint4 word) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(place), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
}
__device__ inline uint2 load_word(const uint2* place) {
    uint2 word;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(place) : "memory");
    return word;
}
__device__ inline void store_word(uint2* place, uint2 word) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(place), "r"(word.x), "r"(word.y) : "memory");
}
#endif

// `first` is aligned to the group, or to 16 bytes if that is larger. A group of one is an element like any other.
template <int count, class Element>
__device__ inline Group<Element, count> load_group(const Element* first) {
    typedef Words<Element, count> Memory;
    Memory memory;
    if (count == 1) {
        memory.group.at[0] = *first;
    } else {
        const typename Memory::Word* words = reinterpret_cast<const typename Memory::Word*>(first);
#pragma unroll
        for (int index = 0; index < Memory::num_words; ++index) memory.words[index] = load_word(words + index);
    }
    return memory.group;
}

template <int count, class Element>
__device__ inline void store_group(Element* first, const Group<Element, count>& group) {
    typedef Words<Element, count> Memory;
    Memory memory;
    memory.group = group;
    if (count == 1) {
        *first = group.at[0];
    } else {
        typename Memory::Word* words = reinterpret_cast<typename Memory::Word*>(first);
#pragma unroll
        for (int index = 0; index < Memory::num_words; ++index) store_word(words + index, memory.words[index]);
    }
}

// Calls `body.run<n>(index)` for groups of `group_count` elements from element `head` on and for the single elements
// before and after, so that [0, count) is covered once by `stride` threads, of which this is number `thread`.
template <int group_count, class Body>
__device__ inline void cover(int64 count, int64 head, int64 thread, int64 stride, const Body& body) {
    const int64 num_groups = (count - head) / group_count;
    for (int64 group = thread; group < num_groups; group += stride) {
        body.template run<group_count>(head + group * group_count);
    }
    const int64 tail = head + num_groups * group_count;
    const int64 num_singles = head + count - tail;
    for (int64 single = thread; single < num_singles; single += stride) {
        body.template run<1>(single < head ? single : tail + single - head);
    }
}

// The same with all threads of the grid.
template <int group_count, class Body>
__device__ inline void cover_with_grid(int64 count, int64 head, const Body& body) {
    const int64 thread = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    cover<group_count>(count, head, thread, static_cast<int64>(gridDim.x) * blockDim.x, body);
}

#endif
