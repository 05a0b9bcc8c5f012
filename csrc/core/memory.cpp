#include "core/memory.h"

#include <sys/mman.h>

#include <new>
#include <stdexcept>
#include <utility>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <functional>
#include <memory>
#include <system_error>
#endif

namespace angle {
namespace {

// Fewer TLB misses in random reads; a refusal costs nothing but speed.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
}

}  // namespace

Memory Memory::anonymous(size_t bytes) {
  void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  advise_huge_pages(mapped, bytes);
  return Memory(mapped, bytes, -1);
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      descriptor_(std::exchange(other.descriptor_, -1)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  Memory old(std::move(*this));
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

#if defined(__linux__)

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, bytes_);
  if (descriptor_ >= 0) close(descriptor_);
}

namespace {

[[noreturn]] void fail(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

[[noreturn]] void fail_to_create(int error, const std::string& what) {
  fail(error,
       error == EEXIST ? what + " is there already; attach to it, or remove it first" : what + ": cannot make it");
}

[[noreturn]] void fail_to_open(int error, const std::string& what) {
  fail(error, error == ENOENT ? what + " does not exist" : what + ": cannot open it");
}

// A descriptor on its way into a Memory.
class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  ~Descriptor() {
    if (value_ >= 0) close(value_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return value_; }
  int release() { return std::exchange(value_, -1); }

 private:
  int value_;
};

// Runs `undo` unless told that all went well.
class Rollback {
 public:
  explicit Rollback(std::function<void()> undo) : undo_(std::move(undo)) {}
  ~Rollback() {
    if (undo_) undo_();
  }
  Rollback(const Rollback&) = delete;
  Rollback& operator=(const Rollback&) = delete;
  void dismiss() { undo_ = nullptr; }

 private:
  std::function<void()> undo_;
};

std::string object_path(const std::string& name) {
  if (name.empty() || name.size() > 200) {
    throw std::invalid_argument("the name of a shared memory has " + std::to_string(name.size()) +
                                " characters; it must have between 1 and 200");
  }
  const auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
           c == '-';
  };
  for (const char c : name) {
    if (!allowed(c)) {
      throw std::invalid_argument("the name of a shared memory is '" + name +
                                  "'; it may have letters, digits, '.', '_' and '-' only");
    }
  }
  if (name == "." || name == "..") {
    throw std::invalid_argument("the name of a shared memory is '" + name + "', which names a folder");
  }
  return "/" + name;
}

void check_path(const std::string& path) {
  if (path.empty() || path.find('\0') != std::string::npos) {
    throw std::invalid_argument("the path of a replay file is empty or holds a zero byte");
  }
}

void check_bytes(const std::string& what, size_t bytes) {
  if (bytes == 0) throw std::invalid_argument(what + " cannot have 0 bytes");
}

// What the system could still give without ending somebody; the largest number where it does not say.
uint64_t available_memory() {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen("/proc/meminfo", "re"), std::fclose);
  char line[256];
  unsigned long long kilobytes = 0;
  while (file && std::fgets(line, sizeof line, file.get()) != nullptr) {
    if (std::sscanf(line, "MemAvailable: %llu kB", &kilobytes) == 1) return kilobytes * 1024;
  }
  return ~0ull;
}

