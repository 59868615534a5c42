// y = x W'ᵀ + b for W' = W + s · B A, as one node of the autograd graph.
//
//     x: (n, k), A: (r, k), B: (m, r), W: (m, k), y: (n, m), h = x Aᵀ: (n, r), dh = s · dy B
//
// lowrank.py has the formulas and the same in Python, the reference that tests compare with. What
// that costs in a small layer is no arithmetic: a graph node, a call into torch and a temporary for
// each of seven products; here they are one node. In float32 on a CPU, where BLAS is at its worst
// with r columns, the thin products have loops of their own, which read the large matrix once.
// native.py builds this file.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// ---- Thin products of float32 matrices in a CPU's memory, all of them contiguous ----

// One binary for every processor: the loader takes the best version for the one at hand.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("avx512f", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))  // without FMA
#else
#define CLONES
#endif
// What is called by a clone has to be a part of it.
#define INLINE __attribute__((always_inline))

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t WIDTH = sizeof(Lanes) / sizeof(float);

INLINE inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
INLINE inline void store(float* to, Lanes lanes) { *reinterpret_cast<Lanes*>(to) = lanes; }

#if defined(__clang__)
#define ROTATED(a, ...) __builtin_shufflevector(a, a, __VA_ARGS__)
#else
#define ROTATED(a, ...) __builtin_shuffle(a, (Places){__VA_ARGS__})
typedef int Places __attribute__((vector_size(64)));
#endif

INLINE inline float total(Lanes a) {
  a += ROTATED(a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  a += ROTATED(a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  a += ROTATED(a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return a[0] + a[1];
}

template <int N>
using Count = std::integral_constant<int, N>;

// Call part(Count<4>, i) for i = 0, 4, … as long as there are four of n left, then for fewer.
template <class Part>
INLINE inline void by_fours(int64_t n, Part part) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) part(Count<4>{}, i);
  for (; i + 2 <= n; i += 2) part(Count<2>{}, i);
  for (; i < n; i++) part(Count<1>{}, i);
}

// H = X Mᵀ for ROWS rows of X and RANKS of M, of length K; rows of H are `ld` apart.
template <int ROWS, int RANKS>
INLINE inline void dots(const float* X, const float* M, int64_t K, float* H, int64_t ld) {
  Lanes sums[ROWS][RANKS] = {};
  int64_t j = 0;
  for (; j + WIDTH <= K; j += WIDTH) {
    Lanes m[RANKS];
    for (int r = 0; r < RANKS; r++) m[r] = load(M + r * K + j);
    for (int i = 0; i < ROWS; i++) {
      Lanes x = load(X + i * K + j);
      for (int r = 0; r < RANKS; r++) sums[i][r] += x * m[r];
    }
  }
  for (int i = 0; i < ROWS; i++) {
    for (int r = 0; r < RANKS; r++) {
      float sum = total(sums[i][r]);
      for (int64_t t = j; t < K; t++) sum += X[i * K + t] * M[r * K + t];
      H[i * ld + r] = sum;
    }
  }
}

// Y = C + H M for ROWS rows of C, (ROWS, K), and VECTORS · WIDTH columns; M (r, K), H (ROWS, r)
template <int ROWS, int VECTORS>
INLINE inline void sums(
    const float* C, float* Y, int64_t K, const float* H, int64_t r, const float* M) {
  Lanes y[ROWS][VECTORS];
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) y[i][v] = load(C + i * K + v * WIDTH);
  for (int64_t q = 0; q < r; q++) {
    Lanes m[VECTORS];
    for (int v = 0; v < VECTORS; v++) m[v] = load(M + q * K + v * WIDTH);
    for (int i = 0; i < ROWS; i++)
      for (int v = 0; v < VECTORS; v++) y[i][v] += H[i * r + q] * m[v];
  }
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) store(Y + i * K + v * WIDTH, y[i][v]);
}

