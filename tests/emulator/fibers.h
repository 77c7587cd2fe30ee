// Threads that take turns on one CPU thread: a stack each, and a switch from stack to stack.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__  // AddressSanitizer has to be told on which stack we are
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Keeps what the calling convention says a function must keep, on the stack it leaves.
extern "C" void emulator_switch_stack(void** left, void* entered);
asm(R"(
.pushsection .text
.weak emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.popsection
)");

namespace emulator {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;  // red zones make frames several times larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr uint64_t kStackEnd = 0x5ca1ab1e0ddba115;  // at the far end of each stack; overwritten by a kernel that needs more

// Stacks are mapped by the hundred (the number of mappings is limited), touched when used, and used again.
class Stacks {
 public:
  char* take() {
    if (free_.empty()) map_more();
    char* stack = free_.back();
    free_.pop_back();
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);  // the last user never returned from its frames
#endif
    *reinterpret_cast<uint64_t*>(stack) = kStackEnd;
    return stack;
  }
  void give_back(char* stack) { free_.push_back(stack); }

 private:
  void map_more() {
    constexpr size_t kAtOnce = 128;
    void* memory =
        mmap(nullptr, kAtOnce * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < kAtOnce; ++i) free_.push_back(static_cast<char*>(memory) + i * kStackBytes);
  }
  std::vector<char*> free_;
};

inline Stacks stacks;

// One side of a switch: a fiber, or the stack of main() that resumes them.
struct Context {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest address; of main(): known only to AddressSanitizer
  size_t stack_bytes = 0;
  void* sanitizer_state = nullptr;
};

inline void switch_context(Context& from, Context& to, bool is_last = false) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(is_last ? nullptr : &from.sanitizer_state, to.stack, to.stack_bytes);
  emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
  __sanitizer_finish_switch_fiber(from.sanitizer_state, nullptr, nullptr);
#else
  (void)is_last;
  emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
}

// What a new fiber does first: it tells where the stack of main() is.
inline void entered_from(Context& main) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &main.stack_bytes);
  main.stack = static_cast<char*>(const_cast<void*>(bottom));
#else
  (void)main;
#endif
}

inline void prepare(Context& fiber, void (*entry)()) {
  fiber.stack = stacks.take();
  fiber.stack_bytes = kStackBytes;
  auto* top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // where a caller's address would be: the entry finds the alignment it expects, and never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}

inline bool overflowed(const Context& fiber) { return *reinterpret_cast<const uint64_t*>(fiber.stack) != kStackEnd; }

}  // namespace emulator
