// The operators, for torch. The only file that includes its headers: a .cu that does takes half a minute more to compile.
//
// Nothing here decides: the callers (comfy_sage3/kernels) have checked shapes, devices and hardware. What is checked is
// what would otherwise read or write past the end of memory.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "sage3/launch.h"
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

Tensor int8_quantize(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const std::optional<Tensor>& lse) {
  const Shape shape = shape_of(q, k);
  TORCH_CHECK(k.sizes() == v.sizes(), "k and v must have one shape: ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "q, k and v must have one dtype");
  TORCH_CHECK(q.is_cuda() && q.device() == k.device() && q.device() == v.device(), "q, k and v must be on one GPU");
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor workspace = at::empty({sage3::int8::Workspace(shape).bytes}, q.options().dtype(at::kByte));
  const sage3::Int8Quantize call{shape, view_of(q), view_of(k), view_of(v), static_cast<float>(scale),
                                 workspace.data_ptr(), lse_of(lse, shape)};
  C10_CUDA_CHECK(sage3::int8_quantize(call, c10::cuda::getCurrentCUDAStream()));
  return workspace;
}

void int8_attend(const Tensor& workspace, const Tensor& q, const Tensor& k, const std::optional<Tensor>& mask,
                 bool is_causal, Tensor out, const std::optional<Tensor>& lse, const std::string& kernel) {
  const Shape shape = shape_of(q, k);
  TORCH_CHECK(workspace.is_cuda() && workspace.scalar_type() == at::kByte && workspace.is_contiguous() &&
                  workspace.numel() >= sage3::int8::Workspace(shape).bytes,
              "this workspace is not that of int8_quantize for these shapes");
  TORCH_CHECK(out.device() == workspace.device() && out.sizes() == q.sizes() && (out.stride(3) == 1 || out.size(3) == 1),
              "out must have q's shape, with dense channels");
  const c10::cuda::CUDAGuard guard(workspace.device());
  sage3::Int8Attend call{shape, workspace.data_ptr(), view_of(out), lse_of(lse, shape)};
  call.causal = is_causal;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&call.multiprocessors, cudaDevAttrMultiProcessorCount, workspace.get_device()));
  Tensor scores, tiles;  // must outlive the launch
  if (mask.has_value()) {
    TORCH_CHECK(mask->device() == workspace.device(), "mask must be on the GPU of q");
    scores = mask->expand({shape.batch, shape.heads, shape.queries, shape.keys});
    call.mask = view_of(scores);
    tiles = at::empty({sage3::MaskTileIndex(shape, call.mask).bytes}, workspace.options());
    call.mask_tiles = tiles.data_ptr<unsigned char>();
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  cudaError_t error = cudaErrorNotSupported;
#ifdef SAGE3_HAS_INT8_SM90
  call.fast = kernel == "sm90-fast";
  if (kernel == "sm90" || call.fast) error = sage3::int8_attend_sm90(call, stream);
#endif
#ifdef SAGE3_HAS_INT8_MMA
  if (kernel == "mma") error = sage3::int8_attend_mma(call, stream);
#endif
  TORCH_CHECK(error != cudaErrorNotSupported, "this library holds no kernel '", kernel, "'");
  C10_CUDA_CHECK(error);
}

std::tuple<Tensor, Tensor> int8_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const std::optional<Tensor>& mask, bool is_causal, double scale,
                                          bool return_lse, const std::string& kernel) {
  const c10::cuda::CUDAGuard guard(q.device());
  Tensor out = at::empty_like(q);
  if (out.stride(3) != 1) out = at::empty(q.sizes(), q.options());
  const Tensor lse =
      at::empty(return_lse ? at::IntArrayRef{q.size(0), q.size(1), q.size(2)} : at::IntArrayRef{0},
                q.options().dtype(at::kFloat));
  const auto wanted_lse = return_lse ? std::optional<Tensor>(lse) : std::nullopt;
  const Tensor workspace = int8_quantize(q, k, v, scale, wanted_lse);
  int8_attend(workspace, q, k, mask, is_causal, out, wanted_lse, kernel);
  return {out, lse};
}

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
}
