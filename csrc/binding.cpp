// The one binding of the CUDA kernels: LibTorch's stable ABI (2.10 and later), no CUDA header. Outputs are allocated in
// Python (moe_locality/kernels/cuda_impl.py); here pointers are taken and the launchers called on torch's stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "kernels.h"

// In libtorch_cuda. Weak: then this library also loads where torch has no CUDA, and says so when called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

void* stream_of(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "moe_locality: found a torch without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

template <typename T>
T* pointer(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), "moe_locality: expected a contiguous CUDA tensor");
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

template <typename T>
T* pointer(const Maybe& tensor) {
  return tensor.has_value() ? pointer<T>(*tensor) : nullptr;
}

int32_t dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return moe_locality::kFloat32;
    case ScalarType::Half:
      return moe_locality::kFloat16;
    case ScalarType::BFloat16:
      return moe_locality::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "moe_locality: expected float32, float16 or bfloat16");
  }
  return -1;
}

int32_t id_type_of(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "moe_locality: expected int32 or int64 ids");
  return type == ScalarType::Int ? moe_locality::kInt32 : moe_locality::kInt64;
}

void check(int code, const char* what) {
  STD_TORCH_CHECK(code == 0, "moe_locality: ", what, " failed with CUDA error ", code);
}

int32_t narrow(int64_t value) { return static_cast<int32_t>(value); }

int64_t row_map_blocks(int64_t num_tokens, int64_t top_k) {
  return moe_locality::row_map_blocks(num_tokens, narrow(top_k));
}

void row_map(Tensor ids, Tensor counts, Tensor row_route, Tensor row_token, Tensor positions, Tensor tokens_per_slot,
             Tensor slot_offsets, Tensor routed, Tensor overflow, int64_t capacity, bool fill) {
  torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  moe_locality::RowMapArgs a{};
  a.slot_ids = ids.const_data_ptr();  // of any stride
  a.id_type = id_type_of(ids);
  a.stride_token = ids.stride(0);
  a.stride_k = ids.stride(1);
  a.counts = pointer<int32_t>(counts);
  a.row_route = pointer<int32_t>(row_route);
  a.row_token = pointer<int32_t>(row_token);
  a.positions = pointer<int32_t>(positions);
  a.tokens_per_slot = pointer<int64_t>(tokens_per_slot);
  a.slot_offsets = pointer<int32_t>(slot_offsets);
  a.routed_per_slot = pointer<int32_t>(routed);
  a.overflow = pointer<int32_t>(overflow);
  a.num_tokens = ids.size(0);
  a.num_rows = row_route.size(0);
  a.top_k = narrow(ids.size(1));
  a.num_slots = narrow(tokens_per_slot.size(0));
  a.capacity = narrow(capacity);
  a.fill = fill;
  check(moe_locality::row_map(a, stream_of(ids)), "row_map");
}

void serve_visited(Tensor ids, Tensor slots, Tensor nodes, Tensor found, int64_t home_node) {
  torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Int && nodes.scalar_type() == ScalarType::Long,
                  "moe_locality: expected int32 slots and int64 nodes");
  moe_locality::ServeArgs a{};
  a.ids = ids.const_data_ptr();  // of any stride
  a.id_type = id_type_of(ids);
  a.stride_token = ids.stride(0);
  a.stride_k = ids.stride(1);
  a.slots = pointer<int32_t>(slots);
  a.nodes = pointer<int64_t>(nodes);
  a.found = pointer<void>(found);
  a.num_tokens = ids.size(0);
  a.num_experts = slots.size(0);
  a.top_k = narrow(ids.size(1));
  a.width = narrow(slots.size(1));
  a.home_node = narrow(home_node);
  check(moe_locality::serve_visited(a, stream_of(ids)), "serve_visited");
}

void gather(Tensor x, Tensor index, Tensor rows) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  check(moe_locality::gather(pointer<void>(x), pointer<void>(index), id_type_of(index), pointer<void>(rows),
                             rows.size(0), row_bytes, stream_of(x)),
        "gather");
}

void permute(Tensor x, Tensor positions, Tensor row_token, Maybe slot_offsets, Tensor rows) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  moe_locality::PermuteArgs a{};
  a.x = pointer<void>(x);
  a.positions = pointer<int32_t>(positions);
  a.row_token = pointer<int32_t>(row_token);
  a.slot_offsets = pointer<int32_t>(slot_offsets);
  a.rows = pointer<void>(rows);
  a.num_tokens = x.size(0);
  a.row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  a.top_k = narrow(positions.size(1));
  a.num_slots = slot_offsets.has_value() ? narrow(slot_offsets->size(0)) - 1 : 0;
  check(moe_locality::permute(a, stream_of(x)), "permute");
}

void combine(Tensor rows, Tensor positions, Maybe weights, Tensor out) {
  torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  moe_locality::CombineArgs a{};
  a.rows = pointer<void>(rows);
  a.positions = pointer<int32_t>(positions);
  a.weights = pointer<float>(weights);
  a.out = pointer<void>(out);
  a.num_tokens = positions.size(0);
  a.width = rows.size(1);
  a.top_k = narrow(positions.size(1));
  a.dtype = dtype_of(rows);
  check(moe_locality::combine(a, stream_of(rows)), "combine");
}

