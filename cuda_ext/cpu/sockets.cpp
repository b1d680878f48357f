#include "cpu/sockets.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>

namespace fiited {

namespace {

struct Header {
  uint64_t operation;
  int64_t bytes;
  int64_t more;
};
constexpr auto kHeaderBytes = static_cast<int64_t>(sizeof(Header));

[[noreturn]] void fail(int peer, const std::string& what) {
  throw std::runtime_error("exchange with worker " + std::to_string(peer) + ": " + what);
}

// How far one flow has come, headers counted.
class Progress {
 public:
  Progress(Flow& flow, uint64_t operation) : flow_(flow), outgoing_{operation, flow.to_send, flow.more_to_send} {}

  int socket() const { return flow_.socket; }
  int peer() const { return flow_.peer; }
  bool knows_sizes() const { return received_ >= kHeaderBytes; }
  void place() { placed_ = true; }
  short events() const { return static_cast<short>((sends() ? POLLOUT : 0) | (receives() ? POLLIN : 0)); }

  // As much as goes without waiting.
  void send() {
    while (sends()) {
      msghdr message{};
      const Parts parts{{{&outgoing_, kHeaderBytes},
                         {const_cast<std::byte*>(flow_.out), flow_.to_send},
                         {const_cast<std::byte*>(flow_.more_out), flow_.more_to_send}}};
      iovec rest[3];
      fill(message, rest, parts, sent_);
      const ssize_t n = sendmsg(flow_.socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0 && waits()) return;
      sent_ += std::max<ssize_t>(n, 0);
    }
  }
  void receive() {
    while (receives()) {
      msghdr message{};
      const Parts parts{{{&incoming_, kHeaderBytes}, {flow_.in, flow_.to_receive}, {flow_.more_in, placed_ ? flow_.more_to_receive : 0}}};
      iovec rest[3];
      fill(message, rest, parts, received_);
      const ssize_t n = recvmsg(flow_.socket, &message, MSG_DONTWAIT);
      if (n == 0) fail(flow_.peer, "connection closed by it");
      if (n < 0 && waits()) return;
      const bool knew_sizes = knows_sizes();
      received_ += std::max<ssize_t>(n, 0);
      if (!knew_sizes && knows_sizes()) check_header();
    }
  }

 private:
  struct Part {
    void* at;
    int64_t bytes;
  };
  using Parts = std::array<Part, 3>;

  bool sends() const { return sent_ < kHeaderBytes + flow_.to_send + flow_.more_to_send; }
  bool receives() const { return received_ < kHeaderBytes + flow_.to_receive + (placed_ ? flow_.more_to_receive : 0); }

  // What is left of the parts when so many bytes are done.
  static void fill(msghdr& message, iovec* rest, const Parts& parts, int64_t done) {
    message.msg_iov = rest;
    for (const Part& part : parts) {
      if (done < part.bytes) {
        const int64_t of_part = std::max<int64_t>(0, done);
        rest[message.msg_iovlen++] = {static_cast<std::byte*>(part.at) + of_part, static_cast<size_t>(part.bytes - of_part)};
      }
      done -= part.bytes;
    }
  }

  // After a call that failed: whether to wait; false where it is to be tried again at once.
  bool waits() const {
    if (errno == EAGAIN || errno == EWOULDBLOCK) return true;
    if (errno != EINTR) fail(flow_.peer, std::system_category().message(errno));
    return false;
  }

  void check_header() {
    if (incoming_.operation != outgoing_.operation || incoming_.bytes != flow_.to_receive || incoming_.more < 0) {
      fail(flow_.peer, "it sends " + std::to_string(incoming_.bytes) + " bytes in operation " + std::to_string(incoming_.operation) +
                           ", but " + std::to_string(flow_.to_receive) + " are expected in operation " +
                           std::to_string(outgoing_.operation));
    }
    flow_.more_to_receive = incoming_.more;
  }

  Flow& flow_;
  Header outgoing_;
  Header incoming_{};
  int64_t sent_ = 0;
  int64_t received_ = 0;
  bool placed_ = false;
};

}  // namespace

void all_to_all(std::vector<Flow>& flows, uint64_t operation, double timeout, const std::function<void()>& place) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout));
  std::vector<Progress> all;
  for (Flow& flow : flows) all.emplace_back(flow, operation);
  std::vector<pollfd> polled;
  for (bool placed = false;;) {
    for (Progress& each : all) {
      each.send();
      each.receive();
    }
    if (!placed && std::all_of(all.begin(), all.end(), [](const Progress& each) { return each.knows_sizes(); })) {
      placed = true;
      place();
      for (Progress& each : all) {
        each.place();
        each.receive();
      }
    }
    polled.clear();
    int waiting_for = -1;
    for (const Progress& each : all) {
      if (each.events() == 0) continue;
      if (polled.empty()) waiting_for = each.peer();
      polled.push_back({each.socket(), each.events(), 0});
    }
    if (polled.empty()) return;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now()).count();
    const int ready = left <= 0 ? 0 : poll(polled.data(), polled.size(), static_cast<int>(std::min<int64_t>(left, 1 << 30)));
    if (ready < 0 && errno != EINTR) fail(waiting_for, std::system_category().message(errno));
    if (ready == 0 && Clock::now() >= end) fail(waiting_for, "not done within " + std::to_string(static_cast<int64_t>(timeout)) + " s");
  }
}

}  // namespace fiited
