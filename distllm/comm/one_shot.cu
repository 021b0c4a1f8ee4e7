// All-reduce of small messages over mapped peer memory, alone or with residual addition and RMSNorm.
//
// One block per row. Block b of a rank talks to block b of every other rank and to nothing else. Sums are taken in
// fp32 in rank order and rounded once, so all ranks get the same bits, whatever the mode.
//
// A device-side epoch counts launches; its parity picks one of two buffers. A launch ends only after every peer has
// begun it, so whoever writes for epoch e knows that epoch e - 2 was read. No trailing barrier is needed, and the same
// launch can be replayed from a CUDA graph.
//
// Macros, by one_shot.py: RANK, SIZE, MEMORY (address on this device of every rank's memory, by rank), byte offsets in it
// FLAGS_AT, EPOCHS_AT, INPUTS_AT, SUMS_AT, INBOX_AT, and MAX_BLOCKS, CAPACITY, PUSH_CAPACITY, TIMEOUT_NS.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

enum Mode { PUSH, PULL, TWO_SHOT };

__constant__ u64 memory[SIZE] = {MEMORY};

// Two 16-bit floats in a word: no CUDA header is needed to compile this file.
struct BFloat16 {
    static __device__ float low(u32 pair) { return __uint_as_float(pair << 16); }
    static __device__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
    static __device__ u32 pack(float low, float high) {
        u32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
};

struct Float16 {
    static __device__ float widen(u16 half) {
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(half));
        return wide;
    }
    static __device__ float low(u32 pair) { return widen(static_cast<u16>(pair)); }
    static __device__ float high(u32 pair) { return widen(static_cast<u16>(pair >> 16)); }
    static __device__ u32 pack(float low, float high) {
        u32 pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
};

// ---- memory of the ranks

__device__ __forceinline__ uint4* area(int rank, u64 offset) { return reinterpret_cast<uint4*>(memory[rank] + offset); }

__device__ __forceinline__ uint4* inputs(int rank, u64 epoch) { return area(rank, INPUTS_AT + (epoch & 1) * CAPACITY); }

__device__ __forceinline__ uint4* sums(int rank, u64 epoch) { return area(rank, SUMS_AT + (epoch & 1) * CAPACITY); }

// What `from` pushes to `to`: two planes of PUSH_CAPACITY bytes.
__device__ __forceinline__ uint4* inbox(int to, int from, u64 epoch) {
    return area(to, INBOX_AT + ((epoch & 1) * SIZE + from) * 2ull * PUSH_CAPACITY);
}

__device__ __forceinline__ u64* flag(int to, int from, int phase) {
    return reinterpret_cast<u64*>(memory[to] + FLAGS_AT) + (phase * MAX_BLOCKS + blockIdx.x) * SIZE + from;
}

__device__ __forceinline__ u64* epochs() { return reinterpret_cast<u64*>(memory[RANK] + EPOCHS_AT); }

// Every block has a copy of the epoch and alone writes it; copies of blocks that this launch lacks are kept up too.
__device__ __forceinline__ void advance(u64 epoch) {
    __syncthreads();  // every thread of the block has read its copy
    for (int i = blockIdx.x + gridDim.x * threadIdx.x; i < MAX_BLOCKS; i += gridDim.x * blockDim.x)
        epochs()[i] = epoch;
}

// ---- waiting for peers

// A peer that died must not leave this GPU spinning for ever: the trap fails the stream, and the host sees it.
struct Deadline {
    u64 start = 0;
    u32 spins = 0;
    __device__ __forceinline__ void check() {
        if (++spins & 4095) return;
        u64 now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (start == 0) start = now;
        if (now - start > TIMEOUT_NS) __trap();
    }
};

// All that this block wrote before is visible to block b of every peer, and the other way round. One lane per peer.
__device__ __forceinline__ void meet(int phase, u64 epoch) {
    __syncthreads();
    if (threadIdx.x < SIZE) {
        asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag(threadIdx.x, RANK, phase)), "l"(epoch) : "memory");
        const u64* theirs = flag(RANK, threadIdx.x, phase);
        u64 seen;
        Deadline deadline;
        do {
            asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(seen) : "l"(theirs) : "memory");
            deadline.check();
        } while (seen < epoch);
    }
    __syncthreads();
}

// A pushed word carries its flag in the same 64-bit access, so that data and arrival are one message (NCCL's LL protocol).
// The flag is the epoch's low half. A word left over from exactly 2^32 launches ago would look fresh.
__device__ __forceinline__ void push(uint4* to, u32 first, u32 second, u32 epoch) {
    u64 stamp = static_cast<u64>(epoch) << 32;
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(stamp | first), "l"(stamp | second)
                 : "memory");
}

