// The recurrence of one LSTM layer in float32, forward and backward, on a CPU.
//
// A step multiplies the state of a few samples with a weight that is as a rule larger than the
// caches: 36 MB for 1,500 units. So the weight is packed once for all steps, in panels that each
// step streams through from their first byte to their last, and is read once for all samples.
// The units are shared out among the threads: what a step does after its product needs no other
// thread, and a step has one barrier.
//
// Names: T steps, N samples, H units. The gates are i, f, g, o, as torch orders them.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

// The tile of a product has kVectors * kRows sums, which stay in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 10;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6;
#else
constexpr int kLanes = 4, kRows = 6;
#endif
constexpr int kVectors = 2, kColumns = kVectors * kLanes;
constexpr long kDepth = 768;  // rows of a panel that are kept in a near cache for all samples
constexpr long kAhead = 4096;  // bytes of a panel that are prefetched ahead
constexpr int kGates = 4;

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

// ---- memory ------------------------------------------------------------------------------

class Buffer {
 public:
  explicit Buffer(size_t floats) : floats(floats) {
    // Huge pages: a panel is read faster than its pages could be looked up.
    constexpr size_t page = size_t{2} << 20;
    const bool large = floats * sizeof(float) > page;
    const size_t unit = large ? page : 64;
    const size_t bytes = (floats * sizeof(float) + unit) / unit * unit;
    data_ = static_cast<float*>(std::aligned_alloc(unit, bytes));
#ifdef __linux__
    if (large && data_ != nullptr) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }

  const size_t floats;

 private:
  float* data_;
};

// Returns memory for a packed weight, null if there is none. A thread keeps it for its next layer:
// the page faults of new memory cost a tenth of a layer's time.
float* workspace(size_t floats) {
  static thread_local std::unique_ptr<Buffer> kept;
  if (!kept || kept->floats < floats || !kept->get()) {
    kept.reset();
    kept = std::make_unique<Buffer>(floats);
  }
  return kept->get();
}

Vector load(const float* from, long count) {
  if (count >= kLanes) return *reinterpret_cast<const Loose*>(from);
  Vector value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

void store(float* to, Vector value, long count) {
  if (count >= kLanes) {
    *reinterpret_cast<Loose*>(to) = value;
  } else {
    std::memcpy(to, &value, count * sizeof(float));
  }
}

// ---- functions of vectors ----------------------------------------------------------------

// The polynomials are those of S. Moshier's Cephes, expf and tanhf: within 2 ulp.
Vector exponential(Vector x) {
  x = x > 88.0f ? Vector{} + 88.0f : x;
  x = x < -88.0f ? Vector{} - 88.0f : x;
  const Vector scaled = x * 1.44269504088896341f;
  const Integers power =
      __builtin_convertvector(scaled + (x < 0.0f ? Vector{} - 0.5f : Vector{} + 0.5f), Integers);
  const Vector n = __builtin_convertvector(power, Vector);
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Vector)(((Bits)power + 127u) << 23);
}

Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

Vector hyperbolic_tangent(Vector x) {
  const Bits sign = (Bits)x & 0x80000000u;
  const Vector size = (Vector)((Bits)x ^ sign);
  const Vector large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  const Vector z = x * x;
  Vector p = Vector{} - 5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return size < 0.625f ? p * z * x + x : (Vector)((Bits)large | sign);
}

// ---- products ----------------------------------------------------------------------------

// The samples are cut into tiles of at most kRows. An operand [depth, N] lies tile by tile, each
// of them [depth, rows].
struct Tiles {
  explicit Tiles(long samples) : samples(samples) {
    count = (samples + kRows - 1) / kRows;
    rows = (samples + count - 1) / count;
  }
  long rows_of(long tile) const { return std::min(rows, samples - tile * rows); }
  long at(long depth, long sample, long k) const {
    return (sample / rows * depth + k) * rows + sample % rows;
  }
  size_t size(long depth) const { return size_t(count) * depth * rows; }

  long samples, count, rows;
};

template <int Rows>
void multiply_tile(const float* a, long stride, const float* panel, long depth, float* out,
                   long ld, bool add, bool prefetch) {
  Vector sums[Rows][kVectors] = {};
  if (add) {
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = load(out + r * ld + v * kLanes, kLanes);
  }
  const Vector* weights = reinterpret_cast<const Vector*>(panel);
  for (long k = 0; k < depth; ++k, weights += kVectors, a += stride) {
    Vector w[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      w[v] = weights[v];
      if (prefetch) __builtin_prefetch(reinterpret_cast<const char*>(weights + v) + kAhead);
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a[r] * w[v];
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * ld + v * kLanes, sums[r][v], kLanes);
}

template <int Rows, typename... Args>
void choose_tile(long rows, Args... args) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return choose_tile<Rows - 1>(rows, args...);
  }
  multiply_tile<Rows>(args...);
}

