// The operators, for torch. The only file that includes its headers: a .cu that does takes half a minute more to compile.
//
// Nothing here decides: the callers (comfy_sage3/kernels) have checked shapes, devices and hardware. What is checked is
// what would otherwise read or write past the end of memory.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "sage3/launch_backward.h"
#include "sage3/launch_fp4.h"
#include "sage3/mask_tiles.cuh"

namespace {

using at::Tensor;
using sage3::int8::Shape;

sage3::Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf: return sage3::Dtype::kFloat16;
    case at::kBFloat16: return sage3::Dtype::kBFloat16;
    case at::kFloat: return sage3::Dtype::kFloat32;
    case at::kBool: return sage3::Dtype::kBool;
    default: TORCH_CHECK(false, "these kernels take fp16, bf16 and fp32, not ", tensor.scalar_type());
  }
}

sage3::Tensor4 view_of(const Tensor& tensor) {
  sage3::Tensor4 view{tensor.data_ptr(), {}, dtype_of(tensor)};
  for (int i = 0; i < 4; ++i) view.stride[i] = tensor.size(i) == 1 ? 0 : tensor.stride(i);
  return view;
}

Shape shape_of(const Tensor& q, const Tensor& k) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must be (batch, heads, tokens, head_dim)");
  TORCH_CHECK(q.numel() > 0 && k.numel() > 0, "q and k must hold something");
  TORCH_CHECK(q.size(0) == k.size(0) && q.size(3) == k.size(3) && q.size(1) % k.size(1) == 0,
              "q and k do not fit together: ", q.sizes(), " and ", k.sizes());
  for (const Tensor& tensor : {q, k}) {
    for (int64_t size : tensor.sizes()) TORCH_CHECK(size < (int64_t(1) << 30), "a dimension of ", size, " is too long");
  }
  const auto size = [](const Tensor& tensor, int dim) { return static_cast<int>(tensor.size(dim)); };
  const Shape shape{size(q, 0), size(q, 1), size(k, 1), size(q, 2), size(k, 2), size(q, 3)};
  TORCH_CHECK(shape.d() != 0, "these kernels take a head_dim of at most 256, not ", shape.head_dim);
  return shape;
}

float* lse_of(const std::optional<Tensor>& lse, const Shape& shape) {
  if (!lse.has_value()) return nullptr;
  TORCH_CHECK(lse->scalar_type() == at::kFloat && lse->is_contiguous() &&
                  lse->numel() == int64_t(shape.batch) * shape.heads * shape.queries,
              "lse must be a contiguous fp32 (batch, heads, queries)");
  return lse->data_ptr<float>();
}