// Two pushed words of four bytes each, if both have come.
__device__ __forceinline__ bool try_pop(const uint4* from, u32& first, u32& second, u32 epoch) {
    u64 a, b;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
    first = static_cast<u32>(a), second = static_cast<u32>(b);
    return (static_cast<u32>(a >> 32) == epoch) & (static_cast<u32>(b >> 32) == epoch);
}

// ---- sums

template <class T>
__device__ __forceinline__ u32 sum_pairs(const u32 (&parts)[SIZE]) {
    float low = T::low(parts[0]), high = T::high(parts[0]);
#pragma unroll
    for (int rank = 1; rank < SIZE; ++rank) low += T::low(parts[rank]), high += T::high(parts[rank]);
    return T::pack(low, high);
}

template <class T>
__device__ __forceinline__ uint4 sum_in_rank_order(const uint4 (&parts)[SIZE]) {
    u32 x[SIZE], y[SIZE], z[SIZE], w[SIZE];
#pragma unroll
    for (int rank = 0; rank < SIZE; ++rank)
        x[rank] = parts[rank].x, y[rank] = parts[rank].y, z[rank] = parts[rank].z, w[rank] = parts[rank].w;
    return make_uint4(sum_pairs<T>(x), sum_pairs<T>(y), sum_pairs<T>(z), sum_pairs<T>(w));
}

template <class T>
__device__ __forceinline__ uint4 sum_inputs(int at, u64 epoch) {
    uint4 parts[SIZE];
#pragma unroll
    for (int rank = 0; rank < SIZE; ++rank) parts[rank] = inputs(rank, epoch)[at];
    return sum_in_rank_order<T>(parts);
}

// ---- the three ways to bring the sums of a row to every rank. Place i of this thread is vector tid + i · blockDim.

struct Row {
    int first;  // vector of 16 bytes, in the whole message
    int num_vecs;
};

template <int ITEMS, class Body>
__device__ __forceinline__ void for_items(Row row, Body body) {
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        int column = threadIdx.x + item * blockDim.x;
        if (column < row.num_vecs) body(item, column);
    }
}

// One way: every rank writes its row into every peer's inbox. Twice the bytes, no round trip.
template <class T, int ITEMS>
__device__ __forceinline__ void reduce_push(Row row, uint4 (&values)[ITEMS], u64 epoch) {
    constexpr int plane = PUSH_CAPACITY / 16;
    for_items<ITEMS>(row, [&](int item, int column) {
#pragma unroll
        for (int step = 1; step < SIZE; ++step) {
            uint4* to = inbox((RANK + step) % SIZE, RANK, epoch) + row.first + column;
            push(to, values[item].x, values[item].y, epoch);
            push(to + plane, values[item].z, values[item].w, epoch);
        }
    });
    for_items<ITEMS>(row, [&](int item, int column) {
        uint4 parts[SIZE];
        Deadline deadline;
        bool all;
        do {  // looks at all peers at once: one by one, each would add its latency
            all = true;
#pragma unroll
            for (int rank = 0; rank < SIZE; ++rank) {
                uint4& part = parts[rank];
                const uint4* from = inbox(RANK, rank, epoch) + row.first + column;
                if (rank == RANK) part = values[item];
                else all &= try_pop(from, part.x, part.y, epoch) & try_pop(from + plane, part.z, part.w, epoch);
            }
            deadline.check();
        } while (!all);
        values[item] = sum_in_rank_order<T>(parts);
    });
}

// Every rank reads the whole row of every peer.
template <class T, int ITEMS>
__device__ __forceinline__ void reduce_pull(Row row, uint4 (&values)[ITEMS], u64 epoch) {
    for_items<ITEMS>(row, [&](int item, int column) { inputs(RANK, epoch)[row.first + column] = values[item]; });
    meet(0, epoch);
    for_items<ITEMS>(row, [&](int item, int column) { values[item] = sum_inputs<T>(row.first + column, epoch); });
}

