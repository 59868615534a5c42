// y = x W'ᵀ + b with W' = W + s · B A, as one node of the autograd graph.
//
//     x: (n, k), W: (m, k), b: (m), A: (r, k), B: (m, r), y: (n, m), h = x Aᵀ: (n, r)
//     backward: dy: (n, m), dh = s · dy B: (n, r); every other gradient has its tensor's shape
//
// lowrank.py states the formulas and has the Python version that the tests compare with. In a small
// layer most of an adapter's time is not arithmetic: each of its seven products costs a graph node, a
// Python call and a temporary. This node makes the same products and pays that once. load.py loads
// the built file, and build.py compiles it.

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// x as a matrix: (…, k) -> (n, k)
Tensor matrix(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

// Returns t unchanged if it has the dtype. `Tensor::to` would as well, at the cost of a dispatch.
Tensor cast(const Tensor& t, at::ScalarType to) { return t.scalar_type() == to ? t : t.to(to); }

// s · P Q. `addmm_` scales within the product: one GPU launch instead of two. Under vmap (as with
// torch.autograd.grad(…, is_grads_batched=True)) it must not be used, because P is a batch of
// matrices there and a new tensor is not.
Tensor scaled_mm(const Tensor& P, const Tensor& Q, double s) {
  if (s == 1.0) return at::mm(P, Q);
  if (at::isTensorSubclassLike(P)) return at::mm(P, Q) * s;
  return at::empty({P.size(0), Q.size(1)}, P.options()).addmm_(P, Q, 0, s);
}

// Returns y and, on the factored path, h.
std::pair<Tensor, Tensor> compute(
    const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, const Tensor& A,
    const Tensor& B, double s, bool dense) {
  if (dense) return {at::linear(x, at::addmm(W, B, A, 1, s), b), Tensor()};
  // x itself and not matrix(x): BLAS rounds a strided x and its contiguous copy differently, and
  // with B = 0 the output must be the base layer's bit for bit.
  auto y = at::linear(x, W, b).contiguous();         // (…, m)
  auto h = at::mm(matrix(x), A.t());                 // (n, r)
  y.view({-1, W.size(0)}).addmm_(h, B.t(), 1, s);    // (n, m) += s · (n, r) (r, m)
  return {y, h};
}

class Linear : public torch::autograd::Function<Linear> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& W, const Tensor& A, const Tensor& B,
      const std::optional<Tensor>& b, double s, bool dense, bool dense_backward) {
    // `apply` makes the node. The products below need no nodes of their own, so they skip autograd's
    // kernels, and those that track views: y is a new tensor, which nn.ReLU(inplace=True) may change.
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, h] = compute(x, W, b, A, B, s, dense);
    // Autograd raises in the backward if a saved tensor was written to since. So a tensor that no
    // wanted gradient reads must not be saved: with all parameters frozen only dx is wanted, and the
    // caller may overwrite x; with no gradient for x, W may be merged before the backward.
    bool x_is_read = W.requires_grad() || A.requires_grad() || B.requires_grad();
    ctx->save_for_backward(
        {x_is_read ? x : Tensor(), x.requires_grad() ? W : Tensor(), A, B,
         B.requires_grad() ? h : Tensor()});
    ctx->saved_data["s"] = s;
    ctx->saved_data["dense"] = dense_backward;
    ctx->saved_data["bias"] = b.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    // The saved tensors have one dtype. Under autocast around the backward, `mm` would cast some of
    // them and `addmm_` would not.
    c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    auto saved = ctx->get_saved_variables();  // raises if one of them was written to
    const auto &x = saved[0], &W = saved[1], &A = saved[2], &B = saved[3], &g = grads[0];
    double s = ctx->saved_data["s"].toDouble();
    bool dense = ctx->saved_data["dense"].toBool();
    // The index counts the tensors that `forward` got. A missing bias is not counted, so b is the
    // last tensor among the arguments, and 4 is out of range without it.
    bool to_x = ctx->needs_input_grad(0), to_W = ctx->needs_input_grad(1);
    bool to_A = ctx->needs_input_grad(2), to_B = ctx->needs_input_grad(3);
    bool to_b = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(4);

    // With create_graph=True the gradients get a graph themselves. The saved h has none, because
    // `forward` computed it without autograd, so dB would miss its derivatives by x and A.
    bool graph = at::GradMode::is_enabled();
    Tensor x2 = x.defined() ? matrix(x) : x;
    // y.sum() hands in one number, expanded to (n, m), which each product would copy.
    Tensor dy = matrix(g).contiguous();
    Tensor h = saved[4], dh, dx, dW, dA, dB, db;
    if (to_A || (to_x && !dense)) dh = scaled_mm(dy, B, s);  // s · (n, m) (m, r)
    if (to_A) dA = at::mm(dh.t(), x2);                                  // (r, n) (n, k)
    if (to_B) {
      if (graph || !h.defined()) h = at::mm(x2, A.t());  // (n, k) (k, r)
      dB = scaled_mm(dy.t(), h, s);           // s · (m, n) (n, r)
    }
    if (to_x) {
      dx = dense ? at::mm(dy, at::addmm(W, B, A, 1, s))  // (n, m) (m, k)
                 : at::mm(dy, W).addmm_(dh, A);          // (n, m) (m, k) + (n, r) (r, k)
      auto shape = g.sizes().vec();
      shape.back() = A.size(1);
      dx = dx.view(shape);  // (…, k)
    }
    if (to_W) dW = at::mm(dy.t(), x2);  // (m, n) (n, k)
    if (to_b) db = dy.sum(0);           // (m)
    return {dx, dW, dA, dB, db, Tensor(), Tensor(), Tensor()};
  }
};

// x: (…, k) -> (…, m). `dtype` is autocast's, if it is on.
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
  // Casts are made before the node, so that it saves their results: casting W and x again in the
  // backward would cost two launches. Autograd has a node for each cast, and so gives each gradient
  // the dtype of its tensor. W and b are cast under autocast only; else a W of another dtype than x
  // raises, as in F.linear.
  auto to = dtype.value_or(x.scalar_type());
  auto x_ = cast(x, to), W_ = dtype ? cast(W, to) : W, A_ = cast(A, to), B_ = cast(B, to);
  auto b_ = dtype && b ? std::optional<Tensor>(cast(*b, to)) : b;
  if (at::GradMode::is_enabled())
    return Linear::apply(x_, W_, A_, B_, b_, s, dense, dense_backward);
  return compute(x_, W_, b_, A_, B_, s, dense).first;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using pybind11::arg;
  module.def(
      "linear", torch::wrap_pybind_function_no_gil(linear), arg("x"), arg("W"), arg("b"), arg("A"),
      arg("B"), arg("s"), arg("dense"), arg("dense_backward"), arg("dtype") = pybind11::none());
}