// G += Hᵀ X for RANKS columns of H and VECTORS · WIDTH of X, over n rows.
template <int RANKS, int VECTORS>
INLINE inline void outer(
    const float* X, int64_t n, int64_t K, const float* H, int64_t ld, float* G) {
  Lanes g[RANKS][VECTORS];
  for (int r = 0; r < RANKS; r++)
    for (int v = 0; v < VECTORS; v++) g[r][v] = load(G + r * K + v * WIDTH);
  for (int64_t i = 0; i < n; i++) {
    Lanes x[VECTORS];
    for (int v = 0; v < VECTORS; v++) x[v] = load(X + i * K + v * WIDTH);
    for (int r = 0; r < RANKS; r++)
      for (int v = 0; v < VECTORS; v++) g[r][v] += x[v] * H[i * ld + r];
  }
  for (int r = 0; r < RANKS; r++)
    for (int v = 0; v < VECTORS; v++) store(G + r * K + v * WIDTH, g[r][v]);
}

// H (n, r) = X (n, K) Mᵀ; M (r, K)
CLONES void all_dots(
    const float* X, int64_t n, int64_t K, const float* M, int64_t r, float* H) {
  by_fours(n, [&](auto rows, int64_t i) INLINE {
    by_fours(r, [&](auto ranks, int64_t q) INLINE {
      dots<rows(), ranks()>(X + i * K, M + q * K, K, H + i * r + q, r);
    });
  });
}

// Y (n, K) = C + H M; H (n, r), M (r, K)
CLONES void all_sums(
    const float* C, float* Y, int64_t n, int64_t K, const float* H, int64_t r, const float* M) {
  by_fours(n, [&](auto rows, int64_t i) INLINE {
    const float *c = C + i * K, *h = H + i * r;
    float* y = Y + i * K;
    int64_t j = 0;
    for (; j + 4 * WIDTH <= K; j += 4 * WIDTH) sums<rows(), 4>(c + j, y + j, K, h, r, M + j);
    for (; j + WIDTH <= K; j += WIDTH) sums<rows(), 1>(c + j, y + j, K, h, r, M + j);
    for (; j < K; j++) {
      for (int t = 0; t < rows(); t++) {
        float sum = c[t * K + j];
        for (int64_t q = 0; q < r; q++) sum += h[t * r + q] * M[q * K + j];
        y[t * K + j] = sum;
      }
    }
  });
}

// Columns `first` to `last` of G (r, K) += Hᵀ X; H (n, r), X (n, K)
CLONES void all_outer(
    const float* X, int64_t n, int64_t K, int64_t first, int64_t last, const float* H, int64_t r,
    float* G) {
  // So many rows stay in the cache while all ranks pass over them.
  int64_t block = std::clamp<int64_t>(65536 / (last - first + 1), 8, 64);
  for (int64_t i = 0; i < n; i += block) {
    int64_t rows = std::min(block, n - i);
    const float *x = X + i * K, *h = H + i * r;
    by_fours(r, [&](auto ranks, int64_t q) INLINE {
      float* g = G + q * K;
      int64_t j = first;
      for (; j + 4 * WIDTH <= last; j += 4 * WIDTH)
        outer<ranks(), 4>(x + j, rows, K, h + q, r, g + j);
      for (; j + WIDTH <= last; j += WIDTH) outer<ranks(), 1>(x + j, rows, K, h + q, r, g + j);
      for (; j < last; j++)
        for (int64_t t = 0; t < rows; t++)
          for (int p = 0; p < ranks(); p++) g[p * K + j] += h[t * r + q + p] * x[t * K + j];
    });
  }
}

// y (m) += s · B h; B (m, r), h (r). For a single row it is not worth it to transpose B.
CLONES void add_product(float* y, const float* B, int64_t m, const float* h, int64_t r, float s) {
  for (int64_t j = 0; j < m; j++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t q = 0; q < r; q++) sum += B[j * r + q] * h[q];
    y[j] += s * sum;
  }
}

// To (r, m) = s · Fromᵀ; From (m, r)
void transpose(const float* from, int64_t m, int64_t r, float* to, float s) {
  for (int64_t q = 0; q < r; q++)
    for (int64_t i = 0; i < m; i++) to[q * m + i] = s * from[i * r + q];
}

// How many of so costly items make a thread worth waking.
int64_t grain(int64_t products) {
  return std::max<int64_t>(1, 131072 / std::max<int64_t>(1, products));
}

