#include "cpu/sockets.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
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
};
constexpr auto kHeaderBytes = static_cast<int64_t>(sizeof(Header));

[[noreturn]] void fail(int peer, const std::string& what) {
  throw std::runtime_error("exchange with worker " + std::to_string(peer) + ": " + what);
}

// How far one flow has come, headers counted.
class Progress {
 public:
  Progress(const Flow& flow, uint64_t operation) : flow_(flow), outgoing_{operation, flow.to_send} {}

  int socket() const { return flow_.socket; }
  int peer() const { return flow_.peer; }
  bool sends() const { return sent_ < kHeaderBytes + flow_.to_send; }
  bool receives() const { return received_ < kHeaderBytes + flow_.to_receive; }
  short events() const { return static_cast<short>((sends() ? POLLOUT : 0) | (receives() ? POLLIN : 0)); }

  // As much as goes without waiting.
  void send() {
    while (sends()) {
      iovec parts[2];
      msghdr message{};
      fill(message, parts, &outgoing_, const_cast<std::byte*>(flow_.out), flow_.to_send, sent_);
      const ssize_t n = sendmsg(flow_.socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0 && waits()) return;
      sent_ += std::max<ssize_t>(n, 0);
    }
  }
  void receive() {
    while (receives()) {
      iovec parts[2];
      msghdr message{};
      fill(message, parts, &incoming_, flow_.in, flow_.to_receive, received_);
      const ssize_t n = recvmsg(flow_.socket, &message, MSG_DONTWAIT);
      if (n == 0) fail(flow_.peer, "connection closed by it");
      if (n < 0 && waits()) return;
      const bool had_header = received_ >= kHeaderBytes;
      received_ += std::max<ssize_t>(n, 0);
      if (!had_header && received_ >= kHeaderBytes) check_header();
    }
  }

 private:
  static void fill(msghdr& message, iovec* parts, Header* header, std::byte* data, int64_t size, int64_t done) {
    int count = 0;
    if (done < kHeaderBytes) {
      parts[count++] = {reinterpret_cast<std::byte*>(header) + done, static_cast<size_t>(kHeaderBytes - done)};
    }
    const int64_t of_data = std::max<int64_t>(0, done - kHeaderBytes);
    if (of_data < size) parts[count++] = {data + of_data, static_cast<size_t>(size - of_data)};
    message.msg_iov = parts;
    message.msg_iovlen = count;
  }

  // After a call that failed: whether to wait; false where it is to be tried again at once.
  bool waits() const {
    if (errno == EAGAIN || errno == EWOULDBLOCK) return true;
    if (errno != EINTR) fail(flow_.peer, std::system_category().message(errno));
    return false;
  }

  void check_header() const {
    if (incoming_.operation == outgoing_.operation && incoming_.bytes == flow_.to_receive) return;
    fail(flow_.peer, "it sends " + std::to_string(incoming_.bytes) + " bytes in operation " + std::to_string(incoming_.operation) +
                         ", but " + std::to_string(flow_.to_receive) + " are expected in operation " + std::to_string(outgoing_.operation));
  }

  Flow flow_;
  Header outgoing_;
  Header incoming_{};
  int64_t sent_ = 0;
  int64_t received_ = 0;
};

}  // namespace

void all_to_all(const std::vector<Flow>& flows, uint64_t operation, double timeout) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout));
  std::vector<Progress> pending;
  for (const Flow& flow : flows) pending.emplace_back(flow, operation);
  std::vector<pollfd> polled;
  for (;;) {
    for (Progress& each : pending) {
      each.send();
      each.receive();
    }
    std::erase_if(pending, [](const Progress& each) { return each.events() == 0; });
    if (pending.empty()) return;
    polled.clear();
    for (const Progress& each : pending) polled.push_back({each.socket(), each.events(), 0});
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now()).count();
    const int ready = left <= 0 ? 0 : poll(polled.data(), polled.size(), static_cast<int>(std::min<int64_t>(left, 1 << 30)));
    if (ready < 0 && errno != EINTR) fail(pending[0].peer(), std::system_category().message(errno));
    if (ready == 0 && Clock::now() >= end) {
      fail(pending[0].peer(), "not done within " + std::to_string(static_cast<int64_t>(timeout)) + " s");
    }
  }
}

}  // namespace fiited