// Gives the object its size and every page of it a place.
void reserve(int descriptor, size_t bytes, const std::string& what, bool in_memory) {
  const std::string wanted = what + ": cannot reserve " + std::to_string(bytes) + " bytes";
  if (bytes > static_cast<size_t>(INT64_MAX)) fail(EFBIG, wanted);
  if (in_memory) {
    // The system would look for the pages until it ends a process, this one or another.
    const uint64_t available = available_memory();
    if (bytes > available) fail(ENOMEM, wanted + " of memory, of which " + std::to_string(available) + " are left");
  }
  int error;
  do {
    error = posix_fallocate(descriptor, 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  if (error != 0) fail(error, wanted);
}

struct stat status_of(int descriptor, const std::string& what) {
  struct stat status;
  if (fstat(descriptor, &status) != 0) fail(errno, what + ": cannot read its state");
  if (!S_ISREG(status.st_mode)) fail(EINVAL, what + " is no regular file and no shared memory");
  if (status.st_size <= 0) fail(EINVAL, what + " is empty: nothing was made there, or its creator has not finished");
  return status;
}

void* map(int descriptor, size_t bytes, const std::string& what) {
  void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (mapped == MAP_FAILED) fail(errno, what + ": cannot map " + std::to_string(bytes) + " bytes");
  return mapped;
}

// A mode of 0600 whatever the umask took away.
void keep_to_owner(int descriptor, const std::string& what) {
  if (fchmod(descriptor, S_IRUSR | S_IWUSR) != 0) fail(errno, what + ": cannot set its permissions");
}

}  // namespace

Memory Memory::shared(size_t bytes) {
  const std::string what = "shared memory";
  check_bytes(what, bytes);
  Descriptor descriptor(memfd_create("angle-replay", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (descriptor.get() < 0) fail(errno, what + ": cannot make it");
  reserve(descriptor.get(), bytes, what, true);
  // Nobody can cut it short, which would be a bus error in everybody who has it mapped.
  if (fcntl(descriptor.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    fail(errno, what + ": cannot fix its size");
  }
  void* const mapped = map(descriptor.get(), bytes, what);
  advise_huge_pages(mapped, bytes);
  return Memory(mapped, bytes, descriptor.release());
}

Memory Memory::create_named(const std::string& name, size_t bytes) {
  const std::string path = object_path(name), what = "shared memory '" + name + "'";
  check_bytes(what, bytes);
  Descriptor descriptor(shm_open(path.c_str(), O_RDWR | O_CREAT | O_EXCL, S_IRUSR | S_IWUSR));  // sets close-on-exec
  if (descriptor.get() < 0) fail_to_create(errno, what);
  Rollback rollback([&path] { shm_unlink(path.c_str()); });
  keep_to_owner(descriptor.get(), what);
  reserve(descriptor.get(), bytes, what, true);
  void* const mapped = map(descriptor.get(), bytes, what);
  advise_huge_pages(mapped, bytes);
  rollback.dismiss();
  return Memory(mapped, bytes, descriptor.release());
}

Memory Memory::open_named(const std::string& name) {
  const std::string path = object_path(name), what = "shared memory '" + name + "'";
  Descriptor descriptor(shm_open(path.c_str(), O_RDWR, 0));
  if (descriptor.get() < 0) fail_to_open(errno, what);
  const struct stat status = status_of(descriptor.get(), what);
  if (status.st_uid != geteuid()) {
    fail(EACCES, what + " belongs to user " + std::to_string(status.st_uid) + ", this process runs as user " +
                     std::to_string(geteuid()));
  }
  const auto bytes = static_cast<size_t>(status.st_size);
  void* const mapped = map(descriptor.get(), bytes, what);
  advise_huge_pages(mapped, bytes);
  return Memory(mapped, bytes, descriptor.release());
}

Memory Memory::create_file(const std::string& path, size_t bytes) {
  check_path(path);
  const std::string what = "file '" + path + "'";
  check_bytes(what, bytes);
  Descriptor descriptor(open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, S_IRUSR | S_IWUSR));
  if (descriptor.get() < 0) fail_to_create(errno, what);
  Rollback rollback([&path] { unlink(path.c_str()); });
  keep_to_owner(descriptor.get(), what);
  reserve(descriptor.get(), bytes, what, false);
  void* const mapped = map(descriptor.get(), bytes, what);
  rollback.dismiss();
  return Memory(mapped, bytes, descriptor.release());
}

Memory Memory::open_file(const std::string& path) {
  check_path(path);
  const std::string what = "file '" + path + "'";
  // Without waiting: the path may be that of a pipe or a terminal, which is then refused.
  Descriptor descriptor(open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (descriptor.get() < 0) fail_to_open(errno, what);
  const auto bytes = static_cast<size_t>(status_of(descriptor.get(), what).st_size);
  void* const mapped = map(descriptor.get(), bytes, what);
  return Memory(mapped, bytes, descriptor.release());
}

Memory Memory::from_descriptor(int value) {
  const std::string what = "descriptor " + std::to_string(value);
  Descriptor descriptor(value);
  const int flags = fcntl(value, F_GETFD);
  if (flags < 0 || fcntl(value, F_SETFD, flags | FD_CLOEXEC) != 0) fail(errno, what + " is not open");
  const auto bytes = static_cast<size_t>(status_of(value, what).st_size);
  void* const mapped = map(value, bytes, what);
  advise_huge_pages(mapped, bytes);
  return Memory(mapped, bytes, descriptor.release());
}

bool Memory::unlink_named(const std::string& name) {
  if (shm_unlink(object_path(name).c_str()) == 0) return true;
  if (errno == ENOENT) return false;
  fail(errno, "shared memory '" + name + "': cannot remove it");
}

#else

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

namespace {

[[noreturn]] void unsupported() {
  throw std::runtime_error("memory shared between processes and memory in files need Linux");
}

}  // namespace

Memory Memory::shared(size_t) { unsupported(); }
Memory Memory::create_named(const std::string&, size_t) { unsupported(); }
Memory Memory::open_named(const std::string&) { unsupported(); }
Memory Memory::create_file(const std::string&, size_t) { unsupported(); }
Memory Memory::open_file(const std::string&) { unsupported(); }
Memory Memory::from_descriptor(int) { unsupported(); }
bool Memory::unlink_named(const std::string&) { unsupported(); }

#endif

}  // namespace angle