void check_quantizable(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(k.sizes() == v.sizes(), "k and v must have one shape: ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "q, k and v must have one dtype");
  TORCH_CHECK(q.is_cuda() && q.device() == k.device() && q.device() == v.device(), "q, k and v must be on one GPU");
}

void check_out(const Tensor& out, const Tensor& workspace, const Tensor& q) {
  TORCH_CHECK(out.device() == workspace.device() && out.sizes() == q.sizes() && (out.stride(3) == 1 || out.size(3) == 1),
              "out must have q's shape, with dense channels");
}

// out, in q's order of memory if that keeps a token's channels together, and lse, of 0 elements when nobody asks.
std::tuple<Tensor, Tensor> results_of(const Tensor& q, bool return_lse) {
  Tensor out = at::empty_like(q);
  if (out.stride(3) != 1) out = at::empty(q.sizes(), q.options());
  const std::vector<int64_t> size = return_lse ? std::vector{q.size(0), q.size(1), q.size(2)} : std::vector<int64_t>{0};
  return {out, at::empty(size, q.options().dtype(at::kFloat))};
}

// A call's mask, and its tiles classified. Must outlive the launches that use it.
struct Mask {
  sage3::Tensor4 view{};
  Tensor scores, tiles;

  Mask(const std::optional<Tensor>& mask, const Shape& shape, const Tensor& workspace, cudaStream_t stream) {
    if (!mask.has_value()) return;
    TORCH_CHECK(mask->device() == workspace.device(), "mask must be on the GPU of q");
    scores = mask->expand({shape.batch, shape.heads, shape.queries, shape.keys});
    view = view_of(scores);
    tiles = at::empty({sage3::MaskTileIndex(shape, view).bytes}, workspace.options());
    C10_CUDA_CHECK(sage3::classify_mask(shape, view, tiles.data_ptr<unsigned char>(), stream));
  }

  const unsigned char* tiles_data() const { return view.data == nullptr ? nullptr : tiles.data_ptr<unsigned char>(); }
};

Tensor int8_quantize(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const std::optional<Tensor>& lse) {
  const Shape shape = shape_of(q, k);
  check_quantizable(q, k, v);
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor workspace = at::empty({sage3::int8::Workspace(shape).bytes}, q.options().dtype(at::kByte));
  const sage3::Int8Quantize call{shape, view_of(q), view_of(k), view_of(v), static_cast<float>(scale),
                                 workspace.data_ptr(), lse_of(lse, shape)};
  C10_CUDA_CHECK(sage3::int8_quantize(call, c10::cuda::getCurrentCUDAStream()));
  return workspace;
}

void int8_attend_with(const Tensor& workspace, const Tensor& q, const Tensor& k, const std::optional<Tensor>& mask,
                 bool is_causal, Tensor out, const std::optional<Tensor>& lse, const std::string& kernel, float* peak) {
  const Shape shape = shape_of(q, k);
  TORCH_CHECK(workspace.is_cuda() && workspace.scalar_type() == at::kByte && workspace.is_contiguous() &&
                  workspace.numel() >= sage3::int8::Workspace(shape).bytes,
              "this workspace is not that of int8_quantize for these shapes");
  check_out(out, workspace, q);
  const c10::cuda::CUDAGuard guard(workspace.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Mask seen(mask, shape, workspace, stream);
  sage3::Int8Attend call{shape, workspace.data_ptr(), view_of(out), lse_of(lse, shape), seen.view, seen.tiles_data(), is_causal};
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&call.multiprocessors, cudaDevAttrMultiProcessorCount, workspace.get_device()));
  call.peak = peak;
  Tensor next_job;
  cudaError_t error = cudaErrorNotSupported;
#ifdef SAGE3_HAS_INT8_SM90
  call.fast = kernel == "sm90-fast";
  if (kernel == "sm90" || call.fast) {
    if (is_causal || mask.has_value()) {  // of other calls all jobs are alike
      next_job = at::zeros({1}, workspace.options().dtype(at::kInt));
      call.next_job = next_job.data_ptr<int>();
    }
    error = sage3::int8_attend_sm90(call, stream);
  }
#endif
#ifdef SAGE3_HAS_INT8_MMA
  if (kernel == "mma") error = sage3::int8_attend_mma(call, stream);
#endif
  TORCH_CHECK(error != cudaErrorNotSupported, "this library holds no kernel '", kernel, "'");
  C10_CUDA_CHECK(error);
}

void int8_attend(const Tensor& workspace, const Tensor& q, const Tensor& k, const std::optional<Tensor>& mask,
                 bool is_causal, Tensor out, const std::optional<Tensor>& lse, const std::string& kernel) {
  int8_attend_with(workspace, q, k, mask, is_causal, out, lse, kernel, nullptr);
}

std::tuple<Tensor, Tensor> int8_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const std::optional<Tensor>& mask, bool is_causal, double scale,
                                          bool return_lse, const std::string& kernel) {
  const c10::cuda::CUDAGuard guard(q.device());
  const auto [out, lse] = results_of(q, return_lse);
  const auto wanted_lse = return_lse ? std::optional<Tensor>(lse) : std::nullopt;
  const Tensor workspace = int8_quantize(q, k, v, scale, wanted_lse);
  int8_attend(workspace, q, k, mask, is_causal, out, wanted_lse, kernel);
  return {out, lse};
}

#ifdef SAGE3_HAS_INT8_GRAD_SM90

