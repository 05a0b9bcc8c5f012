// Memory between processes: who sees whose writes, what stays behind, and what is refused.
#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/memory.h"
#include "doctest.h"

using angle::Memory;

TEST_CASE("anonymous memory is zero, moves, and is refused by bad_alloc") {
  Memory memory = Memory::anonymous(10000);
  CHECK(memory.bytes() == 10000);
  CHECK(memory.descriptor() == -1);
  CHECK(std::all_of(memory.data(), memory.data() + 10000, [](uint8_t byte) { return byte == 0; }));
  memory.data()[9999] = 7;
  uint8_t* const data = memory.data();
  Memory moved = std::move(memory);
  CHECK(moved.data() == data);
  CHECK(moved.data()[9999] == 7);
  moved = Memory::anonymous(64);
  CHECK(moved.bytes() == 64);
  CHECK(moved.data()[0] == 0);
  CHECK_THROWS_AS(Memory::anonymous(1ull << 62), std::bad_alloc);
}

#if defined(__linux__)

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <functional>
#include <iterator>
#include <system_error>

namespace {

namespace fs = std::filesystem;

std::string own_name(const char* part) { return "angle-test." + std::to_string(getpid()) + "." + part; }
std::string own_path(const char* part) { return (fs::temp_directory_path() / own_name(part)).string(); }

// Runs `body` in a child process; whether it returned true.
bool in_child(const std::function<bool()>& body) {
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    bool good = false;
    try {
      good = body();
    } catch (...) {
    }
    _exit(good ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

size_t open_descriptors() {
  return static_cast<size_t>(std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator()));
}

bool named_exists(const std::string& name) {
  const int descriptor = shm_open(("/" + name).c_str(), O_RDONLY, 0);
  if (descriptor >= 0) close(descriptor);
  return descriptor >= 0;
}

// The message and code of the system_error that `body` throws.
std::pair<std::string, int> refusal(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::system_error& error) {
    return {error.what(), error.code().value()};
  }
  return {"", 0};
}

bool says(const std::string& message, const std::string& part) { return message.find(part) != std::string::npos; }

mode_t mode_of(int descriptor) {
  struct stat status;
  REQUIRE(fstat(descriptor, &status) == 0);
  return status.st_mode & 07777;
}

bool closes_on_exec(int descriptor) { return (fcntl(descriptor, F_GETFD) & FD_CLOEXEC) != 0; }

// Every shared kind, as something that makes `bytes` of it.
struct Kind {
  const char* name;
  std::function<Memory(size_t)> make;
  std::function<bool()> left;    // whether something of it lies about
  std::function<void()> remove;  // takes that away
};

std::vector<Kind> kinds() {
  static const std::string name = own_name("kind"), path = own_path("kind");
  return {{"shared", [](size_t bytes) { return Memory::shared(bytes); }, [] { return false; }, [] {}},
          {"named", [](size_t bytes) { return Memory::create_named(name, bytes); }, [] { return named_exists(name); },
           [] { Memory::unlink_named(name); }},
          {"file", [](size_t bytes) { return Memory::create_file(path, bytes); }, [] { return fs::exists(path); },
           [] { fs::remove(path); }}};
}

}  // namespace

TEST_CASE("parent and child see each other's writes") {
  for (const Kind& kind : kinds()) {
    CAPTURE(kind.name);
    Memory memory = kind.make(1 << 20);
    CHECK(memory.bytes() == 1 << 20);
    CHECK(std::all_of(memory.data(), memory.data() + (1 << 20), [](uint8_t byte) { return byte == 0; }));
    memory.data()[5] = 1;
    CHECK(in_child([&] {
      if (memory.data()[5] != 1) return false;
      memory.data()[(1 << 20) - 1] = 9;
      return true;
    }));
    CHECK(memory.data()[(1 << 20) - 1] == 9);
    kind.remove();
  }
  // The private kind does not.
  Memory memory = Memory::anonymous(4096);
  CHECK(in_child([&] {
    memory.data()[0] = 1;
    return true;
  }));
  CHECK(memory.data()[0] == 0);
}

TEST_CASE("shared kinds are for their owner alone, close on exec and give everything back") {
  const size_t before = open_descriptors();
  for (const mode_t mask : {0000, 0022, 0777}) {
    const mode_t old = umask(mask);
    for (const Kind& kind : kinds()) {
      CAPTURE(kind.name);
      Memory memory = kind.make(4096);
      CHECK(closes_on_exec(memory.descriptor()));
      if (std::strcmp(kind.name, "shared") != 0) CHECK(mode_of(memory.descriptor()) == 0600);
      kind.remove();
    }
    umask(old);
  }
  CHECK(open_descriptors() == before);
}

