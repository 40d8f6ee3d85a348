// int4 weights out of floating ones, compiled once for each instruction set. No include guard: see kernels.cpp.
//
// actors/model/quant/quantize.py, _affine, has the same in torch but for the order of sums. 16 groups of a row are worked on
// at once, one in each lane.

constexpr int64_t GROUP = 32;  // columns
constexpr float TOP = 15, TINY = 0x1p-126f, PARTS_OF_ZERO = 8;
constexpr float SHRUNK[3][2] = {{0.9f, 1.0f}, {1.0f, 0.9f}, {0.9f, 0.9f}}, LOWEST[2] = {-7.0f, -8.0f};
constexpr float EQUAL = 1 + 0x1p-18f;  // fits are up to this factor, so that the order of sums does not decide

static inline __attribute__((always_inline)) vf at_least(vf x, vf least) { return x < least ? least : x; }

// x to the nearest of the integers 0 .. top, ties to even; NaN stays.
static inline __attribute__((always_inline)) vf to_integer(vf x, float top) {
  const vf highest = vf{} + top, magic = vf{} + 12582912.0f;  // 1.5 * 2^23
  x = at_least(x, vf{});
  x = x > highest ? highest : x;
  return (x + magic) - magic;
}

// How much of the sum of squares of a lane's group is met, and with what.
struct Fitted {
  vf met, scale, zero;
};

// The values of groups, whose sums are summed, round to 16 steps of scale from -low on; scale, no less than least, and zero
// point are fitted to those numbers (least squares).
static Fitted fitted(const vf* value, vf summed, vf scale, vf low, vf least) {
  const vf count = vf{} + float{GROUP};
  scale = at_least(scale, least);
  const vf inverse = 1.0f / scale, first = low * inverse;
  vf total{}, squares{}, overlap{};
  for (int64_t j = 0; j < GROUP; ++j) {
    const vf number = to_integer(fused(value[j], inverse, first), TOP);
    total += number;
    squares = fused(number, number, squares);
    overlap = fused(number, value[j], overlap);
  }
  const vf spread = fused(count, squares, -total * total);
  const vf slope = fused(count, overlap, -total * summed) / spread;
  vf zero = (spread > vf{}) & (slope > vf{}) ? (total - summed / slope) / count : first;
  zero = to_integer(zero * PARTS_OF_ZERO, TOP * PARTS_OF_ZERO) / PARTS_OF_ZERO;
  overlap = fused(-zero, summed, overlap);
  squares = fused(-zero, fused(-count, zero, 2 * total), squares);
  const vf fit = at_least(squares > vf{} ? overlap / squares : scale, least);
  return {fit * fused(-fit, squares, 2 * overlap), fit, zero};
}

static Fitted better(const Fitted& one, const Fitted& other) {
  const vi more = other.met > one.met * EQUAL;
  return {more ? other.met : one.met, more ? other.scale : one.scale, more ? other.zero : one.zero};
}

// value[j]: the j-th of each lane's group of from, which has columns numbers more; 0 behind them.
template <class T>
static void groups_of_row(const T* from, int64_t columns, vf* value) {
  T ends[LANES * GROUP] = {};
  if (columns < LANES * GROUP) {
    std::memcpy(ends, from, columns * sizeof(T));
    from = ends;
  }
  for (int64_t half = 0; half < GROUP; half += 16) {
    vi rows[16], turned[16];
    for (int64_t lane = 0; lane < LANES; ++lane) rows[lane] = (vi)widen_16(from + lane * GROUP + half);
    transpose(rows, turned);
    for (int64_t j = 0; j < 16; ++j) value[half + j] = (vf)turned[j];
  }
}

// Up to 16 groups, which have columns numbers: two in a byte, the first in its low half; scales in bf16.
template <class T>
static void quantize_groups(const T* from, int64_t columns, uint8_t* data, uint16_t* scale, uint8_t* zero) {
  vf value[GROUP], low{}, high{}, summed{}, unknown{};
  groups_of_row(from, columns, value);
  for (const vf x : value) {
    low = x < low ? x : low;
    high = x > high ? x : high;
    unknown = fused(x, vf{}, unknown);  // NaN for what is not finite, so that nothing of its group is
  }
  const vf whole = at_least(high / TOP - low / TOP, vf{} + TINY) + unknown, inverse = 1.0f / whole, least = TINY * inverse;
  for (vf& x : value) summed += x *= inverse;
  low *= inverse;
  high *= inverse;
  Fitted best = fitted(value, summed, (high - low) / TOP, -low, least);
  const auto try_range = [&](vf bottom, vf top) {
    best = better(best, fitted(value, summed, (top - bottom) / TOP, -bottom, least));
  };
  for (const auto& part : SHRUNK) try_range(low * part[0], high * part[1]);
  for (const float lowest : LOWEST) {
    const vf step = at_least(high / 7.0f, low / lowest);
    try_range(-8.0f * step, 7.0f * step);
  }
  best = better(best, fitted(value, summed, best.scale, best.zero * best.scale, least));
  const int64_t groups = std::min(LANES, (columns + GROUP - 1) / GROUP);
  vf kept = at_least(best.scale * whole, vf{} + TINY);
  for (int64_t lane = 0; lane < LANES; ++lane) {
    const uint16_t bits = to_bf16(kept[lane]);
    kept[lane] = from_bf16(bits);
    if (lane >= groups) continue;
    scale[lane] = bits;
    zero[lane] = static_cast<uint8_t>(best.zero[lane] >= 0 ? best.zero[lane] * PARTS_OF_ZERO : 0);
  }
  const vf steps = whole / kept;
  vi words[4] = {};
  for (int64_t j = 0; j < GROUP; ++j) {
    const vf number = to_integer(fused(value[j], steps, best.zero), TOP);
    words[j / 8] |= (__builtin_convertvector(number, vi) & 15) << static_cast<int32_t>(4 * (j % 8));
  }
  for (int64_t lane = 0; lane < groups; ++lane) {
    const int32_t packed[4] = {words[0][lane], words[1][lane], words[2][lane], words[3][lane]};
    std::memcpy(data + lane * GROUP / 2, packed, std::min(GROUP, columns - lane * GROUP) / 2);
  }
}

template <class T>
static void quantize_int4(const Quantize& call, Pool& pool) {
  const int64_t groups = (call.k + GROUP - 1) / GROUP, step = (int64_t{1} << 18) / (call.k + 1) + 1;
  pool.run((call.n + step - 1) / step, call.threads, [&](int64_t task) {
    for (int64_t n = task * step; n < std::min(call.n, (task + 1) * step); ++n)
      for (int64_t g = 0; g < groups; g += LANES)
        quantize_groups(static_cast<const T*>(call.w) + n * call.stride + g * GROUP, call.k - g * GROUP,
                        call.data + (n * call.k + g * GROUP) / 2, call.scale + n * groups + g, call.zero + n * groups + g);
  });
}