// The forward pass, and what its gradient needs: (out, lse, saved, out8, rows). saved is int8_quantize's workspace, out8 the
// output in 8 bits, rows fp32 (3, B, H, Lq): the LSE of the smoothed scores, out8's scales, and each row's largest weight.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> int8_attention_saving(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                         const std::optional<Tensor>& mask, bool is_causal,
                                                                         double scale, bool return_lse,
                                                                         const std::string& kernel) {
  const Shape shape = shape_of(q, k);
  const c10::cuda::CUDAGuard guard(q.device());
  auto [out, lse] = results_of(q, return_lse);
  const Tensor saved = int8_quantize(q, k, v, scale, return_lse ? std::optional<Tensor>(lse) : std::nullopt);
  const Tensor rows = at::zeros({3, q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  const Tensor smoothed = rows[0];
  int8_attend_with(saved, q, k, mask, is_causal, out, smoothed, kernel, rows[2].data_ptr<float>());
  if (return_lse) lse.add_(smoothed);  // int8_quantize left the mean's part in it
  const Tensor out8 = at::empty(q.sizes(), q.options().dtype(at::kChar));
  const sage3::Int8SaveOutput call{shape, view_of(out), reinterpret_cast<signed char*>(out8.data_ptr()),
                                   rows[1].data_ptr<float>()};
  C10_CUDA_CHECK(sage3::int8_save_output(call, c10::cuda::getCurrentCUDAStream()));
  return {out, lse, saved, out8, rows};
}

// (dq, dk, dv) of what int8_attention_saving left, contiguous, in dout's dtype; dlse is the gradient of the LSE.
std::tuple<Tensor, Tensor, Tensor> int8_attention_gradient(const Tensor& dout, const std::optional<Tensor>& dlse,
                                                           const Tensor& saved, const Tensor& out8, const Tensor& rows,
                                                           const std::optional<Tensor>& mask, int64_t kv_heads, int64_t keys,
                                                           bool is_causal, double scale, bool deterministic) {
  TORCH_CHECK(dout.is_cuda() && dout.dim() == 4 && dout.sizes() == out8.sizes() && out8.scalar_type() == at::kChar &&
                  out8.is_contiguous() && out8.device() == dout.device(),
              "dout must have the output's shape, and out8 be its codes");
  const c10::cuda::CUDAGuard guard(dout.device());
  const Tensor dk = at::empty({dout.size(0), kv_heads, keys, dout.size(3)}, dout.options()), dv = at::empty_like(dk);
  const Tensor dq = at::empty(dout.sizes(), dout.options());
  const Shape shape = shape_of(dout, dk);
  TORCH_CHECK(shape.d() <= 128, "the backward kernels take a head_dim of at most 128, not ", shape.head_dim);
  TORCH_CHECK(saved.device() == dout.device() && saved.scalar_type() == at::kByte && saved.is_contiguous() &&
                  saved.numel() >= sage3::int8::Workspace(shape).bytes,
              "saved is not that of int8_attention_saving for these shapes");
  TORCH_CHECK(rows.device() == dout.device() && rows.scalar_type() == at::kFloat && rows.is_contiguous() &&
                  rows.numel() == 3 * int64_t(shape.batch) * shape.heads * shape.queries,
              "rows must be fp32 (3, batch, heads, queries)");
  const sage3::int8::GradWorkspace at(shape);
  const Tensor workspace = at::empty({at.bytes + 1024}, saved.options());  // torch aligns to 512 bytes
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Mask seen(mask, shape, saved, stream);
  auto* const memory = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(workspace.data_ptr()) + 1023) / 1024 * 1024);
  const sage3::Int8Backward call{shape, saved.data_ptr(), reinterpret_cast<const signed char*>(out8.data_ptr()),
                                 rows[1].data_ptr<float>(), rows[0].data_ptr<float>(), rows[2].data_ptr<float>(), view_of(dout),
                                 view_of(dq), view_of(dk), view_of(dv), static_cast<float>(scale), memory, is_causal, deterministic, seen.view,
                                 seen.tiles_data(), lse_of(dlse, shape)};
  C10_CUDA_CHECK(sage3::int8_backward_prepare(call, stream));
  C10_CUDA_CHECK(sage3::int8_backward_multiply_sm90(call, stream));
  C10_CUDA_CHECK(sage3::int8_backward_finish(call, stream));
  if (dlse.has_value()) {  // the LSE's gradient for q is the weights' mean of k, and k here lacks its own mean
    const int64_t heads = int64_t(shape.batch) * shape.kv_heads;
    const Tensor mean = saved.narrow(0, sage3::int8::Workspace(shape).k_mean, heads * shape.d() * 4)
                            .view(at::kFloat)
                            .view({shape.batch, shape.kv_heads, 1, shape.d()})
                            .narrow(3, 0, shape.head_dim)
                            .repeat_interleave(shape.heads / shape.kv_heads, 1);
    dq.add_((dlse->unsqueeze(-1) * mean).mul_(scale));
  }
  return {dq, dk, dv};
}