// Every rank sums its slice of the row, then reads the other slices: 2 (n - 1) / n of a row instead of n - 1 rows.
template <class T, int ITEMS>
__device__ __forceinline__ void reduce_two_shot(Row row, uint4 (&values)[ITEMS], u64 epoch) {
    for_items<ITEMS>(row, [&](int item, int column) { inputs(RANK, epoch)[row.first + column] = values[item]; });
    meet(0, epoch);
    int slice = (row.num_vecs + SIZE - 1) / SIZE;
    int end = min((RANK + 1) * slice, row.num_vecs);
    for (int column = RANK * slice + threadIdx.x; column < end; column += blockDim.x)
        sums(RANK, epoch)[row.first + column] = sum_inputs<T>(row.first + column, epoch);
    meet(1, epoch);
    for_items<ITEMS>(row,
                     [&](int item, int column) { values[item] = sums(column / slice, epoch)[row.first + column]; });
}

// ---- what follows the sum

__device__ __forceinline__ float block_sum(float value) {
    __shared__ float partial[32];
    for (int lanes = 16; lanes; lanes >>= 1) value += __shfl_xor_sync(~0u, value, lanes);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0.f;
    for (int lanes = 16; lanes; lanes >>= 1) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

template <class T>
__device__ __forceinline__ u32 add(u32 a, u32 b, float& square) {
    u32 total = T::pack(T::low(a) + T::low(b), T::high(a) + T::high(b));
    square += T::low(total) * T::low(total) + T::high(total) * T::high(total);
    return total;
}

// Rounds between the factors, as the reference does: (x · scale) in the tensor's dtype, then · gain.
template <class T>
__device__ __forceinline__ u32 normalise(u32 x, u32 gain, float scale) {
    u32 scaled = T::pack(T::low(x) * scale, T::high(x) * scale);
    return T::pack(T::low(scaled) * T::low(gain), T::high(scaled) * T::high(gain));
}

template <class T, int ITEMS, int MODE>
__device__ __forceinline__ void reduce(Row row, uint4 (&values)[ITEMS], u64 epoch) {
    if (MODE == PUSH) reduce_push<T, ITEMS>(row, values, epoch);
    if (MODE == PULL) reduce_pull<T, ITEMS>(row, values, epoch);
    if (MODE == TWO_SHOT) reduce_two_shot<T, ITEMS>(row, values, epoch);
}

// out = Σ x over ranks; out may be x. The message is cut into rows of row_vecs vectors, the last one may be shorter.
template <class T, int ITEMS, int MODE>
__global__ void __launch_bounds__(1024) all_reduce(const uint4* x, uint4* out, int row_vecs, int num_vecs) {
    u64 epoch = epochs()[blockIdx.x] + 1;
    int first = blockIdx.x * row_vecs;
    Row row{first, min(row_vecs, num_vecs - first)};
    uint4 values[ITEMS];
    for_items<ITEMS>(row, [&](int item, int column) { values[item] = x[first + column]; });
    reduce<T, ITEMS, MODE>(row, values, epoch);
    for_items<ITEMS>(row, [&](int item, int column) { out[first + column] = values[item]; });
    advance(epoch);
}

// total = Σ x over ranks + residual; normed = rms_norm(total) · gain, row by row.
template <class T, int ITEMS, int MODE>
__global__ void __launch_bounds__(1024)
    all_reduce_add_norm(const uint4* x, const uint4* residual, const uint4* gain, uint4* normed, uint4* total,
                        int row_vecs, float eps) {
    u64 epoch = epochs()[blockIdx.x] + 1;
    Row row{static_cast<int>(blockIdx.x) * row_vecs, row_vecs};
    uint4 values[ITEMS], residuals[ITEMS], gains[ITEMS];
    for_items<ITEMS>(row, [&](int item, int column) { values[item] = x[row.first + column]; });
    for_items<ITEMS>(row, [&](int item, int column) {  // in flight while the peers answer
        residuals[item] = residual[row.first + column];
        gains[item] = gain[column];
    });
    reduce<T, ITEMS, MODE>(row, values, epoch);
    float square = 0.f;
    for_items<ITEMS>(row, [&](int item, int column) {
        uint4 sum = values[item], old = residuals[item];
        values[item] = make_uint4(add<T>(sum.x, old.x, square), add<T>(sum.y, old.y, square),
                                  add<T>(sum.z, old.z, square), add<T>(sum.w, old.w, square));
        total[row.first + column] = values[item];
    });
    float scale = rsqrtf(block_sum(square) / (8.f * row_vecs) + eps);
    for_items<ITEMS>(row, [&](int item, int column) {
        uint4 sum = values[item], by = gains[item];
        normed[row.first + column] = make_uint4(normalise<T>(sum.x, by.x, scale), normalise<T>(sum.y, by.y, scale),
                                                normalise<T>(sum.z, by.z, scale), normalise<T>(sum.w, by.w, scale));
    });
    advance(epoch);
}
