# cython: language_level=3, binding=True, embedsignature=True
"""`Sender`: the log's way onto the wire of the publish connection, and the acknowledgements' way back.

It stands between log and socket: packets are framed natively from the log into one buffer, and Python touches no message on
the way.  It belongs to one thread, the owner of the connection.  Its fields are in `_sender.pxd`.
"""

cimport cython
from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

from cloudpubsub._core cimport *
from cloudpubsub._link cimport _Inbound, reason_string
from cloudpubsub._spool cimport Log, check_status, message_at

cdef enum:
    OUT_BYTES = 128 * 1024
    READ_BYTES = 128 * 1024
    SWEEP_BYTES = 4096  # of the disk, to look for what has expired,
    SWEEPS = 256  # so often at once
    MUCH_MESSAGES = 2000  # in flight
    MUCH_BYTES = 512 * 1024
    WINDOW_MIN = 32  # entries: what is held takes a place too, however few may be in flight
    ENDINGS = 16  # CPS_WINDOW_ENDINGS
    # Two streams:
    TURN = 16  # messages of the backlog for which it waits to have earned them
    TURN_BYTES = 16 * 1024  # of the backlog that are framed before live data is looked for again
    LIVE_FIRST = 100  # per cent
    BOTH = 0  # what is sent
    BACKLOG = 1
    LIVE = 2

ANY_BYTES = (1 << 64) - 1


cdef inline cps_loss loss_of(const cps_ending *ending) noexcept nogil:
    cdef cps_loss loss
    loss.first = ending.first
    loss.end = ending.end
    loss.messages = ending.messages
    loss.bytes = ending.bytes
    loss.reason = CPS_REASON_DEAD if ending.fate == CPS_FATE_DEAD else CPS_REASON_EXPIRED
    return loss


