// What CUDA builds in, for one thread of the host: the sources of kernels/ compile behind it as they are.
//
// The threads of a block are fibers. One runs until it waits for others, then the next one is started or resumed, so
// barriers and shuffles mean what they mean on a device. A block whose threads wait at different places, which would
// hang a device, is reported. Blocks run one after the other, the last one first. So that a missing barrier does not go
// unnoticed, a warp runs as far ahead of the others as it can, and every other block starts its threads backwards.

// The headers of C++ would take longer to compile than the kernels.
#include <stdint.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define __grid_constant__

#define rintf __builtin_rintf
#define sqrtf __builtin_sqrtf
#define sqrt __builtin_sqrt

struct uint2 {
    uint32_t x, y;
} __attribute__((aligned(8)));

struct uint4 {
    uint32_t x, y, z, w;
} __attribute__((aligned(16)));

struct Index {
    uint32_t x;
};

static Index blockIdx, threadIdx, gridDim, blockDim;

template <class To, class From>
static inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

static inline uint32_t __float_as_uint(float value) { return bits_as<uint32_t>(value); }
static inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
static inline long long __double_as_longlong(double value) { return bits_as<long long>(value); }
static inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

static inline float float_of_half(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits >> 15) << 31, exponent = (bits >> 10) & 31u, rest = bits & 0x3FFu;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | rest << 13);
    if (exponent > 0) return __uint_as_float(sign | (exponent + 112) << 23 | rest << 13);
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