TEST_CASE("another process opens a named memory; the memory outlives its name") {
  const std::string name = own_name("open");
  int ready[2];
  REQUIRE(pipe(ready) == 0);
  const pid_t child = fork();  // before there is anything to inherit
  REQUIRE(child >= 0);
  if (child == 0) {
    char byte;
    bool good = read(ready[0], &byte, 1) == 1;
    try {
      Memory memory = Memory::open_named(name);
      good = good && memory.bytes() == 5000 && memory.data()[4999] == 3 && closes_on_exec(memory.descriptor());
      memory.data()[0] = 4;
    } catch (...) {
      good = false;
    }
    _exit(good ? 0 : 1);
  }
  Memory memory = Memory::create_named(name, 5000);
  memory.data()[4999] = 3;
  REQUIRE(write(ready[1], "x", 1) == 1);
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
  CHECK(memory.data()[0] == 4);  // and its end did not take the name away
  CHECK(named_exists(name));

  Memory attached = Memory::open_named(name);
  CHECK(Memory::unlink_named(name));
  CHECK(!named_exists(name));
  CHECK(!Memory::unlink_named(name));
  attached.data()[1] = 8;
  CHECK(memory.data()[1] == 8);
  Memory again = Memory::create_named(name, 4096);  // the name is free for another memory
  CHECK(again.data()[1] == 0);
  CHECK(Memory::unlink_named(name));
  close(ready[0]);
  close(ready[1]);
}

TEST_CASE("a descriptor passed to another process is the same memory") {
  int ends[2];
  REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  char byte = 0;
  iovec content{&byte, 1};
  msghdr message{};
  message.msg_iov = &content;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    int descriptor = -1;
    bool good = recvmsg(ends[1], &message, 0) == 1 && CMSG_FIRSTHDR(&message) != nullptr;
    if (good) {
      std::memcpy(&descriptor, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof descriptor);
      try {
        Memory memory = Memory::from_descriptor(descriptor);
        good = memory.bytes() == 6000 && memory.data()[2] == 5 && closes_on_exec(descriptor);
        memory.data()[3] = 6;
      } catch (...) {
        good = false;
      }
      good = good && fcntl(descriptor, F_GETFD) == -1;  // it was the memory's own
    }
    _exit(good ? 0 : 1);
  }
  Memory memory = Memory::shared(6000);
  memory.data()[2] = 5;
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  const int descriptor = memory.descriptor();
  std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
  REQUIRE(sendmsg(ends[0], &message, 0) == 1);
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
  CHECK(memory.data()[3] == 6);
  close(ends[0]);
  close(ends[1]);
}

TEST_CASE("nobody can cut memory without a name short") {
  Memory memory = Memory::shared(8192);
  CHECK(ftruncate(memory.descriptor(), 4096) == -1);
  CHECK(ftruncate(memory.descriptor(), 16384) == -1);
  memory.data()[8191] = 1;
}

TEST_CASE("a file keeps what was written") {
  const std::string path = own_path("keep");
  {
    Memory memory = Memory::create_file(path, 3000);
    memory.data()[2999] = 42;
  }
  Memory memory = Memory::open_file(path);
  CHECK(memory.bytes() == 3000);
  CHECK(memory.data()[2999] == 42);
  CHECK(closes_on_exec(memory.descriptor()));
  CHECK(mode_of(memory.descriptor()) == 0600);
  fs::remove(path);
}

TEST_CASE("names are checked") {
  const std::string longest(200, 'a');
  for (const std::string& bad :
       {std::string(), longest + "a", std::string("a/b"), std::string("/a"), std::string("."), std::string(".."),
        std::string("a b"), std::string("\xC3\xA4"), std::string("a\0b", 3)}) {
    CAPTURE(bad);
    CHECK_THROWS_AS(Memory::create_named(bad, 4096), std::invalid_argument);
    CHECK_THROWS_AS(Memory::open_named(bad), std::invalid_argument);
    CHECK_THROWS_AS(Memory::unlink_named(bad), std::invalid_argument);
  }
  const std::string mixed = own_name("Good_1-2.3");
  const std::string filled = (mixed + longest).substr(0, 200);
  for (const std::string& good : {mixed, filled}) {
    Memory memory = Memory::create_named(good, 64);
    CHECK(Memory::unlink_named(good));
  }
  CHECK_THROWS_AS(Memory::create_file("", 64), std::invalid_argument);
  CHECK_THROWS_AS(Memory::open_file(""), std::invalid_argument);
  for (const Kind& kind : kinds()) {
    CHECK_THROWS_AS(kind.make(0), std::invalid_argument);
    CHECK(!kind.left());
  }
}