void combine_backward(Tensor grad, Maybe rows, Tensor positions, Tensor row_token, Maybe slot_offsets, Tensor weights,
                      Maybe grad_rows, Maybe grad_weights) {
  torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  moe_locality::CombineBackwardArgs a{};
  a.grad = pointer<void>(grad);
  a.rows = pointer<void>(rows);
  a.positions = pointer<int32_t>(positions);
  a.row_token = pointer<int32_t>(row_token);
  a.slot_offsets = pointer<int32_t>(slot_offsets);
  a.weights = pointer<float>(weights);
  a.grad_rows = pointer<void>(grad_rows);
  a.grad_weights = pointer<float>(grad_weights);
  a.num_tokens = positions.size(0);
  a.width = grad.size(1);
  a.top_k = narrow(positions.size(1));
  a.num_slots = slot_offsets.has_value() ? narrow(slot_offsets->size(0)) - 1 : 0;
  a.dtype = dtype_of(grad);
  check(moe_locality::combine_backward(a, stream_of(grad)), "combine_backward");
}

moe_locality::RowFormat row_format(int64_t mantissa_bits, int64_t block, int64_t scale_rule, bool mbs, int64_t code_bytes,
                                   int64_t scale_start, int64_t row_bytes) {
  moe_locality::RowFormat f{};
  f.mantissa_bits = narrow(mantissa_bits);
  f.block = narrow(block);
  f.scale_rule = narrow(scale_rule);
  f.mbs = mbs;
  f.code_bytes = narrow(code_bytes);
  f.scale_start = narrow(scale_start);
  f.row_bytes = narrow(row_bytes);
  return f;
}

void encode(Tensor x, Maybe positions, Maybe row_token, Tensor rows, int64_t mantissa_bits, int64_t block,
            int64_t scale_rule, bool mbs, int64_t code_bytes, int64_t scale_start) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  moe_locality::EncodeArgs a{};
  a.x = x.const_data_ptr();  // rows may lie apart
  a.positions = pointer<int32_t>(positions);
  a.row_token = pointer<int32_t>(row_token);
  a.rows = pointer<uint8_t>(rows);
  a.x_stride = x.stride(0);
  a.num_tokens = positions.has_value() && positions->numel() == 0 ? 0 : x.size(0);  // no token has a row
  a.num_rows = rows.size(0);
  a.width = x.size(1);
  a.top_k = positions.has_value() ? narrow(positions->size(1)) : 1;
  a.dtype = dtype_of(x);
  a.format = row_format(mantissa_bits, block, scale_rule, mbs, code_bytes, scale_start, rows.size(1));
  check(moe_locality::encode(a, stream_of(x)), "encode");
}

void decode(Tensor rows, Maybe index, Tensor out, int64_t mantissa_bits, int64_t block, int64_t scale_rule, bool mbs,
            int64_t code_bytes, int64_t scale_start) {
  torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  moe_locality::DecodeArgs a{};
  a.rows = pointer<uint8_t>(rows);
  a.index = pointer<int32_t>(index);
  a.out = pointer<void>(out);
  a.num_rows = out.size(0);
  a.width = out.size(1);
  a.dtype = dtype_of(out);
  a.format = row_format(mantissa_bits, block, scale_rule, mbs, code_bytes, scale_start, rows.size(1));
  check(moe_locality::decode(a, stream_of(rows)), "decode");
}

}  // namespace

STABLE_TORCH_LIBRARY(moe_locality_cuda, m) {
  m.def("row_map_blocks(int num_tokens, int top_k) -> int");
  m.def(
      "row_map(Tensor ids, Tensor(a!) counts, Tensor(b!) row_route, Tensor(c!) row_token, Tensor(d!) positions, "
      "Tensor(e!) tokens_per_slot, Tensor(f!) slot_offsets, Tensor(g!) routed, Tensor(h!) overflow, int capacity, "
      "bool fill) -> ()");
  m.def("serve_visited(Tensor ids, Tensor slots, Tensor nodes, Tensor(a!) found, int home_node) -> ()");
  m.def("gather(Tensor x, Tensor index, Tensor(a!) rows) -> ()");
  m.def("permute(Tensor x, Tensor positions, Tensor row_token, Tensor? slot_offsets, Tensor(a!) rows) -> ()");
  m.def("combine(Tensor rows, Tensor positions, Tensor? weights, Tensor(a!) out) -> ()");
  m.def(
      "combine_backward(Tensor grad, Tensor? rows, Tensor positions, Tensor row_token, Tensor? slot_offsets, "
      "Tensor weights, Tensor(a!)? grad_rows, Tensor(b!)? grad_weights) -> ()");
  m.def(
      "encode(Tensor x, Tensor? positions, Tensor? row_token, Tensor(a!) rows, int mantissa_bits, int block, "
      "int scale_rule, bool mbs, int code_bytes, int scale_start) -> ()");
  m.def(
      "decode(Tensor rows, Tensor? index, Tensor(a!) out, int mantissa_bits, int block, int scale_rule, bool mbs, "
      "int code_bytes, int scale_start) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moe_locality_cuda, CompositeExplicitAutograd, m) {
  m.impl("row_map_blocks", TORCH_BOX(&row_map_blocks));
}

STABLE_TORCH_LIBRARY_IMPL(moe_locality_cuda, CUDA, m) {
  m.impl("row_map", TORCH_BOX(&row_map));
  m.impl("serve_visited", TORCH_BOX(&serve_visited));
  m.impl("gather", TORCH_BOX(&gather));
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("decode", TORCH_BOX(&decode));
}