void parallel_dots(
    const float* X, int64_t n, int64_t K, const float* M, int64_t r, float* H) {
  at::parallel_for(0, n, grain(K * r), [&](int64_t from, int64_t to) {
    all_dots(X + from * K, to - from, K, M, r, H + from * r);
  });
}

void parallel_sums(
    const float* C, float* Y, int64_t n, int64_t K, const float* H, int64_t r, const float* M) {
  at::parallel_for(0, n, grain(K * r), [&](int64_t from, int64_t to) {
    all_sums(C + from * K, Y + from * K, to - from, K, H + from * r, r, M);
  });
}

void parallel_outer(const float* X, int64_t n, int64_t K, const float* H, int64_t r, float* G) {
  std::fill_n(G, r * K, 0.0f);
  constexpr int64_t COLUMNS = 4 * WIDTH;
  int64_t blocks = (K + COLUMNS - 1) / COLUMNS;
  at::parallel_for(0, blocks, grain(COLUMNS * n * r), [&](int64_t from, int64_t to) {
    all_outer(X, n, K, from * COLUMNS, std::min(to * COLUMNS, K), H, r, G);
  });
}

// ---- The same on any tensors ----

// What the loops can read: where its memory says what it is.
bool readable(const Tensor& t) {
  return t.is_cpu() && t.scalar_type() == at::kFloat && t.layout() == at::kStrided && !t.is_neg() &&
      !at::isTensorSubclassLike(t);
}

// Of a high rank, and of many rows that fill no vector, BLAS makes more than these loops do.
bool own_loops(const Tensor& t, int64_t r, const Tensor& other) {
  if (r > 64 || !readable(t) || !readable(other)) return false;
  int64_t columns = t.size(-1);
  return columns >= 4 * WIDTH || columns % WIDTH == 0 || t.numel() < 2 * WIDTH * columns;
}

const float* in(const Tensor& t) { return t.const_data_ptr<float>(); }
float* out(const Tensor& t) { return t.mutable_data_ptr<float>(); }

// Without a call into torch, which is what a small layer costs, where there is nothing to cast.
Tensor cast(const Tensor& t, at::ScalarType to) { return t.scalar_type() == to ? t : t.to(to); }

Tensor matrix(const Tensor& t) { return t.dim() == 2 ? t : t.reshape({-1, t.size(-1)}); }

// s · P Q in one launch.
Tensor scaled_mm(const Tensor& P, const Tensor& Q, double s) {
  if (s == 1.0) return at::mm(P, Q);
  return at::empty({P.size(0), Q.size(1)}, P.options()).addmm_(P, Q, 0, s);
}

// s · Bᵀ, (r, m), contiguous as the loops want their r rows; B (m, r) in float32
Tensor rows_of(const Tensor& B, double s) {
  auto from = B.contiguous();
  auto to = at::empty({B.size(1), B.size(0)}, B.options());
  transpose(in(from), B.size(0), B.size(1), out(to), s);
  return to;
}

// x Aᵀ, (n, r)
Tensor down(const Tensor& x2, const Tensor& A) {
  if (!own_loops(x2, A.size(0), A)) return at::mm(x2, A.t());
  auto x = x2.contiguous(), a = A.contiguous();
  auto h = at::empty({x.size(0), a.size(0)}, x.options());
  parallel_dots(in(x), x.size(0), x.size(1), in(a), a.size(0), out(h));
  return h;
}

// s · dy B, (n, r)
Tensor gradient_of_h(const Tensor& dy, const Tensor& B, double s) {
  return own_loops(dy, B.size(1), B) ? down(dy, rows_of(B, s)) : scaled_mm(dy, B, s);
}

// dhᵀ x, (r, k)
Tensor gradient_of_A(const Tensor& dh, const Tensor& x2) {
  int64_t r = dh.size(1), k = x2.size(1);
  if (!own_loops(x2, r, dh)) return at::mm(dh.t(), x2);
  auto x = x2.contiguous();
  auto dA = at::empty({r, k}, x.options());
  parallel_outer(in(x), x.size(0), k, in(dh), r, out(dA));
  return dA;
}