// Writes the product of a, [N, depth], with a panel, [depth, kColumns], to the rows of out.
void multiply(const float* a, const Tiles& tiles, const float* panel, long depth, float* out,
              long ld) {
  for (long k = 0; k < depth; k += kDepth) {
    for (long tile = 0; tile < tiles.count; ++tile) {
      choose_tile<kRows>(tiles.rows_of(tile), a + (tile * depth + k) * tiles.rows, tiles.rows,
                         panel + k * kColumns, std::min(kDepth, depth - k),
                         out + tile * tiles.rows * ld, ld, k > 0, tile == 0);
    }
  }
}

// ---- layers ------------------------------------------------------------------------------

struct Shape {
  long steps, samples, hidden;
  bool reverse;

  long blocks() const { return (hidden + kColumns - 1) / kColumns; }
  long time(long step) const { return reverse ? steps - 1 - step : step; }
};

// The blocks of kColumns units that a thread has.
struct Share {
  explicit Share(long blocks)
      : first(blocks * omp_get_thread_num() / omp_get_num_threads()),
        last(blocks * (omp_get_thread_num() + 1) / omp_get_num_threads()) {}

  long first, last;
};

// Calls f(sample, unit, count) for every vector of units of a block.
template <typename F>
void for_vectors(const Shape& shape, long block, F f) {
  const long end = std::min((block + 1) * kColumns, shape.hidden);
  for (long n = 0; n < shape.samples; ++n)
    for (long u = block * kColumns; u < end; u += kLanes) f(n, u, std::min<long>(kLanes, end - u));
}

// Packs w, [4H, H], so that gate q of block b has the panel 4b + q: [H, kColumns], transposed.
void pack_rows(const float* w, const Shape& shape, const Share& share, float* packed) {
  const long hidden = shape.hidden;
  for (long panel = kGates * share.first; panel < kGates * share.last; ++panel) {
    const long unit = panel / kGates * kColumns;
    const long count = std::min<long>(kColumns, hidden - unit);
    const float* from = w + (panel % kGates * hidden + unit) * hidden;
    float* to = packed + panel * hidden * kColumns;
    for (long start = 0; start < hidden; start += kLanes) {
      const long end = std::min(start + kLanes, hidden);  // a cache line of each row
      for (long j = 0; j < kColumns; ++j)
        for (long k = start; k < end; ++k)
          to[k * kColumns + j] = j < count ? from[j * hidden + k] : 0.0f;
    }
  }
}

// Packs w, [4H, H], so that block b has the panel b: [4H, kColumns].
void pack_columns(const float* w, const Shape& shape, const Share& share, float* packed) {
  const long hidden = shape.hidden, depth = kGates * hidden;
  for (long block = share.first; block < share.last; ++block) {
    const long unit = block * kColumns, count = std::min<long>(kColumns, hidden - unit);
    float* to = packed + block * depth * kColumns;
    for (long r = 0; r < depth; ++r, to += kColumns) {
      std::memcpy(to, w + r * hidden + unit, count * sizeof(float));
      std::fill(to + count, to + kColumns, 0.0f);
    }
  }
}

}  // namespace

