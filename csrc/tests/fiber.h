// Fibers for the scheduler of scheduled.h: stacks that one real thread switches between. The file that includes this
// undefines _FORTIFY_SOURCE before any header: glibc's checked longjmp refuses to jump to another stack.
#pragma once
#include <cxxabi.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define ANGLE_FIBER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ANGLE_FIBER_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define ANGLE_FIBER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define ANGLE_FIBER_TSAN 1
#endif
#endif
#if defined(ANGLE_FIBER_ASAN)
#include <sanitizer/asan_interface.h>
#endif
#if defined(ANGLE_FIBER_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__USE_FORTIFY_LEVEL) && __USE_FORTIFY_LEVEL > 0
#error "undefine _FORTIFY_SOURCE before the first header"
#endif

namespace angle::testing {

// A stack with its registers. Switching costs a setjmp and a longjmp, without a system call; sanitizers must see
// every switch, so there swapcontext does it.
class Fiber {
 public:
  // The real thread's own stack.
  Fiber() {
#if defined(ANGLE_FIBER_TSAN)
    tsan_ = __tsan_get_current_fiber();
#endif
  }
  // A new stack on which enter(argument) runs at the first switch; it must not return.
  Fiber(void (*enter)(void*), void* argument) : enter_(enter), argument_(argument) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = kStack + page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<uint8_t*>(memory);
    mprotect(memory_, page, PROT_NONE);  // an overflow faults
    bottom_ = memory_ + page;
#if defined(ANGLE_FIBER_ASAN)
    __asan_unpoison_memory_region(bottom_, kStack);  // an abandoned stack may have lain here
#endif
#if defined(ANGLE_FIBER_TSAN)
    tsan_ = __tsan_create_fiber(0);
#endif
  }
  ~Fiber() {
    if (memory_ == nullptr) return;
#if defined(ANGLE_FIBER_TSAN)
    __tsan_destroy_fiber(tsan_);
#endif
    munmap(memory_, mapped_);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  static void change(Fiber& from, Fiber& to) {
    abi::__cxa_eh_globals* const exceptions = abi::__cxa_get_globals();
    std::memcpy(from.exceptions_, exceptions, sizeof from.exceptions_);
    std::memcpy(static_cast<void*>(exceptions), to.exceptions_, sizeof to.exceptions_);
#if defined(ANGLE_FIBER_ASAN)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.bottom_ == nullptr ? 0 : to.size());
    previous_ = &from;
#endif
#if defined(ANGLE_FIBER_TSAN)
    __tsan_switch_to_fiber(to.tsan_, 0);
#endif
    jump(from, to);
    arrived(from);
  }

 private:
  static constexpr size_t kStack = 256 * 1024;

  static void arrived([[maybe_unused]] Fiber& here) {
#if defined(ANGLE_FIBER_ASAN)
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(here.fake_stack_, &bottom, &bytes);
    if (previous_->bottom_ == nullptr) {  // learns where the real thread's stack lies
      previous_->bottom_ = static_cast<uint8_t*>(const_cast<void*>(bottom));
      previous_->real_size_ = bytes;
    }
#endif
  }
  static void start(unsigned high, unsigned low) {
    Fiber& here = *reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
    arrived(here);
    here.enter_(here.argument_);
    std::abort();
  }
  void prepare(ucontext_t* context) {
    getcontext(context);
    context->uc_stack.ss_sp = bottom_;
    context->uc_stack.ss_size = kStack;
    context->uc_link = nullptr;
    const uintptr_t self = reinterpret_cast<uintptr_t>(this);
    makecontext(context, reinterpret_cast<void (*)()>(start), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
  }
#if defined(ANGLE_FIBER_ASAN) || defined(ANGLE_FIBER_TSAN)
  static void jump(Fiber& from, Fiber& to) {
    if (to.memory_ != nullptr && !to.started_) {
      to.started_ = true;
      to.prepare(&to.context_);
    }
    swapcontext(&from.context_, &to.context_);
  }
  ucontext_t context_{};
#else
  static void jump(Fiber& from, Fiber& to) {
    if (_setjmp(from.registers_) != 0) return;
    if (to.memory_ == nullptr || to.started_) _longjmp(to.registers_, 1);
    to.started_ = true;
    ucontext_t context;
    to.prepare(&context);
    setcontext(&context);
  }
  jmp_buf registers_;
#endif
  size_t size() const { return memory_ == nullptr ? real_size_ : kStack; }

  void (*enter_)(void*) = nullptr;
  void* argument_ = nullptr;
  uint8_t* memory_ = nullptr;
  uint8_t* bottom_ = nullptr;
  size_t mapped_ = 0;
  size_t real_size_ = 0;
  bool started_ = false;
  // What the runtime keeps for each thread about exceptions: those being handled, and how many are under way.
  alignas(void*) unsigned char exceptions_[2 * sizeof(void*)]{};
#if defined(ANGLE_FIBER_ASAN)
  void* fake_stack_ = nullptr;
  static inline Fiber* previous_ = nullptr;
#endif
#if defined(ANGLE_FIBER_TSAN)
  void* tsan_ = nullptr;
#endif
};

}  // namespace angle::testing
