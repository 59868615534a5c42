// y = x W'ᵀ + b with W' = W + s · B A, as one node of the autograd graph.
//
//     x: (n, k), W: (m, k), b: (m), A: (r, k), B: (m, r), y: (n, m), h = x Aᵀ: (n, r)
//     backward: dy: (n, m), dh = s · dy B: (n, r); other gradients have the shape of their tensor
//
// lowrank.py states the formulas and has the Python version that the tests compare with. In a small
// layer an adapter costs little arithmetic, but each of its seven products costs a graph node, a
// Python call and a temporary. This node computes the same products without that cost. build.py
// compiles this file, and load.py loads the result.

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// x as a matrix: (…, k) -> (n, k)
Tensor matrix(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

// t in a dtype. The test saves a small layer the dispatch of a `to` that changes nothing.
Tensor cast(const Tensor& t, at::ScalarType to) { return t.scalar_type() == to ? t : t.to(to); }

// P Q in the dtype of a factor, which may be float32 beside products in half precision. A GPU then
// writes float32 at once: one launch instead of two, and without the rounding to half precision.
Tensor mm_in(const Tensor& P, const Tensor& Q, at::ScalarType to) {
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 8)
  bool plain = !at::isTensorSubclassLike(P) && !at::isTensorSubclassLike(Q) && !at::hasHIP();
  bool half = at::isReducedFloatingType(P.scalar_type());
  if (half && to == at::kFloat && P.is_cuda() && plain && !at::GradMode::is_enabled())
    return at::mm(P, Q, to);
#endif
  return cast(at::mm(P, Q), to);
}

// s · P Q in a dtype. `addmm_` scales within the product, which saves a GPU launch. vmap cannot run
// it: P or Q holds a batch of matrices there, and the new tensor, which would have to hold the
// results, does not. vmap gets here by torch.autograd.grad(…, is_grads_batched=True).
Tensor scaled_mm(const Tensor& P, const Tensor& Q, double s, at::ScalarType to) {
  bool batched = at::isTensorSubclassLike(P) || at::isTensorSubclassLike(Q);
  if (s == 1.0 || batched || to != P.scalar_type()) {
    auto product = mm_in(P, Q, to);
    return s == 1.0 ? product : product * s;
  }
  return at::empty({P.size(0), Q.size(1)}, P.options()).addmm_(P, Q, 0, s);
}

// s · P Q for a Q of r columns. P has the size of dy. The result may be column-major. MKL is slow
// for 2 to 15 columns and fast for as few rows: on an EPYC dyᵀ h takes 3.2 ms for dy (1000, 1024)
// and h (1000, 4), and its transpose hᵀ dy takes 0.3 ms. So in float32 and float64 on a CPU the
// transpose is computed, if P is large and 2 ≤ r ≤ `widest`. lowrank.py has the same rule.
Tensor thin_mm(
    const Tensor& P, const Tensor& Q, double s, int64_t widest,
    std::optional<at::ScalarType> dtype = std::nullopt) {
  auto to = dtype.value_or(P.scalar_type());
  auto r = Q.size(1);
  bool transposed = P.is_cpu() && at::elementSize(P.scalar_type()) >= 4 && 1 < r && r <= widest &&
      8 * r <= std::min(P.size(0), P.size(1)) && P.numel() >= 8192;
  return transposed ? scaled_mm(Q.t(), P.t(), s, to).t() : scaled_mm(P, Q, s, to);
}

// Returns y, and h if the path computes it. `dense` builds W', else the update goes to the product.
std::pair<Tensor, Tensor> compute(
    const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, const Tensor& A,
    const Tensor& B, double s, bool dense) {
  if (dense) return {at::linear(x, at::addmm(W, B, A, 1, s), b), Tensor()};  // x (m, k)ᵀ
  // Pass x and not matrix(x). BLAS may round a strided x and a contiguous copy of it differently,
  // and with B = 0 the output must be the base layer's bit for bit.
  auto y = at::linear(x, W, b).contiguous();       // (…, m)
  auto h = at::mm(matrix(x), A.t());               // (n, k) (k, r)
  y.view({-1, W.size(0)}).addmm_(h, B.t(), 1, s);  // (n, m) += s · (n, r) (r, m)
  return {y, h};
}

// Note a factor of another dtype than the products, with its version.
void keep(AutogradContext* ctx, const std::string& name, const Tensor& factor, at::ScalarType to) {
  if (factor.scalar_type() == to) return;
  ctx->saved_data[name] = factor;
  int64_t version = factor.is_inference() ? 0 : static_cast<int64_t>(factor._version());
  ctx->saved_data[name + "_version"] = version;
}