#endif  // SAGE3_HAS_INT8_GRAD_SM90

#ifdef SAGE3_HAS_NVFP4

Tensor fp4_quantize(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const std::optional<Tensor>& lse) {
  const Shape shape = shape_of(q, k);
  check_quantizable(q, k, v);
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor workspace = at::empty({sage3::nvfp4::Workspace(shape).bytes}, q.options().dtype(at::kByte));
  const sage3::Fp4Quantize call{shape, view_of(q), view_of(k), view_of(v), static_cast<float>(scale),
                                workspace.data_ptr(), lse_of(lse, shape)};
  C10_CUDA_CHECK(sage3::fp4_quantize(call, c10::cuda::getCurrentCUDAStream()));
  return workspace;
}

// That `workspace` is fp4_quantize's for q and k; its shape.
Shape check_fp4_workspace(const Tensor& workspace, const Tensor& q, const Tensor& k) {
  const Shape shape = shape_of(q, k);
  TORCH_CHECK(workspace.is_cuda() && workspace.device() == k.device() && workspace.scalar_type() == at::kByte &&
                  workspace.is_contiguous() && workspace.numel() >= sage3::nvfp4::Workspace(shape).bytes,
              "this workspace is not that of fp4_quantize for these shapes");
  return shape;
}

void fp4_correct(Tensor workspace, const Tensor& q, const Tensor& k, bool is_causal, double scale, int64_t first_job,
                 int64_t jobs) {
  const Shape shape = check_fp4_workspace(workspace, q, k);
  const sage3::nvfp4::Workspace at(shape);
  TORCH_CHECK(first_job >= 0 && jobs > 0 && jobs <= at.chunk && first_job + jobs <= at.jobs, "there are no such jobs");
  const c10::cuda::CUDAGuard guard(workspace.device());
  const sage3::Fp4Correct call{shape, view_of(k), static_cast<float>(scale), workspace.data_ptr(), first_job, jobs, is_causal};
  C10_CUDA_CHECK(sage3::fp4_correct(call, c10::cuda::getCurrentCUDAStream()));
}

// (products (2, 4, 2, 32, 4) fp32, codes (words, 2) int32): by the instructions and by their emulation, see Fp4Probe.
std::tuple<Tensor, Tensor> fp4_probe(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& scale_a,
                                     const Tensor& scale_b, const Tensor& x) {
  const c10::cuda::CUDAGuard guard(a.device());
  for (const auto& [tensor, size] : {std::pair{a, 128}, std::pair{b, 64}, std::pair{scale_a, 32}, std::pair{scale_b, 32}}) {
    TORCH_CHECK(tensor.is_cuda() && tensor.scalar_type() == at::kInt && tensor.is_contiguous() && tensor.numel() == size,
                "fp4_probe takes a warp's words");
  }
  for (const Tensor& tensor : {c, x}) {
    TORCH_CHECK(tensor.is_cuda() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous(), "fp4_probe takes floats");
  }
  TORCH_CHECK(c.numel() == 128 && x.numel() > 0 && x.numel() % 8 == 0, "fp4_probe takes a warp's accumulators and whole words");
  const int words = static_cast<int>(x.numel() / 8);
  const Tensor products = at::empty({2, 4, 2, 32, 4}, c.options()), codes = at::empty({words, 2}, a.options());
  const auto word = [](const Tensor& tensor) { return reinterpret_cast<uint32_t*>(tensor.data_ptr<int>()); };
  const sage3::Fp4Probe call{word(a), word(b), word(scale_a), word(scale_b), c.data_ptr<float>(), x.data_ptr<float>(), words,
                             products.data_ptr<float>(), word(codes)};
  C10_CUDA_CHECK(sage3::fp4_probe(call, c10::cuda::getCurrentCUDAStream()));
  return {products, codes};
}

