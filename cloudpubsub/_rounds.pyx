# cython: language_level=3, binding=True, embedsignature=True, cdivision=True
"""Rounds without the GIL: of the publish connection whole ones, in which it frames, sends, receives and settles; of the
subscribe connection what lies between two batches, in which it sends acknowledgements, waits and receives.

Beside a busy Python thread each return to Python waits for up to the interpreter's switch interval, 5 ms.  A round needs
nothing of Python while nothing unusual happens, so many of them are done at a stretch, and what is published on an idle
link is waited for here, too; whatever is unusual ends the stretch, and the connection's own loop, which knows all cases,
goes on from the same state.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, clock_nanosleep, timespec

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE

from cloudpubsub._core cimport *
from cloudpubsub._delivery cimport Pubacks
from cloudpubsub._link cimport _Inbound
from cloudpubsub._sender cimport TAKE_MAX, Sender

cdef extern from "sys/socket.h" nogil:
    ssize_t send(int fd, const void *data, size_t size, int flags)
    ssize_t recv(int fd, void *data, size_t size, int flags)
    int setsockopt(int fd, int level, int name, const void *value, unsigned size)
    int MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from "sys/ioctl.h" nogil:
    int ioctl(int fd, unsigned long request, int *answer)
    unsigned long TIOCOUTQ

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_TCP

cdef extern from "netinet/tcp.h" nogil:
    int TCP_QUICKACK

cdef extern from "poll.h" nogil:
    ctypedef unsigned long nfds_t
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, nfds_t count, int timeout_ms)
    int POLLIN, POLLOUT

cdef extern from "time.h" nogil:
    int CLOCK_BOOTTIME

cdef enum:
    IN_BYTES = 64 * 1024  # read at once
    AHEAD_BYTES = 512 * 1024  # received before it is worked off
    RESUME_AT_ONCE = 0xFFFFFFFF
    NAPS = 4  # in a row that brought nothing


cdef struct Stretch:
    uint64_t written, received, settled  # bytes, bytes, messages
    uint32_t messages
    uint32_t resume_at  # messages in flight from which on the next are framed
    int error  # errno of the socket; asked again, it would say that all is well
    bint log_ended, is_blocked, is_over, is_called


cdef uint64_t clock_ms(int clock) noexcept nogil:
    cdef timespec now
    clock_gettime(<int>clock, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>(now.tv_nsec // 1000000)


cdef void nap(uint32_t microseconds) noexcept nogil:
    cdef timespec pause
    pause.tv_sec = 0
    pause.tv_nsec = microseconds * 1000
    clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL)


cdef void note_error(Stretch *stretch) noexcept nogil:
    if errno == EAGAIN or errno == EINTR:
        return
    if stretch.error == 0:
        stretch.error = errno
    stretch.is_over = True


cdef bint frame_and_send(Sender sender, cps_wire_source *source, int fd, Stretch *stretch) noexcept nogil:
    """Returns whether something was sent."""
    cdef cps_status status = CPS_OK
    cdef uint32_t messages = 0
    cdef uint32_t inflight = cps_window_inflight_messages(sender.window)
    cdef ssize_t n
    if sender.out_start == sender.out_end and inflight <= stretch.resume_at:
        stretch.resume_at = RESUME_AT_ONCE
        sender.out_start = sender.out_end = 0
        sender.window_full = False
        while status == CPS_OK and not sender.window_full:
            source.messages_max = 0xFFFFFFFF
            source.bytes_max = <uint64_t>-1
            source.hold_messages = 0
            status = sender.frame_batch(source, &messages, False)
        stretch.messages += messages
        stretch.log_ended = status == CPS_EMPTY
        inflight = cps_window_inflight_messages(sender.window)
        if sender.window_full and sender.much_in_flight():
            # A full window is refilled by the eighth, in one packet of the network rather than in fifty.
            stretch.resume_at = inflight - inflight // 8
        if status != CPS_OK and status != CPS_EMPTY and status != CPS_FULL:
            stretch.is_over = True  # the next `frame` says why
        sender.framed_bytes += sender.out_end
    if sender.out_start == sender.out_end:
        return False
    n = send(fd, sender.out + sender.out_start, sender.out_end - sender.out_start, MSG_DONTWAIT | MSG_NOSIGNAL)
    if n < 0:
        stretch.is_blocked = True
        note_error(stretch)
        return False
    sender.out_start += <size_t>n
    stretch.written += <uint64_t>n
    stretch.is_blocked = sender.out_start < sender.out_end
    return n > 0


cdef bint receive(Sender sender, int fd, Stretch *stretch) noexcept nogil:
    """Returns whether something came."""
    cdef uint8_t *at
    cdef size_t room
    cdef ssize_t n
    cdef cps_wire_acks acks
    cdef int yes = 1
    if cps_stream_space(sender.stream, IN_BYTES, &at, &room) != CPS_OK:
        stretch.is_over = True
        return False
    n = recv(fd, at, room, MSG_DONTWAIT)
    if n < 0:
        note_error(stretch)
        return False
    if n == 0:
        stretch.is_over = True  # the next `recv` says so too
        return False
    cps_stream_commit(sender.stream, <size_t>n)
    sender.received_bytes += <uint64_t>n
    stretch.received += <uint64_t>n
    # Brokers that leave Nagle on send the next acknowledgements only when these are acknowledged.  Where it cannot be set,
    # the socket has ended, and says so when it is read.
    setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &yes, sizeof(yes))
    if cps_wire_take_acks(sender.stream, sender.window, NULL, TAKE_MAX, &acks) != CPS_EMPTY:
        stretch.is_over = True  # anything but acknowledgements is for `take` to look at
    stretch.settled += acks.settled
    sender.tell_head()
    return True


cdef bint wait(Sender sender, pollfd *waits, uint64_t until_ms, Stretch *stretch) noexcept nogil:
    """Until the socket is ready, the log has more, or the owner is called.  Returns whether one of these came."""
    cdef uint64_t now = clock_ms(CLOCK_MONOTONIC), count = 0
    cdef int ready
    waits[0].revents = waits[1].revents = 0
    sender.at_work_ms = 0
    ready = poll(waits, 2, <int>(until_ms - now) if until_ms > now else 0)
    sender.at_work_ms = <uint32_t>clock_ms(CLOCK_MONOTONIC) | 1
    if ready > 0 and waits[1].revents != 0 and eventfd_read(waits[1].fd, &count) == 0 and count >= CPS_CALL:
        stretch.is_called = True
    return ready != 0  # where it failed, the next round is tried at once


def rounds(Sender sender not None, int fd, int wake_fd, uint32_t budget_ms, uint32_t idle_ms, uint32_t patience_us):
    """Rounds on a plain, non-blocking socket, without the GIL.

    They end about `budget_ms` milliseconds after the first byte that went or came; until one does, after `idle_ms`.  They
    end early for what is not everyday: then what there is to say is still to be had from `take` and `frame`, or, of its
    end, from the socket.  With much in flight, acknowledgements are left alone for `patience_us` microseconds at a time.
    `wake_fd`: the log's eventfd, or a duplicate of it.

    Returns (bytes written, bytes received, messages settled, bytes that the peer's TCP has not taken, errno of the socket or
    0, whether the owner was called, whether something is not everyday).  For the owner of the connection, where one stream
    is sent, nothing is held, and no acknowledgement is to be reported.
    """
    cdef Stretch stretch = [0, 0, 0, 0, RESUME_AT_ONCE, 0, False, False, False, False]
    cdef cps_wire_source source
    cdef pollfd waits[2]
    cdef uint64_t now = clock_ms(CLOCK_MONOTONIC)
    cdef uint64_t ends_ms = now + idle_ms
    cdef bint has_moved, has_news = False
    cdef unsigned idle = 0  # rounds in a row that moved nothing
    cdef int queued = 0
    sender.unsendable = None
    sender.fill(&source, now, clock_ms(CLOCK_BOOTTIME))
    waits[0].fd, waits[1].fd = fd, wake_fd
    waits[1].events = POLLIN
    sender.at_work_ms = <uint32_t>now | 1
    sender.log.enter()
    try:
        with nogil:
            while True:
                now = source.now_ms = clock_ms(CLOCK_MONOTONIC)
                source.boot_ms = clock_ms(CLOCK_BOOTTIME)
                has_moved = frame_and_send(sender, &source, fd, &stretch)
                has_moved |= receive(sender, fd, &stretch)
                if has_moved and not has_news:
                    has_news = True
                    ends_ms = now + budget_ms
                if stretch.is_over or stretch.is_called or now >= ends_ms or sender.unsendable is not None:
                    break
                if has_moved:
                    idle = 0
                    continue
                idle += 1
                if idle <= NAPS and not stretch.is_blocked and sender.much_in_flight():
                    nap(patience_us)
                    continue
                if stretch.resume_at != RESUME_AT_ONCE and idle <= NAPS + 1:
                    stretch.resume_at = RESUME_AT_ONCE  # perhaps the broker waits for more, as we do
                    continue
                if stretch.log_ended and not sender.log.c_arm():
                    stretch.log_ended = False  # there is more; framed as soon as the socket has taken the rest
                    continue
                waits[0].events = (POLLIN | POLLOUT) if stretch.is_blocked else POLLIN
                if not wait(sender, waits, ends_ms, &stretch):
                    break
            if ioctl(fd, TIOCOUTQ, &queued) != 0:
                queued = 0  # not a socket that can tell: what was written counts as taken
    finally:
        sender.log.leave()
        sender.sent_messages += stretch.messages
    return stretch.written, stretch.received, stretch.settled, queued, stretch.error, stretch.is_called, stretch.is_over


cdef struct Exchange:
    size_t written, received
    int error


cdef void receive_all(_Inbound inbound, int fd, Exchange *done) noexcept nogil:
    cdef uint8_t *at
    cdef size_t room
    cdef ssize_t n
    cdef int yes = 1
    while done.received < AHEAD_BYTES and cps_stream_space(inbound.stream, IN_BYTES, &at, &room) == CPS_OK:
        n = recv(fd, at, room, MSG_DONTWAIT)
        if n < 0 and errno != EAGAIN and errno != EINTR:
            done.error = errno
        if n <= 0:
            break  # of an end without error, the next read hears too
        cps_stream_commit(inbound.stream, <size_t>n)
        inbound.received_bytes += <uint64_t>n
        done.received += <size_t>n
        if <size_t>n < room:
            break
    if done.received > 0:  # as in `receive`
        setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &yes, sizeof(yes))


def exchange(_Inbound inbound not None, Pubacks acks not None, int fd, int wake_fd, int timeout_ms):
    """Send the acknowledgements that there are, wait for something to come, and receive it, without the GIL.

    Waits on a plain, non-blocking socket at most `timeout_ms` milliseconds, and no longer than until `wake_fd` is readable.
    Returns (bytes written, what the socket did not take, bytes received, what was read from `wake_fd`, errno of receiving
    or 0).
    """
    cdef Exchange done = [0, 0, 0]
    cdef bytearray packets = acks.take()
    cdef const char *out = PyByteArray_AS_STRING(packets)
    cdef size_t size = PyByteArray_GET_SIZE(packets)
    cdef ssize_t n
    cdef uint64_t wakes = 0
    cdef pollfd waits[2]
    waits[0].fd, waits[1].fd = fd, wake_fd
    waits[0].events = waits[1].events = POLLIN
    waits[0].revents = waits[1].revents = 0
    with nogil:
        if size > 0:
            n = send(fd, out, size, MSG_DONTWAIT | MSG_NOSIGNAL)
            if n > 0:
                done.written = <size_t>n  # of an error, who sends the rest hears again
        if poll(waits, 2, timeout_ms if done.written == size else 0) > 0:
            if waits[1].revents != 0:
                eventfd_read(wake_fd, &wakes)  # where it fails, nobody has called
            if waits[0].revents != 0:
                receive_all(inbound, fd, &done)
    return done.written, packets[done.written:], done.received, wakes, done.error