// Returns the factor for the products of the backward, and the dtype of its gradient: the saved
// cast, or a new cast if the gradients are to be differentiated.
std::pair<Tensor, at::ScalarType> factor(
    AutogradContext* ctx, const std::string& name, const Tensor& saved, bool again) {
  auto kept = ctx->saved_data.find(name);
  if (kept == ctx->saved_data.end()) return {saved, saved.scalar_type()};
  auto original = kept->second.toTensor();
  if (!again) return {saved, original.scalar_type()};
  TORCH_CHECK(
      original.is_inference() ||
          static_cast<int64_t>(original._version()) == ctx->saved_data[name + "_version"].toInt(),
      "the factor ", name, " was modified by an inplace operation after the forward, and "
      "create_graph=True needs the factor of the forward");
  return {cast(original, saved.scalar_type()), original.scalar_type()};
}

class Linear : public torch::autograd::Function<Linear> {
 public:
  // A and B may have another dtype than the others. They are cast here and not before, so that the
  // graph has no nodes for the casts, and the backward returns their gradients in their dtype.
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& W, const Tensor& A, const Tensor& B,
      const std::optional<Tensor>& b, double s, bool dense, bool dense_backward) {
    // `Function::apply` adds this node to the graph. Hide the operations inside from autograd. It
    // would record that y is a view (`linear` returns one for an x of three dimensions), and refuse
    // nn.ReLU(inplace=True) on a view that a custom function returns.
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto to = x.scalar_type();
    auto A_ = cast(A, to), B_ = cast(B, to);
    auto [y, h] = compute(x, W, b, A_, B_, s, dense);
    // Save a tensor only if a wanted gradient reads it. Each saved tensor has a version, and the
    // backward raises if an in-place operation has changed it. With W, A and B frozen only dx is
    // wanted, which does not read x: the next layer may overwrite x. Without dx nothing reads W: it
    // may be merged before the backward.
    bool reads_x = W.requires_grad() || A.requires_grad() || B.requires_grad();
    ctx->save_for_backward(
        {reads_x ? x : Tensor(), x.requires_grad() ? W : Tensor(), A_, B_,
         B.requires_grad() ? h : Tensor()});
    // The casts are saved, so an optimizer may change A and B before the backward.
    keep(ctx, "A", A, to);
    keep(ctx, "B", B, to);
    ctx->saved_data["s"] = s;
    ctx->saved_data["dense"] = dense_backward;
    ctx->saved_data["bias"] = b.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    // The saved tensors have one dtype. If autocast is on around the backward, it casts what `mm`
    // gets and not what `addmm_` gets, and the dtypes no longer match.
    c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    auto saved = ctx->get_saved_variables();  // compares the versions
    const auto &x = saved[0], &W = saved[1], &g = grads[0];
    // With create_graph=True the gradients are differentiated with respect to A and B, too. The
    // saved casts and the saved h were hidden from autograd, so both are computed again.
    bool again = at::GradMode::is_enabled();
    auto [A, A_dtype] = factor(ctx, "A", saved[2], again);
    auto [B, B_dtype] = factor(ctx, "B", saved[3], again);
    double s = ctx->saved_data["s"].toDouble();
    bool dense = ctx->saved_data["dense"].toBool();
    // The index counts the tensors among the arguments of `forward`. A bias of nullopt is not one,
    // and would shift the indices behind it, so b comes last.
    bool to_x = ctx->needs_input_grad(0), to_W = ctx->needs_input_grad(1);
    bool to_A = ctx->needs_input_grad(2), to_B = ctx->needs_input_grad(3);
    bool to_b = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(4);

    auto x2 = x.defined() ? matrix(x) : Tensor();
    // The gradient of y.sum() is one number, expanded to (n, m). Copy it once here: otherwise each
    // product copies it.
    auto dy = matrix(g).contiguous();
    Tensor dh, h = saved[4], dx, dW, dA, dB, db;
    if (to_A || (to_x && !dense)) dh = thin_mm(dy, B, s, 15);  // s · (n, m) (m, r)
    if (to_A) dA = mm_in(dh.t(), x2, A_dtype);                 // (r, n) (n, k)
    if (to_B) {
      if (!h.defined() || again) h = at::mm(x2, A.t());  // (n, k) (k, r)
      dB = thin_mm(dy.t(), h, s, 32, B_dtype).contiguous();  // s · (m, n) (n, r)
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

// x: (…, k) -> (…, m). `dtype` is the dtype of autocast if that is on.
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
  // Cast x, W and b before the node: autograd's node for each cast returns the gradient in the
  // original dtype. A and B may always have another dtype than x. W and b may only under autocast;
  // otherwise the error is that of F.linear.
  auto to = dtype.value_or(x.scalar_type());
  auto x_ = cast(x, to), W_ = dtype ? cast(W, to) : W;
  auto b_ = dtype && b ? std::optional<Tensor>(cast(*b, to)) : b;
  if (at::GradMode::is_enabled())
    return Linear::apply(x_, W_, A, B, b_, s, dense, dense_backward);
  return compute(x_, W_, b_, cast(A, to), cast(B, to), s, dense).first;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using pybind11::arg;
  module.def(
      "linear", torch::wrap_pybind_function_no_gil(linear), arg("x"), arg("W"), arg("b"), arg("A"),
      arg("B"), arg("s"), arg("dense"), arg("dense_backward"), arg("dtype") = pybind11::none());
}