// s · dyᵀ h, (m, r)
Tensor gradient_of_B(const Tensor& dy, const Tensor& h, double s) {
  int64_t m = dy.size(1), r = h.size(1);
  if (!own_loops(dy, r, h)) return scaled_mm(dy.t(), h, s);
  auto across = gradient_of_A(h, dy);
  auto dB = at::empty({m, r}, dy.options());
  transpose(in(across), r, m, out(dB), s);
  return dB;
}

// C + s · P Q; into C where `inplace`.
Tensor update(const Tensor& C, const Tensor& P, const Tensor& Q, double s, bool inplace) {
  if (!own_loops(C, P.size(1), P) || !readable(Q) || !C.is_contiguous())
    return inplace ? C.addmm_(P, Q, 1, s) : at::addmm(C, P, Q, 1, s);
  auto y = inplace ? C : at::empty_like(C);
  auto p = P.contiguous(), q = Q.contiguous();
  // The scale goes to the smaller of the two.
  if (s != 1.0) (p.numel() < q.numel() ? p : q) = (p.numel() < q.numel() ? p : q) * s;
  parallel_sums(in(C), out(y), C.size(0), C.size(1), in(p), p.size(1), in(q));
  return y;
}

struct Forward {
  Tensor y, h;
};

Forward compute(
    const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, const Tensor& A,
    const Tensor& B, double s, bool dense) {
  if (dense) return {at::linear(x, update(W, B, A, s, false), b), Tensor()};
  // Of x as it is: a strided one is rounded otherwise than its copy, and B = 0 must be the base.
  auto y = at::linear(x, W, b);
  auto h = down(matrix(x), A);
  if (!y.is_contiguous()) y = y.contiguous();
  auto y2 = y.view({-1, W.size(0)});
  if (own_loops(y2, A.size(0), B))
    update(y2, h, rows_of(B, s), 1, true);
  else
    update(y2, h, B.t(), s, true);
  return {y, h};
}

// Whether something looks on that needs operations which it knows: vmap, forward-mode derivatives.
bool observed(const variable_list& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
    return t.defined() && (at::isTensorSubclassLike(t) || t._fw_grad(0).defined());
  });
}

class Linear : public torch::autograd::Function<Linear> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& W, const Tensor& A, const Tensor& B,
      const std::optional<Tensor>& b, double s, bool dense, bool dense_backward) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, h] = compute(x, W, b, A, B, s, dense);
    // Nothing that no wanted gradient needs: x may be written to, and W merged.
    bool of_x = W.requires_grad() || A.requires_grad() || B.requires_grad();
    ctx->save_for_backward(
        {of_x ? x : Tensor(), x.requires_grad() ? W : Tensor(), A, B,
         B.requires_grad() ? h : Tensor()});
    ctx->saved_data["s"] = s;
    ctx->saved_data["dense"] = dense_backward;
    ctx->saved_data["bias"] = b.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    // All has its dtype; autocast around a backward would give some products another.
    c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    const auto &x = saved[0], &W = saved[1], &A = saved[2], &B = saved[3], &g = grads[0];
    double s = ctx->saved_data["s"].toDouble();
    auto x2 = x.defined() ? matrix(x) : x, dy = matrix(g);
    auto shape = g.sizes().vec();
    shape.back() = A.size(1);
    bool dense = ctx->saved_data["dense"].toBool();
    // Counted without what is no tensor, so b comes last.
    bool to_x = ctx->needs_input_grad(0), to_W = ctx->needs_input_grad(1);
    bool to_A = ctx->needs_input_grad(2), to_B = ctx->needs_input_grad(3);
    bool to_b = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(4);
    Tensor h = saved[4], dx, dW, db, dA, dB, dh;
    if (at::GradMode::is_enabled() || observed(grads) || observed(saved)) {
      // A graph of the backward is wanted, or a batch or a tangent of it: in plain operations.
      if (to_A || to_x) dh = at::mm(dy, B) * s;
      if (to_B) dB = at::mm(dy.t(), at::mm(x2, A.t())) * s;
      if (to_A) dA = at::mm(dh.t(), x2);
      if (to_x) dx = (at::mm(dy, W) + at::mm(dh, A)).view(shape);
    } else {
      dy = dy.contiguous();
      if (to_A || (to_x && !dense)) dh = gradient_of_h(dy, B, s);
      if (to_B) dB = gradient_of_B(dy, h.defined() ? h : down(x2, A), s);
      if (to_A) dA = gradient_of_A(dh, x2);
    }
    if (to_x && !dx.defined()) {
      if (dense)
        dx = at::mm(dy, update(W, B, A, s, false));
      else
        dx = update(at::mm(dy, W), dh, A, 1, true);
      dx = dx.view(shape);
    }
    if (to_W) dW = at::mm(dy.t(), x2);
    if (to_b) db = dy.sum(0);
    return {dx, dW, dA, dB, db, Tensor(), Tensor(), Tensor()};
  }
};