// Corrects and attends, chunk by chunk.
void fp4_attend(Tensor workspace, const Tensor& q, const Tensor& k, const std::optional<Tensor>& mask, bool is_causal,
                double scale, Tensor out, const std::optional<Tensor>& lse) {
  const Shape shape = check_fp4_workspace(workspace, q, k);
  check_out(out, workspace, q);
  const c10::cuda::CUDAGuard guard(workspace.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Mask seen(mask, shape, workspace, stream);
  sage3::Fp4Attend call{shape, workspace.data_ptr(), view_of(out), lse_of(lse, shape), seen.view, seen.tiles_data(), is_causal,
                        static_cast<float>(scale)};
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&call.multiprocessors, cudaDevAttrMultiProcessorCount, workspace.get_device()));
  const sage3::nvfp4::Workspace at(shape);
  // Whole rounds of the multiprocessors, where there are several chunks: the last jobs of a launch leave some idle.
  const int64_t round = call.multiprocessors, chunk = at.chunk < at.jobs && at.chunk > round ? at.chunk / round * round : at.chunk;
  for (int64_t first = 0; first < at.jobs; first += chunk) {
    call.first_job = first, call.jobs = std::min(chunk, at.jobs - first);
    fp4_correct(workspace, q, k, is_causal, scale, call.first_job, call.jobs);
    C10_CUDA_CHECK(sage3::fp4_attend_sm120(call, stream));
  }
}

std::tuple<Tensor, Tensor> fp4_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                                         bool is_causal, double scale, bool return_lse) {
  const c10::cuda::CUDAGuard guard(q.device());
  const auto [out, lse] = results_of(q, return_lse);
  const auto wanted_lse = return_lse ? std::optional<Tensor>(lse) : std::nullopt;
  const Tensor workspace = fp4_quantize(q, k, v, scale, wanted_lse);
  fp4_attend(workspace, q, k, mask, is_causal, scale, out, wanted_lse);
  return {out, lse};
}

#endif  // SAGE3_HAS_NVFP4

}  // namespace

// TORCH_LIBRARY pastes its first argument: the namespace must be expanded before.
#define SAGE3_LIBRARY(name, m) TORCH_LIBRARY(name, m)

SAGE3_LIBRARY(SAGE3_NAMESPACE, m) {
  m.def("int8_quantize(Tensor q, Tensor k, Tensor v, float scale, Tensor? lse) -> Tensor", &int8_quantize);
  m.def(
      "int8_attend(Tensor workspace, Tensor q, Tensor k, Tensor? mask, bool is_causal, Tensor(a!) out, Tensor(b!)? lse,"
      " str kernel) -> ()",
      &int8_attend);
  m.def(
      "int8_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, bool return_lse,"
      " str kernel) -> (Tensor, Tensor)",
      &int8_attention);
#ifdef SAGE3_HAS_INT8_GRAD_SM90
  m.def(
      "int8_attention_saving(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, bool return_lse,"
      " str kernel) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      &int8_attention_saving);
  m.def(
      "int8_attention_gradient(Tensor dout, Tensor? dlse, Tensor saved, Tensor out8, Tensor rows, Tensor? mask, int kv_heads,"
      " int keys, bool is_causal, float scale, bool deterministic) -> (Tensor, Tensor, Tensor)",
      &int8_attention_gradient);
#endif
#ifdef SAGE3_HAS_NVFP4
  m.def(
      "fp4_probe(Tensor a, Tensor b, Tensor c, Tensor scale_a, Tensor scale_b, Tensor x) -> (Tensor, Tensor)", &fp4_probe);
  m.def("fp4_quantize(Tensor q, Tensor k, Tensor v, float scale, Tensor? lse) -> Tensor", &fp4_quantize);
  m.def(
      "fp4_correct(Tensor(a!) workspace, Tensor q, Tensor k, bool is_causal, float scale, int first_job, int jobs) -> ()",
      &fp4_correct);
  m.def(
      "fp4_attend(Tensor(a!) workspace, Tensor q, Tensor k, Tensor? mask, bool is_causal, float scale, Tensor(b!) out,"
      " Tensor(c!)? lse) -> ()",
      &fp4_attend);
  m.def(
      "fp4_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, bool return_lse)"
      " -> (Tensor, Tensor)",
      &fp4_attention);
#endif
}