TEST_CASE("what exists is not made anew, what is missing is not opened, and the error names it") {
  const std::string name = own_name("twice"), path = own_path("twice");
  {
    Memory named = Memory::create_named(name, 4096), file = Memory::create_file(path, 4096);
    named.data()[0] = file.data()[0] = 1;
    const auto [named_text, named_code] = refusal([&] { Memory::create_named(name, 4096); });
    CHECK(says(named_text, name));
    CHECK(says(named_text, "is there already"));
    CHECK(named_code == EEXIST);
    const auto [file_text, file_code] = refusal([&] { Memory::create_file(path, 4096); });
    CHECK(says(file_text, path));
    CHECK(says(file_text, "is there already"));
    CHECK(file_code == EEXIST);
  }
  CHECK(Memory::open_named(name).data()[0] == 1);  // untouched by the refusals
  CHECK(Memory::open_file(path).data()[0] == 1);
  CHECK(Memory::unlink_named(name));
  fs::remove(path);
  const auto [named_text, named_code] = refusal([&] { Memory::open_named(name); });
  CHECK(says(named_text, "'" + name + "' does not exist"));
  CHECK(named_code == ENOENT);
  const auto [file_text, file_code] = refusal([&] { Memory::open_file(path); });
  CHECK(says(file_text, "'" + path + "' does not exist"));
  CHECK(file_code == ENOENT);
  CHECK(refusal([&] { Memory::create_file(path + "/below", 64); }).second == ENOENT);
}

TEST_CASE("only whole regular objects of this user are opened") {
  const std::string name = own_name("odd"), path = own_path("odd");
  const size_t before = open_descriptors();
  const int empty = shm_open(("/" + name).c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
  REQUIRE(empty >= 0);
  CHECK(says(refusal([&] { Memory::open_named(name); }).first, "is empty"));
  REQUIRE(ftruncate(empty, 4096) == 0);
  if (geteuid() == 0) {
    REQUIRE(fchown(empty, 12345, static_cast<gid_t>(-1)) == 0);
    const auto [text, code] = refusal([&] { Memory::open_named(name); });
    CHECK(says(text, "belongs to user 12345"));
    CHECK(code == EACCES);
  } else {
    MESSAGE("not root: foreign ownership not tried");
  }
  close(empty);
  CHECK(Memory::unlink_named(name));

  CHECK(refusal([&] { Memory::open_file(fs::temp_directory_path().string()); }).second != 0);
  CHECK(says(refusal([&] { Memory::open_file("/dev/null"); }).first, "no regular file"));
  REQUIRE(mkfifo(path.c_str(), 0600) == 0);
  CHECK(says(refusal([&] { Memory::open_file(path); }).first, "no regular file"));
  fs::remove(path);
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  CHECK(says(refusal([&] { Memory::from_descriptor(ends[0]); }).first, "no regular file"));
  CHECK(fcntl(ends[0], F_GETFD) == -1);  // taken, and closed on the way out
  close(ends[1]);
  CHECK(refusal([&] { Memory::from_descriptor(-1); }).second == EBADF);
  CHECK(open_descriptors() == before);
}

TEST_CASE("what cannot be reserved is refused and leaves nothing behind") {
  const size_t before = open_descriptors();
  for (const Kind& kind : kinds()) {
    CAPTURE(kind.name);
    // More than there is; more than a file can have.
    for (const size_t bytes : {size_t{1} << 52, size_t{1} << 63}) {
      const auto [text, code] = refusal([&] { kind.make(bytes); });
      CHECK(says(text, "cannot reserve " + std::to_string(bytes) + " bytes"));
      CHECK(code != 0);
      CHECK(!kind.left());
    }
    // The system itself refuses while reserving: a limit stands in for a full device.
    CHECK(in_child([&] {
      signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{1 << 20, 1 << 20};
      if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return false;
      const auto [text, code] = refusal([&] { kind.make(2 << 20); });
      return says(text, "cannot reserve 2097152 bytes") && code == EFBIG;
    }));
    CHECK(!kind.left());
  }
  CHECK(open_descriptors() == before);
}

TEST_CASE("a full device is refused") {
  // A file in /dev/shm beyond the size of that device: refused by the device itself, whatever memory is left.
  const std::string path = "/dev/shm/" + own_name("full");
  const fs::space_info space = fs::space("/dev/shm");
  const auto [text, code] = refusal([&] { Memory::create_file(path, space.capacity + 4096); });
  CHECK(says(text, path));
  CHECK(code == ENOSPC);
  CHECK(!fs::exists(path));
}

#else

TEST_CASE("shared memory says where it is to be had") {
  CHECK_THROWS_AS(Memory::shared(4096), std::runtime_error);
  CHECK_THROWS_AS(Memory::create_named("a", 4096), std::runtime_error);
  CHECK_THROWS_AS(Memory::open_file("a"), std::runtime_error);
}

#endif
