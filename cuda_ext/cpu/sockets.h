// All-to-all between processes over connected stream sockets, by the thread that calls: no other has to be woken on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace fiited {

// What goes to one other process and what comes from it, in bytes: a part whose size both know, and behind it one whose size they tell.
struct Flow {
  int socket;
  int peer;
  const std::byte* out;
  int64_t to_send;
  std::byte* in;
  int64_t to_receive;
  const std::byte* more_out = nullptr;
  int64_t more_to_send = 0;
  std::byte* more_in = nullptr;  // `place` names it,
  int64_t more_to_receive = 0;   // when this has been told
};

// Sends and receives all of it; `place()` is called once, when the sizes of all that comes are known, and finds room for it. Both sides
// must name the same operation and agree on the sizes that both know. Throws std::runtime_error, naming the peer, when a connection is
// closed, sizes differ, or it is not done after so many seconds; connections are of no use after that.
void all_to_all(std::vector<Flow>& flows, uint64_t operation, double timeout, const std::function<void()>& place);

}  // namespace fiited
