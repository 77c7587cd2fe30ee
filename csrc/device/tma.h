// Copies by the copy engine: 2-D tiles between global and shared memory, described by a TensorMap, and plain runs of bytes.
// One thread starts a copy; arriving bytes are counted by an mbarrier, leaving ones by the thread's groups. sm_90.
#pragma once

#include "device/mbarrier.h"
#include "device/simt.h"
#ifdef __CUDACC__
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

namespace device {

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

// A row-major matrix in global memory and the box of it that one copy moves. In shared memory the box's rows follow each
// other without gaps; swizzled, they are 128 bytes long, and the 16-byte pieces of row i change places by xor with i % 8.
struct Tiled {
  const void* gmem = nullptr;           // 16-byte aligned
  int64_t rows = 0, columns = 0;        // what lies outside reads as zero and is not written
  int64_t row_stride = 0;               // elements; a multiple of 16 bytes
  int box_rows = 0, box_columns = 0;    // elements, at most 256
  int element_bytes = 2;                // 2 or 4
  bool is_swizzled = true;
};

// Null, or why no map can be made.
inline const char* what_is_wrong(const Tiled& t) {
  if (t.element_bytes != 2 && t.element_bytes != 4) return "elements of 2 or 4 bytes only";
  if (reinterpret_cast<uintptr_t>(t.gmem) % 16) return "the matrix must start at a multiple of 16 bytes";
  if (t.rows < 1 || t.columns < 1) return "the matrix is empty";
  if (t.row_stride * t.element_bytes % 16) return "the row stride must be a multiple of 16 bytes";
  if (t.row_stride < t.columns) return "rows overlap";
  if (t.box_rows < 1 || t.box_rows > 256 || t.box_columns < 1 || t.box_columns > 256)
    return "a box has 1 to 256 rows and columns";
  if (t.box_columns * t.element_bytes % 16) return "a box row must be a multiple of 16 bytes";
  if (t.is_swizzled && t.box_columns * t.element_bytes != 128) return "a swizzled box has rows of 128 bytes";
  return nullptr;
}

// Fills a map on the host; it goes to the kernel inside its (__grid_constant__) parameters. Null, or what is wrong.
inline const char* make_tensor_map(TensorMap& map, const Tiled& t) {
  if (const char* wrong = what_is_wrong(t)) return wrong;
#ifdef __CUDACC__
  // By its address: linked against, the driver's library would have to be there when ours is loaded.
  static void* const encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t code =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return code == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  if (!encode) return "the driver cannot make tensor maps";
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(t.columns), static_cast<cuuint64_t>(t.rows)};
  const cuuint64_t stride_bytes[1] = {static_cast<cuuint64_t>(t.row_stride) * t.element_bytes};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(t.box_columns), static_cast<cuuint32_t>(t.box_rows)};
  const cuuint32_t every[2] = {1, 1};
  const CUresult code = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(encode)(
      &map, t.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2,
      const_cast<void*>(t.gmem), size, stride_bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      t.is_swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code == CUDA_SUCCESS ? nullptr : "the driver refuses the tensor map";
#else
  map = {static_cast<const uint8_t*>(t.gmem),
         t.rows,
         t.columns * t.element_bytes,
         t.row_stride * t.element_bytes,
         t.box_rows,
         t.box_columns * t.element_bytes,
         t.element_bytes,
         t.is_swizzled,
         {}};
  return nullptr;
#endif
}

// Fetches the map itself ahead of its first use.
LOWFAT_DEVICE void prefetch_tensor_map(const TensorMap* map) {
#ifdef LOWFAT_SM90
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  (void)map;
#endif
}

// Starts loading the box whose first element is (row, column), either of which may lie outside; its full size in bytes is
// counted by the barrier. A swizzled box goes to a multiple of 1024 bytes, another to a multiple of 128.
LOWFAT_DEVICE void tma_load(void* smem, const TensorMap* map, int row, int column, uint64_t* barrier) {
#ifndef __CUDACC__
  emulator::tma_load(smem, *map, row, column, barrier);
#elif defined(LOWFAT_SM90)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(smem)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
#else
  unreachable_here();
#endif
}

// Starts storing a box. The tile was written with ordinary stores, each writer then called fence_async_shared(), and a
// barrier followed; what lies outside the matrix is dropped.
LOWFAT_DEVICE void tma_store(const TensorMap* map, int row, int column, const void* smem) {
#ifndef __CUDACC__
  emulator::tma_store(*map, row, column, smem);
#elif defined(LOWFAT_SM90)
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(shared_address(smem))
               : "memory");
#else
  unreachable_here();
#endif
}

// Makes a group of this thread's stores since the last one.
LOWFAT_DEVICE void commit_stores() {
#ifndef __CUDACC__
  emulator::commit_stores();
#elif defined(LOWFAT_SM90)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  unreachable_here();
#endif
}

// Until all but the last kGroupsLeft groups have read shared memory: it may be written again, or the block may end.
template <int kGroupsLeft>
LOWFAT_DEVICE void wait_stores_read() {
#ifndef __CUDACC__
  emulator::wait_stores(kGroupsLeft, false);
#elif defined(LOWFAT_SM90)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroupsLeft) : "memory");
#else
  unreachable_here();
#endif
}

// Until they have also written global memory: a flag that others read may follow.
template <int kGroupsLeft>
LOWFAT_DEVICE void wait_stores_written() {
#ifndef __CUDACC__
  emulator::wait_stores(kGroupsLeft, true);
#elif defined(LOWFAT_SM90)
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#else
  unreachable_here();
#endif
}

// Starts copying a run of bytes, all three multiples of 16.
LOWFAT_DEVICE void bulk_load(void* smem, const void* gmem, int bytes, uint64_t* barrier) {
#ifndef __CUDACC__
  emulator::bulk_load(smem, gmem, bytes, barrier);
#elif defined(LOWFAT_SM90)
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(smem)),
      "l"(gmem), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#else
  unreachable_here();
#endif
}

// The same from this block's shared memory to that of a block of its cluster, and to a barrier there; both addresses are
// peer_address()'s. The source must stay until the peer has seen the bytes; ordinary writes to it need fence_async_shared().
LOWFAT_DEVICE void bulk_copy_to_peer(uint32_t peer_smem, const void* smem, int bytes, uint32_t peer_barrier) {
#ifndef __CUDACC__
  emulator::bulk_copy_to_peer(peer_smem, smem, bytes, peer_barrier);
#elif defined(LOWFAT_SM90)
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(peer_smem),
      "r"(shared_address(smem)), "r"(bytes), "r"(peer_barrier)
      : "memory");
#else
  unreachable_here();
#endif
}

}  // namespace device