extern "C" {

// w [4H, H]; h0, c0 [N, H]; gates [T, N, 4H], in: what the input adds, out: the gates;
// cells, y [T, N, H], out. Returns whether there was memory.
int lstm_forward(const float* w, const float* h0, const float* c0, float* gates, float* cells,
                 float* y, long steps, long samples, long hidden, int reverse, int threads) {
  const Shape shape{steps, samples, hidden, reverse != 0};
  const Tiles tiles(samples);
  const long blocks = shape.blocks(), products_of = kGates * samples * kColumns;
  float* packed = workspace(size_t(blocks) * kGates * hidden * kColumns);
  const Buffer states(2 * tiles.size(hidden)), products(size_t(threads) * products_of);
  if (!packed || !states.get() || !products.get()) return 0;

#pragma omp parallel num_threads(threads)
  {
    const Share share(blocks);
    float* product = products.get() + omp_get_thread_num() * products_of;
    pack_rows(w, shape, share, packed);
    const auto keep_state = [&](float* state, long n, long u, Vector h, long count) {
      float* to = state + tiles.at(hidden, n, u);
      for (long lane = 0; lane < count; ++lane) to[lane * tiles.rows] = h[lane];
    };
    for (long block = share.first; block < share.last; ++block) {
      for_vectors(shape, block, [&](long n, long u, long count) {
        keep_state(states.get(), n, u, load(h0 + n * hidden + u, count), count);
      });
    }
    for (long step = 0; step < steps; ++step) {
#pragma omp barrier
      const float* before = step ? cells + shape.time(step - 1) * samples * hidden : c0;
      const long t = shape.time(step);
      const float* state = states.get() + step % 2 * tiles.size(hidden);
      float* next_state = states.get() + (step + 1) % 2 * tiles.size(hidden);
      for (long block = share.first; block < share.last; ++block) {
        for (long gate = 0; gate < kGates; ++gate) {
          multiply(state, tiles, packed + (block * kGates + gate) * hidden * kColumns, hidden,
                   product + gate * samples * kColumns, kColumns);
        }
        for_vectors(shape, block, [&](long n, long u, long count) {
          float* of_sample = gates + (t * samples + n) * kGates * hidden + u;
          const auto gate = [&](long q) {
            const float* from = product + (q * samples + n) * kColumns + u - block * kColumns;
            return load(of_sample + q * hidden, count) + load(from, kLanes);
          };
          const Vector i = sigmoid(gate(0)), f = sigmoid(gate(1)), g = hyperbolic_tangent(gate(2)),
                       o = sigmoid(gate(3));
          const Vector c = f * load(before + n * hidden + u, count) + i * g;
          const Vector h = o * hyperbolic_tangent(c);
          store(of_sample, i, count);
          store(of_sample + hidden, f, count);
          store(of_sample + 2 * hidden, g, count);
          store(of_sample + 3 * hidden, o, count);
          const long at = (t * samples + n) * hidden + u;
          store(cells + at, c, count);
          store(y + at, h, count);
          keep_state(next_state, n, u, h, count);
        });
      }
    }
  }
  return 1;
}

// w, gates and cells as above; c0 [N, H]; dy [T, N, H] or null for zero; dh, dc [N, H], in: the
// gradients of the last state, out: of the first; d_gates [T, N, 4H], out: the gradient of what
// the input adds to the gates; by_gate [4H, T, N], out: the same. Returns whether there was memory.
int lstm_backward(const float* w, const float* c0, const float* gates, const float* cells,
                  const float* dy, float* dh, float* dc, float* d_gates, float* by_gate, long steps,
                  long samples, long hidden, int reverse, int threads) {
  const Shape shape{steps, samples, hidden, reverse != 0};
  const Tiles tiles(samples);
  const long blocks = shape.blocks(), depth = kGates * hidden, width = blocks * kColumns;
  float* packed = workspace(size_t(blocks) * depth * kColumns);
  const Buffer d_states(size_t(samples) * width), operands(2 * tiles.size(depth));
  if (!packed || !d_states.get() || !operands.get()) return 0;

#pragma omp parallel num_threads(threads)
  {
    const Share share(blocks);
    pack_columns(w, shape, share, packed);
    for (long block = share.first; block < share.last; ++block) {
      for_vectors(shape, block, [&](long n, long u, long count) {
        store(d_states.get() + n * width + u, load(dh + n * hidden + u, count), kLanes);
      });
    }
    for (long step = steps - 1; step >= 0; --step) {
      const float* before = step ? cells + shape.time(step - 1) * samples * hidden : c0;
      const long t = shape.time(step);
      float* operand = operands.get() + step % 2 * tiles.size(depth);
      for (long block = share.first; block < share.last; ++block) {
        for_vectors(shape, block, [&](long n, long u, long count) {
          const long of_sample = (t * samples + n) * depth + u, at = (t * samples + n) * hidden + u;
          const auto gate = [&](long q) { return load(gates + of_sample + q * hidden, count); };
          const Vector i = gate(0), f = gate(1), g = gate(2), o = gate(3);
          const Vector tanh_c = hyperbolic_tangent(load(cells + at, count));
          Vector d_h = load(d_states.get() + n * width + u, kLanes);
          if (dy != nullptr) d_h += load(dy + at, count);
          const Vector d_c =
              load(dc + n * hidden + u, count) + d_h * o * (1.0f - tanh_c * tanh_c);
          const Vector d[kGates] = {
              d_c * g * i * (1.0f - i),
              d_c * load(before + n * hidden + u, count) * f * (1.0f - f),
              d_c * i * (1.0f - g * g),
              d_h * tanh_c * o * (1.0f - o),
          };
          store(dc + n * hidden + u, d_c * f, count);
          for (long q = 0; q < kGates; ++q) {
            store(d_gates + of_sample + q * hidden, d[q], count);
            float* to = operand + tiles.at(depth, n, q * hidden + u);
            for (long lane = 0; lane < count; ++lane) to[lane * tiles.rows] = d[q][lane];
          }
        });
        const long end = std::min((block + 1) * kColumns, hidden);
        for (long q = 0; q < kGates; ++q) {
          for (long u = q * hidden + block * kColumns; u < q * hidden + end; ++u) {
            for (long n = 0; n < samples; n += tiles.rows) {
              std::memcpy(by_gate + (u * steps + t) * samples + n, operand + tiles.at(depth, n, u),
                          tiles.rows_of(n / tiles.rows) * sizeof(float));
            }
          }
        }
      }
#pragma omp barrier
      for (long block = share.first; block < share.last; ++block) {
        multiply(operand, tiles, packed + block * depth * kColumns, depth,
                 d_states.get() + block * kColumns, width);
      }
    }
    for (long block = share.first; block < share.last; ++block) {
      for_vectors(shape, block, [&](long n, long u, long count) {
        store(dh + n * hidden + u, load(d_states.get() + n * width + u, kLanes), count);
      });
    }
  }
  return 1;
}

}  // extern "C"
