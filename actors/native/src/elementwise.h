// Sums, norms and rotations of rows, compiled once for each instruction set. No include guard: see kernels.cpp.
//
// Every step is rounded where torch rounds it, and nothing becomes a fused multiply-add, so that all numbers are torch's
// but for a norm's sum of squares, which has an order of its own.
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

// As if stored as T.
template <class T>
static inline float rounded(float x) {
  return std::is_same_v<T, float> ? x : __builtin_bit_cast(float, bf16_bits(x) << 16);
}

// x += a + b, or x += a where b is null.
template <class T>
static void add(T* x, const T* a, const T* b, int64_t n) {
  if (b)
    for (int64_t i = 0; i < n; ++i) narrow(widened(x[i]) + rounded<T>(widened(a[i]) + widened(b[i])), x + i);
  else
    for (int64_t i = 0; i < n; ++i) narrow(widened(x[i]) + widened(a[i]), x + i);
}

// See actors/model/norm.py.
template <class T>
static void rms_norm(const T* x, const T* weight, int64_t n, double eps, T* out) {
  constexpr int64_t kLanes = 64;
  float lane[kLanes] = {};
  const int64_t whole = n & ~(kLanes - 1);
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lane[j] += widened(x[i + j]) * widened(x[i + j]);
  for (int64_t i = whole; i < n; ++i) lane[i - whole] += widened(x[i]) * widened(x[i]);
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t j = 0; j < half; ++j) lane[j] += lane[j + half];
  const float inverse = 1.0f / std::sqrt(lane[0] / static_cast<float>(n) + static_cast<float>(eps));
  for (int64_t i = 0; i < n; ++i) narrow(widened(weight[i]) * rounded<T>(widened(x[i]) * inverse), out + i);
}

// Angle: float rotates in fp32, uint16_t rounds each step to bf16. See actors/model/rope.py.
template <class T, class Angle>
static void rotate_pairs(const Angle* cos, const Angle* sin, int64_t half, bool interleaved, const T* x, T* out) {
  const int64_t step = interleaved ? 2 : 1, behind = interleaved ? 1 : half;
  for (int64_t j = 0; j < half; ++j) {
    const float a = widened(x[j * step]), b = widened(x[j * step + behind]), c = widened(cos[j]), s = widened(sin[j]);
    narrow(rounded<Angle>(a * c) - rounded<Angle>(b * s), out + j);
    narrow(rounded<Angle>(b * c) + rounded<Angle>(a * s), out + half + j);
  }
}

// The first rope.dim numbers of a head of so many at this position; the rest as they are. x and out do not overlap.
template <class T>
static void rotate(const Rope& rope, int64_t position, const T* x, int64_t width, T* out) {
  const int64_t half = rope.dim / 2, at = position * half;
  if (rope.wide)
    rotate_pairs(static_cast<const float*>(rope.cos) + at, static_cast<const float*>(rope.sin) + at, half,
                 rope.interleaved, x, out);
  else
    rotate_pairs(static_cast<const T*>(rope.cos) + at, static_cast<const T*>(rope.sin) + at, half, rope.interleaved, x,
                 out);
  std::copy_n(x + rope.dim, width - rope.dim, out + rope.dim);
}

template <class T>
static void clamp(T* x, int64_t n, float most) {  // NaN stays
  for (int64_t i = 0; i < n; ++i) {
    const float value = widened(x[i]);
    if (value < -most) narrow(-most, x + i);
    if (value > most) narrow(most, x + i);
  }
}

#pragma GCC pop_options
