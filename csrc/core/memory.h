// The memory under a segment: private to this process, or shared with others on the same machine.
//
// A descriptor is closed on exec. Whatever is made here is reserved in full before it is mapped, so that a full device
// is an error at creation and no bus error later. Shared kinds need Linux; elsewhere they throw std::runtime_error.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace angle {

// Owns zeroed memory on whole pages, or the bytes that somebody else put there; unmapped, and its descriptor closed, on
// destruction, which leaves names and files where they are. Any thread may call any of the functions below.
//
// Errors of the shared kinds: std::invalid_argument for a bad name or 0 bytes, std::system_error (with errno as its
// code) where the system refuses; both name the object, and nothing half-made is left behind.
class Memory {
 public:
  // Private: after a fork, parent and child each see their own writes only. O(1), pages come when they are touched.
  // Throws std::bad_alloc when the system refuses.
  static Memory anonymous(size_t bytes);

  // Without a name: reached by forked children and by whoever receives the descriptor. Its size can never change.
  // O(bytes).
  static Memory shared(size_t bytes);

  // Under a name, for this user only (0600), until unlink_named. A name has 1 to 200 letters, digits, '.', '_' or '-'
  // and is not "." or "..". An existing object is an error. O(bytes).
  static Memory create_named(const std::string& name, size_t bytes);

  // The whole of an object that this user created under the name. O(1).
  static Memory open_named(const std::string& name);

  // A file, for this user only (0600). An existing one is an error. Writes reach the disk when the system sees fit.
  // O(bytes), or O(1) where the file system can reserve blocks without writing them.
  static Memory create_file(const std::string& path, size_t bytes);

  // The whole of an existing regular file. O(1).
  static Memory open_file(const std::string& path);

  // The whole of what a descriptor stands for, which must be open for reading and writing. Closes `descriptor` in the
  // end, also when it throws. O(1).
  static Memory from_descriptor(int descriptor);

  // Takes the name away; who has it mapped keeps the memory. false: there was no such name. O(1).
  static bool unlink_named(const std::string& name);

  ~Memory();
  Memory(Memory&& other) noexcept;  // leaves `other` without memory
  Memory& operator=(Memory&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // To hand to another process; -1: the memory is private.
  int descriptor() const { return descriptor_; }

 private:
  Memory(void* data, size_t bytes, int descriptor)
      : data_(static_cast<uint8_t*>(data)), bytes_(bytes), descriptor_(descriptor) {}

  uint8_t* data_;
  size_t bytes_;
  int descriptor_;
};

}  // namespace angle
