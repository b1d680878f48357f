// All-to-all between processes over connected stream sockets, by the thread that calls: no other has to be woken on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fiited {

// What goes to one other process and what comes from it, in bytes.
struct Flow {
  int socket;
  int peer;
  const std::byte* out;
  int64_t to_send;
  std::byte* in;
  int64_t to_receive;
};

// Sends and receives all of it. Both sides must name the same operation and agree on the sizes. Throws std::runtime_error, naming the
// peer, when a connection is closed, sizes differ, or it is not done after so many seconds; connections are of no use after that.
void all_to_all(const std::vector<Flow>& flows, uint64_t operation, double timeout);

}  // namespace fiited