// In `dtype` where one is given, as under autocast.
Tensor linear(
    const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, const Tensor& A,
    const Tensor& B, double s, bool dense, bool dense_backward,
    std::optional<at::ScalarType> dtype) {
  TORCH_CHECK(
      W.dim() == 2 && A.dim() == 2 && B.dim() == 2 && A.size(1) == W.size(1) &&
          B.size(0) == W.size(0) && A.size(0) == B.size(1),
      "factors of shapes ", A.sizes(), " and ", B.sizes(), " do not fit a weight of ", W.sizes());
  TORCH_CHECK(
      A.device() == W.device() && B.device() == W.device(), "factors on ", A.device(), " and ",
      B.device(), " do not fit a weight on ", W.device());
  // Before the node, which so keeps the casts: to cast again in the backward costs two launches.
  auto to = dtype.value_or(x.scalar_type());
  auto a = cast(A, to), up = cast(B, to), input = cast(x, to), weight = dtype ? cast(W, to) : W;
  auto bias = dtype && b ? std::optional<Tensor>(cast(*b, to)) : b;
  if (at::GradMode::is_enabled())
    return Linear::apply(input, weight, a, up, bias, s, dense, dense_backward);
  return compute(input, weight, bias, a, up, s, dense).y;
}

// x Wᵀ + b, and for the rows of `order` an update each: the first counts[0] of them get that of
// As[0] and Bs[0], and so on. float32 on a CPU, without gradients; x (n, …, k), order int64.
Tensor routed(
    const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, const Tensor& order,
    const std::vector<int64_t>& counts, const std::vector<Tensor>& As,
    const std::vector<Tensor>& Bs, const std::vector<double>& scales) {
  auto y = at::linear(x, W, b).contiguous();
  auto rows = x.contiguous();
  int64_t k = W.size(1), m = W.size(0), positions = x.numel() / std::max<int64_t>(1, x.size(0) * k);
  const int64_t* row = order.const_data_ptr<int64_t>();
  const float* px = in(rows);
  float* py = out(y);
  for (size_t e = 0; e < counts.size(); e++) {
    auto A = As[e].contiguous(), B = Bs[e].contiguous();
    int64_t r = A.size(0);
    bool single = counts[e] * positions < 4;
    auto up = single ? B : rows_of(B, scales[e]);
    const float *pA = in(A), *pB = in(up);
    at::parallel_for(0, counts[e], grain((k + m) * r * positions), [&](int64_t from, int64_t to) {
      std::vector<float> h(positions * r);
      for (int64_t i = from; i < to; i++) {
        float* its = py + row[i] * positions * m;
        all_dots(px + row[i] * positions * k, positions, k, pA, r, h.data());
        if (single)
          for (int64_t p = 0; p < positions; p++)
            add_product(its + p * m, pB, m, h.data() + p * r, r, scales[e]);
        else
          all_sums(its, its, positions, m, h.data(), r, pB);
      }
    });
    row += counts[e];
  }
  return y;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using pybind11::arg;
  module.def(
      "linear", torch::wrap_pybind_function_no_gil(linear), arg("x"), arg("W"), arg("b"), arg("A"),
      arg("B"), arg("s"), arg("dense"), arg("dense_backward"), arg("dtype") = pybind11::none());
  module.def("routed", torch::wrap_pybind_function_no_gil(routed));
}