static inline uint16_t half_of_float(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 31 << 15, magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
        return 0x7FFF;
    } else if (magnitude >= 0x477FF000u) {  // halfway from the largest number to the next power of two
        half = 0x7C00;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
        half = static_cast<uint32_t>(rintf(__uint_as_float(magnitude) * 0x1p24f));
    } else {
        half = ((magnitude + 0xFFFu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
    }
    return static_cast<uint16_t>(sign | half);
}

namespace host {

const uint32_t MAX_THREADS = 1024;
const unsigned long STACK_NBYTES = 1 << 16;

struct Barrier {
    uint32_t num_arrived, generation;
};

struct Fiber {
    ucontext_t context;
    char* stack;
    uint32_t thread;
    bool is_finished;
};

static ucontext_t scheduler;
static Fiber fibers[MAX_THREADS];
static uint32_t num_fibers, next_thread;
static Fiber* current;
// Threads that ended and barriers that opened: a round of the scheduler without any is a deadlock.
static uint64_t num_events;
static Barrier block_barrier, warp_barriers[MAX_THREADS / 32];
static uint64_t exchanged[MAX_THREADS];
static void (*run_thread)(void* closure);
static void* closure;

static void enter(Fiber* fiber, uint32_t thread) {
    fiber->thread = thread;
    threadIdx.x = thread;
}

static void resume(Fiber* fiber) {
    current = fiber;
    threadIdx.x = fiber->thread;
    swapcontext(&scheduler, &fiber->context);
}

// Runs threads until one has to wait; the next ones are then another fiber's.
static void run_fiber() {
    while (next_thread < blockDim.x) {
        const uint32_t thread = next_thread++;
        enter(current, blockIdx.x % 2 ? blockDim.x - 1 - thread : thread);
        run_thread(closure);
        ++num_events;
    }
    current->is_finished = true;
}

static void start_fiber() {
    Fiber* fiber = &fibers[num_fibers++];
    if (!fiber->stack) fiber->stack = static_cast<char*>(__builtin_malloc(STACK_NBYTES));
    fiber->is_finished = false;
    fiber->thread = 0;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = STACK_NBYTES;
    fiber->context.uc_link = &scheduler;
    makecontext(&fiber->context, run_fiber, 0);
    resume(fiber);
}

static void wait_at(Barrier* barrier, uint32_t num_threads) {
    const uint32_t generation = barrier->generation;
    if (++barrier->num_arrived == num_threads) {
        barrier->num_arrived = 0;
        ++barrier->generation;
        ++num_events;
        return;
    }
    while (barrier->generation == generation) swapcontext(&current->context, &scheduler);
}

// Runs the threads of one warp as far as they come without the others.
static void run_warp(uint32_t warp) {
    uint64_t before;
    do {
        before = num_events;
        for (uint32_t index = 0; index < num_fibers; ++index) {
            if (!fibers[index].is_finished && fibers[index].thread / 32 == warp) resume(&fibers[index]);
        }
    } while (num_events != before);
}

static bool run_block() {
    num_fibers = next_thread = 0;
    block_barrier.num_arrived = 0;
    for (uint32_t warp = 0; warp < MAX_THREADS / 32; ++warp) warp_barriers[warp].num_arrived = 0;
    while (next_thread < blockDim.x) start_fiber();
    for (;;) {
        const uint64_t before = num_events;
        for (uint32_t warp = 0; warp < (blockDim.x + 31) / 32; ++warp) run_warp(warp);
        bool is_finished = true;
        for (uint32_t index = 0; index < num_fibers; ++index) is_finished = is_finished && fibers[index].is_finished;
        if (is_finished) return true;
        if (num_events == before) return false;
    }
}

static void wait_for_warp() {
    const uint32_t first = threadIdx.x / 32 * 32;
    wait_at(&warp_barriers[first / 32], blockDim.x - first < 32 ? blockDim.x - first : 32);
}

// Returns what thread `source` of the warp brings.
template <class Value>
static Value exchange(Value value, uint32_t source) {
    exchanged[threadIdx.x] = 0;
    __builtin_memcpy(&exchanged[threadIdx.x], &value, sizeof value);
    wait_for_warp();
    __builtin_memcpy(&value, &exchanged[threadIdx.x / 32 * 32 + source], sizeof value);
    wait_for_warp();
    return value;
}

template <int... positions>
struct Positions {};

template <int count, int... positions>
struct Count : Count<count - 1, count - 1, positions...> {};

template <int... positions>
struct Count<0, positions...> : Positions<positions...> {};

template <class Kernel>
struct Launch;

template <class... Parameters>
struct Launch<void (*)(Parameters...)> {
    void (*kernel)(Parameters...);
    void** arguments;

    static void run(void* launch) { static_cast<Launch*>(launch)->call(Count<sizeof...(Parameters)>()); }

    template <int... positions>
    void call(Positions<positions...>) {
        kernel(*static_cast<Parameters*>(arguments[positions])...);
    }
};

// Returns 0, 1 for a deadlock, or 2 for another number of arguments than the kernel has.
template <class... Parameters>
static int launch(void (*kernel)(Parameters...), uint32_t grid, uint32_t block, void** arguments, int num_arguments) {
    if (num_arguments != static_cast<int>(sizeof...(Parameters))) return 2;
    Launch<void (*)(Parameters...)> launched = {kernel, arguments};
    run_thread = launched.run;
    closure = &launched;
    gridDim.x = grid;
    blockDim.x = block;
    for (blockIdx.x = grid; blockIdx.x-- > 0;) {
        if (!run_block()) return 1;
    }
    return 0;
}

}  // namespace host

static inline void __syncthreads() { host::wait_at(&host::block_barrier, blockDim.x); }

// All lanes take part; kernels of mpitrain ask for nothing else.
template <class Value>
static inline Value __shfl_xor_sync(uint32_t, Value value, int lanes) {
    return host::exchange(value, threadIdx.x % 32 ^ lanes);
}

template <class Value>
static inline Value __shfl_up_sync(uint32_t, Value value, uint32_t distance) {
    const uint32_t lane = threadIdx.x % 32;
    return host::exchange(value, lane < distance ? lane : lane - distance);
}

static inline uint32_t __ballot_sync(uint32_t, int vote) {
    uint32_t votes = 0;
    host::exchanged[threadIdx.x] = vote != 0;
    host::wait_for_warp();
    for (uint32_t lane = 0; lane < 32; ++lane) {
        votes |= static_cast<uint32_t>(host::exchanged[threadIdx.x / 32 * 32 + lane]) << lane;
    }
    host::wait_for_warp();
    return votes;
}