cdef class Sender(_Inbound):
    """Publish connection: batches of the log framed for the socket, acknowledgements taken back into the log.

    Args:
        log: The log; this object is its reader.
        max_inflight: Messages on the wire without acknowledgement.
        max_inflight_bytes: Bytes of their packets.
        packet_max: Largest packet that the broker may send.
        level: Protocol level, 4 or 5.
        id_prefix: What each message's id begins with.
        carry_ids: Level 5: each packet carries its id as a user property.
        live_share: Per cent of the messages that the live stream has at least, while it and a backlog have something to
            send; 100: the backlog has what is left.  0: there is one stream, in order.
        hook: Called for each message that is framed, with the message, its end in the log and that of the one before;
            the payload that it returns is sent.  None: payloads are sent as they are, and no message becomes a Python object.
    """

    def __cinit__(self, *args, **kwargs):
        self.window = NULL
        self.out = NULL
        self.at_work_ms = 1

    def __init__(self, Log log not None, uint32_t max_inflight, uint64_t max_inflight_bytes, uint32_t packet_max=65536,
                 int level=CPS_WIRE_LEVEL_311, bytes id_prefix=b"", bint carry_ids=False, hook=None, uint32_t live_share=0):
        if len(id_prefix) > CPS_WIRE_ID_PREFIX_MAX:
            raise ValueError("id_prefix: too long")
        self.log = log
        self.id_prefix = id_prefix
        self.carry_ids = carry_ids
        self.hook = hook
        self.hooked = hook is not None
        self.max_inflight = max_inflight
        self.max_inflight_bytes = max_inflight_bytes
        self.live_share = min(live_share, <uint32_t>LIVE_FIRST)
        self.out_size = OUT_BYTES
        self.out = <uint8_t *>malloc(self.out_size)
        if self.out == NULL:
            raise MemoryError("no memory for the output buffer")
        check_status(cps_window_open(max(max_inflight, <uint32_t>WINDOW_MIN), max_inflight_bytes, &self.window))
        self.open_stream(packet_max, level)
        self.broker()

    def __dealloc__(self):
        cps_window_close(self.window)
        free(self.out)

    def restart(self):
        """A new connection begins: nothing is in flight, sending starts at the oldest unsettled message."""
        self.again()
        self.broker()
        self.restart_stream()
        self.out_start = self.out_end = 0
        self.framed_bytes = 0

    def again(self):
        """On this connection, where nothing is in flight, sending starts again at the oldest unsettled message."""
        self.log.enter()
        try:
            with nogil:
                self.tell_head()
        finally:
            self.log.leave()
        cps_window_restart(self.window)
        self.told_head = 0
        self.to_hold = 0
        self.window_full = False
        self.unsendable = None
        self.refusals = []
        self.log.rewind()
        self.begin_streams()

    def split(self, uint64_t age_ms, bint may_begin=True):
        """The connection is up and nothing has been framed: what is published from now on need not wait for a backlog.

        That is what is `age_ms` old, or more than fits in the window.  Without `may_begin` it is not looked for.  Returns
        whether there is one that has to be sent in order all the same, because there are too many already.
        """
        cdef cps_split split
        if self.live_share == 0:
            return False
        self.log.enter()
        try:
            with nogil:
                split = self.log.c_split(age_ms, self.max_inflight_bytes, may_begin)
        finally:
            self.log.leave()
        self.begin_streams()
        return split == CPS_SPLIT_FULL

    cdef int begin_streams(self) except -1:
        """Nothing is in the window: take over how many streams the log has, and where they stand."""
        cdef cps_fronts fronts
        self.log.check()
        self.log.c_fronts(&fronts)
        self.after[0] = self.read_end[0] = fronts.head
        if self.is_split and not self.log.c_is_split():
            cps_window_restart(self.window)  # which still has two heads
        self.is_split = self.log.c_is_split()
        self.backlog_empty = False
        if self.is_split:
            self.after[1] = self.read_end[1] = fronts.live_end
            self.live_first = fronts.live_first
            self.told_live_head = self.told_live_messages = self.told_live_bytes = 0
            self.credit = 0
            cps_window_forget(self.window, fronts.live_first, fronts.live_end)
            cps_window_split(self.window, fronts.live_first)
        return 0

    cdef bint join_if_over(self) noexcept nogil:
        """The log has one stream again: so has the window.  Returns whether that is new."""
        if not self.is_split or self.log.c_is_split():
            return False
        cps_window_join(self.window)
        self.is_split = False
        self.after[0] = self.after[1]
        self.read_end[0] = self.read_end[1]
        self.told_head = self.told_live_head
        return True

    def focus(self, position, bint to_hold=False):
        """Send only the stream in which the message at `position` stands; None: both, where there are two.

        With `to_hold` only until what `hold` asked for is held, or nothing is left of it; then any other may be sent.
        """
        self.only = BOTH
        self.only_to_hold = to_hold
        if position is not None and self.is_split:
            self.only = LIVE if <uint64_t>position >= self.live_first else BACKLOG

    cdef int stream_now(self) noexcept nogil:
        return BOTH if self.only_to_hold and self.to_hold == 0 else self.only

    def front(self, uint64_t position):
        """Of the stream in which `position` lies: (up to there everything is settled, up to there it was read)."""
        cdef cps_fronts fronts
        self.log.check()
        self.log.c_fronts(&fronts)
        if position >= fronts.live_first:
            return fronts.live_end, fronts.live_sent
        return fronts.head, fronts.sent

    def arm(self):
        """True: there is nothing to frame, and the log's `wake_fd` becomes readable with the next message."""
        if not self.is_split:
            return self.log.arm()
        if self.stream_now() == BACKLOG:
            return self.backlog_empty  # only an acknowledgement, or a loss, can bring more
        return self.log.arm_live(self.stream_now() == BOTH)

    def broker(self, uint32_t receive_maximum=65535, uint32_t packet_max=CPS_WIRE_PACKET_MAX, uint16_t alias_max=0,
               bint retain_available=True):
        """What the broker said in its CONNACK."""
        cps_window_limit(self.window, min(self.max_inflight, receive_maximum), self.max_inflight_bytes)
        self.broker_packet_max = packet_max
        self.no_retain = not retain_available
        cps_wire_aliases_reset(&self.aliases, alias_max)

    def hold(self, uint32_t messages):
        """The next so many messages are held back until `again` or `restart`."""
        self.to_hold = messages

    def limit(self, uint32_t messages):
        """No more than so many messages in flight from now on."""
        cps_window_limit(self.window, messages, self.max_inflight_bytes)

    def frame(self, uint64_t now_ms, uint64_t boot_ms, uint32_t messages_max=0xFFFFFFFF, uint64_t bytes_max=ANY_BYTES):
        """Fill the output buffer, if it is empty, with the packets that log, window and limits allow.

        `boot_ms` is CLOCK_BOOTTIME, by which messages expire.  Returns how many messages were framed.  OSError
        (SpoolError) if the disk cannot be read.
        """
        cdef cps_wire_source source
        cdef uint32_t messages = 0
        cdef cps_status status = CPS_OK
        if self.out_start < self.out_end:
            return 0
        self.unsendable = None
        self.fill(&source, now_ms, boot_ms)
        self.out_start = self.out_end = 0
        self.window_full = False
        self.log.enter()
        try:
            with nogil:
                while messages < messages_max and status == CPS_OK and not self.window_full and self.out_end < bytes_max:
                    source.messages_max = messages_max - messages
                    source.bytes_max = bytes_max - self.out_end
                    source.hold_messages = self.to_hold
                    if self.is_split:
                        status = self.frame_turn(&source, &messages)
                    else:
                        status = self.frame_batch(&source, &messages, False)
        finally:
            self.log.leave()
        if status != CPS_OK and status != CPS_EMPTY and status != CPS_FULL:
            check_status(status)
        self.sent_messages += messages
        self.framed_bytes += self.out_end
        return messages

    cdef int fill(self, cps_wire_source *source, uint64_t now_ms, uint64_t boot_ms) except -1:
        """What is the same for all that is framed at one time."""
        memset(source, 0, sizeof(source[0]))
        source.now_ms = now_ms
        source.boot_ms = boot_ms
        source.level = <uint8_t>self.level
        source.packet_bytes_max = self.broker_packet_max
        source.no_retain = self.no_retain
        source.aliases = &self.aliases
        if self.carry_ids:
            source.id_prefix = <const uint8_t *>PyBytes_AS_STRING(self.id_prefix)
            source.id_prefix_bytes = <uint16_t>len(self.id_prefix)
        return 0

    @cython.cdivision(True)
    cdef cps_status frame_turn(self, cps_wire_source *source, uint32_t *messages) noexcept nogil:
        """A run of records of one of two streams, whose turn it is."""
        cdef cps_status status = CPS_EMPTY
        cdef uint32_t room = source.messages_max, before = messages[0]
        # What the live stream sends earns the backlog its share, by the hundredth of a message.
        cdef int only = self.stream_now()
        cdef bint shares = self.live_share < LIVE_FIRST and only == BOTH
        cdef bint has_earned = shares and self.credit >= TURN * self.live_share
        if only != BACKLOG and not has_earned:
            if shares:
                source.messages_max = min(room, 1 + (TURN * self.live_share - self.credit) // (LIVE_FIRST - self.live_share))
            cps_window_turn(self.window, True)
            status = self.frame_batch(source, messages, True)
            if shares:
                self.credit += (messages[0] - before) * (LIVE_FIRST - self.live_share)
            if status == CPS_EMPTY and self.only_to_hold:
                self.only = BOTH
        if status == CPS_EMPTY and self.stream_now() != LIVE:
            source.messages_max = room
            source.hold_messages = self.to_hold
            if has_earned:
                source.messages_max = min(room, self.credit // self.live_share)
            source.bytes_max = min(source.bytes_max, <uint64_t>TURN_BYTES)
            before = messages[0]
            cps_window_turn(self.window, False)
            status = self.frame_batch(source, messages, False)
            self.backlog_empty = status == CPS_EMPTY
            if self.backlog_empty and self.only_to_hold:
                self.only = BOTH
            if self.backlog_empty and (has_earned or self.stream_now() != only):
                self.credit = 0
                status = CPS_OK  # the live stream's turn
            elif has_earned:
                self.credit -= (messages[0] - before) * self.live_share
            elif status == CPS_OK and messages[0] > before:
                status = CPS_FULL  # live data may have come
        if status == CPS_FULL and self.stop == CPS_WIRE_LIMIT and source.messages_max < room:
            status = CPS_OK  # only the turn is over
        if self.join_if_over() and status == CPS_EMPTY:
            status = CPS_OK
        return status

    cdef cps_status frame_batch(self, cps_wire_source *source, uint32_t *messages, bint live) noexcept nogil:
        """One run of records.  CPS_EMPTY: the log ends here; CPS_FULL: the buffer is, or a message is held for good."""
        cdef cps_batch batch
        cdef cps_wire_framed framed
        cdef uint8_t *grown
        cdef cps_status status
        if live:
            status = self.log.c_read_live(READ_BYTES, &batch)
        else:
            status = self.log.c_read(TURN_BYTES if self.is_split else READ_BYTES, &batch)
        if status != CPS_OK:
            return status
        if batch.position != self.read_end[live]:
            self.after[live] = batch.position  # a hole: what was there was dropped
        if batch.size == 0:  # lost on the disk, and counted
            status = cps_window_pass(self.window, batch.position, batch.lost_end)
            self.log.c_read_done(batch.lost_end - batch.position if status == CPS_OK else 0)
            if status == CPS_OK:
                self.after[live] = self.read_end[live] = batch.lost_end
            self.window_full = status != CPS_OK
            self.tell_head()
            return status
        source.bytes = batch.bytes
        source.size_bytes = batch.size
        source.position = batch.position
        source.earlier_boot = batch.earlier_boot
        source.dup_below = batch.dup_below
        source.after = &self.after[live]
        if self.hooked:
            with gil:
                status = self.frame_hooked(source, &framed)
        else:
            status = cps_wire_frame(source, self.window, self.out + self.out_end, self.out_size - self.out_end, &framed)
        self.log.c_read_done(framed.consumed_bytes)
        self.read_end[live] = batch.position + framed.consumed_bytes
        self.stop = framed.stop
        self.out_end += framed.produced_bytes
        messages[0] += framed.messages
        self.to_hold -= min(self.to_hold, framed.held)
        self.resent += framed.resent
        if framed.skipped:
            self.tell_head()
        if status != CPS_OK:
            return status
        if framed.stop == CPS_WIRE_WINDOW_FULL:
            self.window_full = True
        if framed.stop == CPS_WIRE_LIMIT:
            return CPS_FULL
        if framed.stop == CPS_WIRE_HELD:
            with gil:
                self.unsendable = (framed.unsendable_position,
                                   "too large" if framed.unsendable == CPS_WIRE_OVERSIZE else "retained")
            return CPS_FULL
        if framed.stop == CPS_WIRE_OUTPUT_FULL:
            if self.out_end > 0:
                return CPS_FULL
            grown = <uint8_t *>realloc(self.out, framed.packet_bytes)
            if grown == NULL:
                return CPS_NO_MEMORY
            self.out = grown
            self.out_size = framed.packet_bytes
        return CPS_OK

    cdef cps_status frame_hooked(self, cps_wire_source *source, cps_wire_framed *framed) noexcept:
        """As cps_wire_frame, with the payloads that the hook makes."""
        cdef cps_record record
        cdef cps_wire_record one
        cdef cps_status status
        cdef bytes payload
        cdef uint64_t position, span
        memset(framed, 0, sizeof(framed[0]))
        while framed.consumed_bytes < source.size_bytes:
            position = source.position + framed.consumed_bytes
            one.at = source.bytes + framed.consumed_bytes
            status = cps_record_load(one.at, source.size_bytes - framed.consumed_bytes, position, &record)
            if status == CPS_OK:
                status = cps_record_load_extras(one.at, &record)
            if status != CPS_OK:
                framed.stop = CPS_WIRE_REFUSED
                return status
            span = cps_record_span(record.length_bytes)
            if not record.is_pad:
                message = message_at(one.at, &record)
                try:
                    payload = self.hook(message, position + span, source.after[0])
                except BaseException:  # the hook's owner counts and logs; the message goes as it is
                    payload = message.payload
                one.record = &record
                one.payload = <const uint8_t *>PyBytes_AS_STRING(payload)
                one.payload_bytes = <uint32_t>len(payload)
                status = cps_wire_frame_one(source, &one, self.window, self.out + self.out_end + framed.produced_bytes,
                                            self.out_size - self.out_end - framed.produced_bytes, framed)
                if status == CPS_FULL:
                    return CPS_OK
                if status != CPS_OK:
                    framed.stop = CPS_WIRE_REFUSED
                    return status
                source.after[0] = position + span
            framed.consumed_bytes += span
            if framed.unsendable != CPS_WIRE_SENDABLE:
                framed.stop = CPS_WIRE_HELD
                return CPS_OK
        framed.stop = CPS_WIRE_SPAN_END
        return CPS_OK

    def expire(self, uint64_t boot_ms):
        """Settle what has expired at the front of the log, while nothing is in flight.  Returns how many messages.

        Stops after a while, so that nobody has to wait for it: as long as it returns some, there may be more.
        """
        cdef uint64_t total = 0
        cdef int left = SWEEPS
        self.log.enter()
        try:
            with nogil:
                while left > 0 and self.expire_batch(boot_ms, &total):
                    left -= 1
            self.log.rewind()  # a file that was looked at can be dropped again
            self.join_if_over()
        finally:
            self.log.leave()
        return total

    cdef bint expire_batch(self, uint64_t boot_ms, uint64_t *total) noexcept nogil:
        """One run of records.  False: the front of the log has not expired."""
        cdef cps_batch batch
        cdef cps_record record
        cdef cps_loss loss
        cdef cps_fate fate
        cdef size_t at = 0
        if self.log.c_read(SWEEP_BYTES, &batch) != CPS_OK:
            return False
        if batch.size == 0:  # lost on the disk, and counted
            self.log.c_read_done(batch.lost_end - batch.position)
            self.log.c_settle(batch.lost_end, 0, 0, NULL, 0)
            return True
        loss.messages = loss.bytes = 0
        while at < batch.size:
            if cps_record_load(batch.bytes + at, batch.size - at, batch.position + at, &record) != CPS_OK:
                break
            if cps_record_load_extras(batch.bytes + at, &record) != CPS_OK:
                break
            if not record.is_pad:
                if cps_window_recall(self.window, record.position, &fate) == CPS_OK:
                    break  # it has ended otherwise
                if record.ttl_ms != 0:
                    self.log.ttl_seen = True
                if record.ttl_ms == 0 or cps_record_age_ms(&record, boot_ms, batch.earlier_boot) < record.ttl_ms:
                    break
                loss.messages += 1
                loss.bytes += cps_record_span(record.length_bytes)
            at += cps_record_span(record.length_bytes)
        self.log.c_read_done(at)
        if loss.messages > 0:  # over pads alone the head has gone already
            loss.first = batch.position
            loss.end = batch.position + at
            loss.reason = CPS_REASON_EXPIRED
            self.log.c_settle(loss.end, 0, 0, &loss, 1)
            total[0] += loss.messages
        return at == batch.size

    def unsent(self):
        """A view of the framed bytes that the socket has not taken; the same bytes until `sent` says otherwise."""
        return PyMemoryView_FromMemory(<char *>self.out + self.out_start, self.out_end - self.out_start, PyBUF_READ)

    def has_unsent(self):
        return self.out_start < self.out_end

    def sent(self, size_t n):
        """The socket took `n` bytes of the view."""
        self.out_start += n
        if self.out_start > self.out_end:
            raise ValueError(f"n: {n} bytes are more than there were")

    cdef void tell_head(self) noexcept nogil:
        """Let the log know how far everything is settled, and how."""
        cdef uint64_t head, messages, span_bytes
        cdef const cps_ending *endings
        cdef cps_loss losses[ENDINGS]
        cdef size_t i, n = ENDINGS
        if self.is_split:
            self.tell_heads()
            return
        while n == ENDINGS:  # then the head may have waited for these to be told
            endings = cps_window_endings(self.window, &n)
            for i in range(n):
                losses[i] = loss_of(&endings[i])
            cps_window_settled(self.window, &messages, &span_bytes)
            if cps_window_head(self.window, &head) == CPS_OK and head != self.told_head:
                self.told_head = head
                self.log.c_settle(head, messages - self.told_messages, span_bytes - self.told_bytes, losses, n)
            self.told_messages = messages
            self.told_bytes = span_bytes
            cps_window_told(self.window)

    cdef void tell_heads(self) noexcept nogil:
        """As `tell_head`, of two streams."""
        cdef uint64_t head, live_head = 0, messages, span_bytes, live_messages, live_bytes
        cdef const cps_ending *endings
        cdef cps_loss losses[2][ENDINGS]
        cdef size_t i, n = ENDINGS
        cdef size_t count[2]
        cdef bint live, has_live_head
        while n == ENDINGS:
            endings = cps_window_endings(self.window, &n)
            count[0] = count[1] = 0
            for i in range(n):
                live = endings[i].first >= self.live_first
                losses[live][count[live]] = loss_of(&endings[i])
                count[live] += 1
            cps_window_settled(self.window, &messages, &span_bytes)
            has_live_head = cps_window_live(self.window, &live_head, &live_messages, &live_bytes) == CPS_OK
            if cps_window_head(self.window, &head) == CPS_OK and head != self.told_head:
                self.told_head = head
                self.log.c_settle(head, messages - live_messages - (self.told_messages - self.told_live_messages),
                                  span_bytes - live_bytes - (self.told_bytes - self.told_live_bytes), losses[0], count[0])
            if has_live_head and live_head != self.told_live_head:
                self.told_live_head = live_head
                self.log.c_settle_live(live_head, live_messages - self.told_live_messages,
                                       live_bytes - self.told_live_bytes, losses[1], count[1])
            self.told_messages = messages
            self.told_bytes = span_bytes
            self.told_live_messages = live_messages
            self.told_live_bytes = live_bytes
            cps_window_told(self.window)
        self.join_if_over()

    def end(self, uint64_t position):
        """The message at `position`, which is held or in flight, is in the dead letters."""
        self.log.enter()
        try:
            check_status(cps_window_end(self.window, position, CPS_FATE_DEAD))
            with nogil:
                self.tell_head()
        finally:
            self.log.leave()

    def take_refusals(self):
        """List of (position, reason code, reason string) of messages that the broker refused and that are held now."""
        refusals, self.refusals = self.refusals, []
        return refusals

    def take(self, bint report):
        """Work off what was received: acknowledgements go to the log.

        Returns (acknowledged messages as a list of `Message` if `report`, else None; number acknowledged; control bytes
        for paho).  With `report`, about a thousand at a time: call again while `waiting_bytes` does not stand still.
        What the broker refused is held and told by `take_refusals`.  Raises ValueError if it broke the protocol.
        """
        cdef cps_wire_acks acks
        cdef cps_packet packet
        cdef cps_status status = CPS_OK
        cdef bytearray control = bytearray()
        cdef list reported = [] if report else None
        cdef size_t i, settled = 0
        cdef uint64_t position
        cdef uint64_t *positions = self.positions if report else NULL
        self.log.enter()
        try:
            while status == CPS_OK:
                with nogil:
                    status = cps_wire_take_acks(self.stream, self.window, positions, TAKE_MAX, &acks)
                settled += acks.settled
                if report:
                    for i in range(acks.settled):
                        message = self.log.look(self.positions[i])
                        if message is not None:
                            reported.append(message)
                if status == CPS_OK:
                    status = cps_stream_next(self.stream, &packet)
                    if status == CPS_OK and packet.type == CPS_WIRE_PUBACK:  # only a refusal is left to us
                        if cps_window_refuse(self.window, packet.packet_id, &position) == CPS_OK:
                            self.refusals.append((position, packet.reason, reason_string(&packet)))
                    elif status == CPS_OK:
                        self.note(&packet, control)
            with nogil:
                self.tell_head()
        finally:
            self.log.leave()
        if status != CPS_EMPTY and status != CPS_FULL:
            raise ValueError("the broker sent what no MQTT broker may send")
        return reported, settled, control

    def inflight(self):
        """(messages, position of the oldest or None, ms when that was framed, messages held)."""
        cdef uint64_t position, sent_ms = 0
        oldest = position if cps_window_oldest(self.window, &position, &sent_ms) == CPS_OK else None
        return cps_window_inflight_messages(self.window), oldest, sent_ms, cps_window_held(self.window)

    cdef bint much_in_flight(self) noexcept nogil:
        return (cps_window_inflight_messages(self.window) >= MUCH_MESSAGES
                or cps_window_inflight_bytes(self.window) >= MUCH_BYTES)

    def has_much_in_flight(self):
        """Then an acknowledgement is not worth waking up for: whoever reads rarely reads many at once, and the broker, which
        writes one by one, is interrupted rarely."""
        return self.much_in_flight()

    def oldest(self):
        """Positions of the messages that are the oldest in flight of each stream."""
        cdef uint64_t position
        return [position for live in (False, True) if cps_window_oldest_of(self.window, live, &position) == CPS_OK]

    def unknown_acks(self):
        return cps_window_unknown_acks(self.window)
