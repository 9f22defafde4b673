# The C core as Cython sees it: the only file with extern declarations.  What a function promises stands in its header.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<stdbool.h>" nogil:
    ctypedef bint c_bool "bool"

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)
    int eventfd_read(int fd, uint64_t *value)

# The eventfd of a connection counts two things in one number: in units, that messages came while the log was armed; in
# these, that its thread is called to other work.
cdef extern from *:
    """
    #define CPS_CALL ((uint64_t)1 << 32)
    """
    const uint64_t CPS_CALL

cdef extern from "_status.h" nogil:
    enum cps_status:
        CPS_OK
        CPS_FULL
        CPS_EMPTY
        CPS_TIMEOUT
        CPS_TOO_LARGE
        CPS_CLOSED
        CPS_LOCKED
        CPS_DAMAGED
        CPS_IO
        CPS_NO_MEMORY
        CPS_DROPPED
        CPS_UNKNOWN
        CPS_BUSY
        CPS_FOREIGN

cdef extern from "_io.h" nogil:
    ctypedef struct cps_io:
        pass
    const cps_io *cps_io_system() noexcept

cdef extern from "_crc32c.h" nogil:
    const char *cps_crc32c_name() noexcept

cdef extern from "_record.h" nogil:
    enum:
        CPS_RECORD_RETAIN
        CPS_RECORD_EXTRAS
    uint64_t CPS_RECORD_TTL_MAX
    ctypedef struct cps_record:
        uint64_t position
        uint64_t stamp_ms
        uint64_t ttl_ms
        uint32_t length_bytes
        uint32_t payload_bytes
        uint16_t topic_bytes
        uint16_t userdata_bytes
        uint16_t properties_bytes
        uint8_t flags
        c_bool is_pad
    uint64_t cps_record_span(uint64_t length_bytes) noexcept
    cps_status cps_record_load(const uint8_t *at, uint64_t available, uint64_t position, cps_record *out) noexcept
    cps_status cps_record_load_extras(const uint8_t *at, cps_record *record) noexcept
    uint64_t cps_record_age_ms(const cps_record *record, uint64_t boot_ms, c_bool earlier_boot) noexcept
    const uint8_t *cps_record_topic(const uint8_t *at) noexcept
    const uint8_t *cps_record_payload(const uint8_t *at, const cps_record *record) noexcept
    const uint8_t *cps_record_userdata(const uint8_t *at, const cps_record *record) noexcept
    const uint8_t *cps_record_properties(const uint8_t *at, const cps_record *record) noexcept

cdef extern from "_shared.h" nogil:
    ctypedef struct cps_produced:
        uint64_t published
        uint64_t messages
        uint64_t bytes
        uint64_t refused
        uint64_t refused_bytes
    ctypedef struct cps_settled:
        uint64_t head
        uint64_t spilled
        uint64_t sent_max
        uint64_t acked_messages
        uint64_t acked_bytes
        uint64_t dropped_messages
        uint64_t dropped_bytes
        uint64_t dead_messages
        uint64_t dead_bytes

cdef extern from "_ring.h" nogil:
    ctypedef struct cps_message:
        const uint8_t *topic
        const uint8_t *payload
        const uint8_t *userdata
        uint32_t payload_bytes
        uint16_t topic_bytes
        uint16_t userdata_bytes
        uint16_t properties_bytes
        uint8_t flags
        const uint8_t *properties
        uint64_t ttl_ms

cdef extern from "_segment.h" nogil:
    ctypedef struct cps_scan:
        uint64_t bytes_read
        uint64_t records
        uint64_t torn_bytes
        uint64_t damaged_ranges
        uint64_t damaged_bytes

cdef extern from "_store.h" nogil:
    ctypedef struct cps_recovery:
        cps_scan scan
        uint64_t segments
        uint64_t unreadable
        uint64_t overlapping

cdef extern from "_log.h" nogil:
    ctypedef struct cps_log:
        pass
    enum cps_durability:
        CPS_DURABILITY_MEMORY
        CPS_DURABILITY_PROCESS
        CPS_DURABILITY_POWER
    enum cps_on_full:
        CPS_ON_FULL_DROP_OLDEST
        CPS_ON_FULL_DROP_NEWEST
        CPS_ON_FULL_BLOCK
        CPS_ON_FULL_RAISE
    enum cps_storage:
        CPS_STORAGE_NONE
        CPS_STORAGE_OK
        CPS_STORAGE_FULL
        CPS_STORAGE_FAILED
    enum cps_reason:
        CPS_REASON_QUOTA
        CPS_REASON_EXPIRED
        CPS_REASON_DEAD
    uint64_t CPS_NO_LIMIT_MS
    ctypedef struct cps_log_config:
        const cps_io *io
        const char *directory
        const char *ring_directory
        const uint8_t *identity
        uint16_t identity_bytes
        c_bool adopt
        cps_durability durability
        cps_on_full on_full
        uint64_t ring_bytes
        uint64_t segment_bytes
        uint64_t spool_bytes_max
        uint64_t spool_messages_max
        uint64_t min_free_bytes
        uint64_t spill_after_ms
        uint64_t spill_timeout_ms
        uint64_t block_timeout_ms
        uint64_t sync_interval_ms
        uint64_t sync_bytes
        uint64_t seal_after_ms
        void (*notify)(void *user, c_bool data_came) noexcept nogil
        void *notify_user
    ctypedef struct cps_opened:
        cps_recovery recovery
        uint64_t ring_messages
        c_bool ring_adopted
        c_bool ring_in_file
        c_bool clean
        c_bool meta_damaged
        int error
        const char *where
        uint8_t spool_id[16]
        uint16_t identity_bytes
        uint8_t identity[1024]
    ctypedef struct cps_loss:
        uint64_t first
        uint64_t end
        uint64_t messages
        uint64_t bytes
        cps_reason reason
    ctypedef struct cps_log_stats:
        cps_produced produced
        cps_settled settled
        uint64_t sent
        uint64_t synced
        uint64_t ring_bytes
        uint64_t ring_used_bytes
        uint64_t spool_bytes
        uint64_t spool_segments
        uint64_t spool_messages
        uint64_t pending_messages
        uint64_t pending_bytes
        uint64_t oldest_age_ms
        uint64_t spilled_bytes
        uint64_t syncs
        uint64_t damaged_ranges
        uint64_t damaged_bytes
        uint64_t quarantine_bytes
        uint64_t expired_messages
        uint64_t uncertain_first
        uint64_t uncertain_end
        cps_storage storage
        int storage_error
    ctypedef struct cps_batch:
        const uint8_t *bytes
        size_t size
        uint64_t position
        uint64_t lost_end
        uint64_t dup_below
        c_bool earlier_boot
    cps_status cps_log_open(const cps_log_config *config, cps_log **out, cps_opened *opened) noexcept
    void cps_log_close(cps_log *log, uint64_t timeout_ms, uint64_t *unsaved) noexcept
    bint cps_log_finish(cps_log *log, uint64_t timeout_ms) noexcept
    void cps_log_shut(cps_log *log) noexcept
    ctypedef struct cps_patience:
        uint64_t slice_ms
        c_bool never_block
    cps_status cps_log_append(cps_log *log, cps_message *message, cps_patience *patience, uint64_t *position) noexcept
    cps_status cps_log_read(cps_log *log, size_t max_bytes, cps_batch *batch) noexcept
    void cps_log_read_done(cps_log *log, uint64_t consumed_bytes) noexcept
    c_bool cps_log_arm(cps_log *log) noexcept
    void cps_log_rewind(cps_log *log) noexcept
    void cps_log_settle(cps_log *log, uint64_t head, uint64_t messages, uint64_t bytes, const cps_loss *ended,
                        size_t n) noexcept
    cps_status cps_log_settle_through(cps_log *log, uint64_t position) noexcept
    cps_status cps_log_look(cps_log *log, uint64_t position, cps_record *record, const uint8_t **at) noexcept
    enum cps_split:
        CPS_SPLIT_NONE
        CPS_SPLIT_BEGUN
        CPS_SPLIT_GOES_ON
        CPS_SPLIT_FULL
    cps_split cps_log_split(cps_log *log, uint64_t age_ms, uint64_t bytes, c_bool may_begin) noexcept
    c_bool cps_log_is_split(const cps_log *log) noexcept
    cps_status cps_log_read_live(cps_log *log, size_t max_bytes, cps_batch *batch) noexcept
    void cps_log_settle_live(cps_log *log, uint64_t end, uint64_t messages, uint64_t bytes, const cps_loss *ended,
                             size_t n) noexcept
    c_bool cps_log_arm_live(cps_log *log, c_bool also_backlog) noexcept
    ctypedef struct cps_fronts:
        uint64_t head
        uint64_t sent
        uint64_t live_first
        uint64_t live_end
        uint64_t live_sent
    void cps_log_fronts(cps_log *log, cps_fronts *out) noexcept
    void cps_log_link(cps_log *log, c_bool up) noexcept
    cps_status cps_log_wait_settled(cps_log *log, uint64_t position, c_bool all, uint64_t timeout_ms) noexcept
    cps_status cps_log_wait_synced(cps_log *log, uint64_t position, uint64_t timeout_ms) noexcept
    uint64_t cps_log_published(const cps_log *log) noexcept
    cps_status cps_log_outcome(cps_log *log, uint64_t position, cps_reason *reason) noexcept
    size_t cps_log_take_losses(cps_log *log, cps_loss *out, size_t room) noexcept
    cps_storage cps_log_storage(cps_log *log, int *error) noexcept
    void cps_log_stats_now(cps_log *log, cps_log_stats *out) noexcept
    const char *cps_reason_name(cps_reason reason) noexcept

cdef extern from "_window.h" nogil:
    ctypedef struct cps_window:
        pass
    enum cps_fate:
        CPS_FATE_ACKED
        CPS_FATE_DEAD
        CPS_FATE_EXPIRED
    enum:
        CPS_WINDOW_ENDINGS
    ctypedef struct cps_ending:
        uint64_t first
        uint64_t end
        uint64_t messages
        uint64_t bytes
        cps_fate fate
    cps_status cps_window_recall(cps_window *window, uint64_t position, cps_fate *fate) noexcept
    cps_status cps_window_refuse(cps_window *window, uint16_t packet_id, uint64_t *position) noexcept
    cps_status cps_window_end(cps_window *window, uint64_t position, cps_fate fate) noexcept
    const cps_ending *cps_window_endings(const cps_window *window, size_t *count) noexcept
    void cps_window_told(cps_window *window) noexcept
    uint32_t cps_window_held(const cps_window *window) noexcept
    cps_status cps_window_open(uint32_t messages_max, uint64_t bytes_max, cps_window **out) noexcept
    void cps_window_close(cps_window *window) noexcept
    void cps_window_limit(cps_window *window, uint32_t messages_max, uint64_t bytes_max) noexcept
    cps_status cps_window_pass(cps_window *window, uint64_t position, uint64_t end) noexcept
    cps_status cps_window_head(const cps_window *window, uint64_t *head) noexcept
    void cps_window_settled(const cps_window *window, uint64_t *messages, uint64_t *span_bytes) noexcept
    void cps_window_split(cps_window *window, uint64_t live_first) noexcept
    void cps_window_turn(cps_window *window, c_bool live) noexcept
    void cps_window_join(cps_window *window) noexcept
    cps_status cps_window_live(const cps_window *window, uint64_t *head, uint64_t *messages,
                               uint64_t *span_bytes) noexcept
    cps_status cps_window_oldest_of(const cps_window *window, c_bool live, uint64_t *position) noexcept
    void cps_window_forget(cps_window *window, uint64_t first, uint64_t end) noexcept
    void cps_window_restart(cps_window *window) noexcept
    void cps_window_forget_below(cps_window *window, uint64_t position) noexcept
    uint32_t cps_window_inflight_messages(const cps_window *window) noexcept
    uint64_t cps_window_inflight_bytes(const cps_window *window) noexcept
    uint64_t cps_window_unknown_acks(const cps_window *window) noexcept
    cps_status cps_window_oldest(const cps_window *window, uint64_t *position, uint64_t *sent_ms) noexcept

cdef extern from "_wire.h" nogil:
    enum:
        CPS_WIRE_LEVEL_311
        CPS_WIRE_LEVEL_5
        CPS_WIRE_ID_PREFIX_MAX
        CPS_WIRE_PUBACK_BYTES
        CPS_WIRE_CONNACK
        CPS_WIRE_PUBLISH
        CPS_WIRE_PUBACK
        CPS_WIRE_PINGRESP
        CPS_WIRE_DISCONNECT
    enum cps_wire_stop:
        CPS_WIRE_SPAN_END
        CPS_WIRE_OUTPUT_FULL
        CPS_WIRE_WINDOW_FULL
        CPS_WIRE_LIMIT
        CPS_WIRE_HELD
        CPS_WIRE_REFUSED
    enum cps_wire_unsendable:
        CPS_WIRE_SENDABLE
        CPS_WIRE_OVERSIZE
        CPS_WIRE_RETAINED
    uint32_t CPS_WIRE_PACKET_MAX
    ctypedef struct cps_wire_aliases:
        uint16_t count
    void cps_wire_aliases_reset(cps_wire_aliases *aliases, uint16_t limit) noexcept
    ctypedef struct cps_wire_source:
        const uint8_t *bytes
        size_t size_bytes
        uint64_t position
        uint64_t dup_below
        uint64_t now_ms
        uint64_t boot_ms
        uint64_t bytes_max
        uint32_t messages_max
        uint32_t hold_messages
        uint32_t packet_bytes_max
        uint16_t id_prefix_bytes
        uint8_t level
        c_bool earlier_boot
        c_bool no_retain
        cps_wire_aliases *aliases
        const uint8_t *id_prefix
        uint64_t *after
    ctypedef struct cps_wire_framed:
        size_t consumed_bytes
        size_t produced_bytes
        uint32_t messages
        uint32_t resent
        uint32_t skipped
        uint32_t held
        uint32_t packet_bytes
        uint64_t unsendable_position
        cps_wire_unsendable unsendable
        cps_wire_stop stop
    cps_status cps_wire_frame(const cps_wire_source *source, cps_window *window, uint8_t *out, size_t capacity,
                              cps_wire_framed *framed) noexcept
    ctypedef struct cps_wire_record:
        const uint8_t *at
        const cps_record *record
        const uint8_t *payload
        uint32_t payload_bytes
    cps_status cps_wire_frame_one(const cps_wire_source *source, const cps_wire_record *frm, cps_window *window,
                                  uint8_t *out, size_t room, cps_wire_framed *framed) noexcept
    cps_status cps_wire_puback(uint8_t *out, size_t capacity, const uint16_t *ids, size_t n, size_t *produced) noexcept
    ctypedef struct cps_stream:
        pass
    ctypedef struct cps_packet:
        const uint8_t *bytes
        const uint8_t *topic
        const uint8_t *payload
        const uint8_t *properties
        uint32_t size_bytes
        uint32_t payload_bytes
        uint32_t properties_bytes
        uint16_t topic_bytes
        uint16_t packet_id
        uint8_t type
        uint8_t flags
        uint8_t qos
        uint8_t reason
        c_bool dup
        c_bool retain
        c_bool session_present
    ctypedef struct cps_wire_acks:
        size_t packets
        size_t settled
        uint64_t settled_bytes
    cps_status cps_stream_open(size_t initial, uint32_t packet_max, uint8_t level, cps_stream **out) noexcept
    void cps_stream_close(cps_stream *stream) noexcept
    void cps_stream_reset(cps_stream *stream) noexcept
    cps_status cps_stream_space(cps_stream *stream, size_t minimum, uint8_t **at, size_t *room) noexcept
    void cps_stream_commit(cps_stream *stream, size_t n) noexcept
    cps_status cps_stream_next(cps_stream *stream, cps_packet *out) noexcept
    size_t cps_stream_waiting_bytes(const cps_stream *stream) noexcept
    cps_status cps_wire_take_acks(cps_stream *stream, cps_window *window, uint64_t *positions, size_t capacity,
                                  cps_wire_acks *acks) noexcept

cdef extern from "_crc32c.h" nogil:
    uint32_t cps_crc32c(uint32_t crc, const uint8_t *data, size_t size) noexcept

cdef extern from "_shared.h" nogil:
    void cps_shared_look(const void *sequence, const void *slots, unsigned words, uint64_t *to) noexcept

cdef extern from "_frames.h" nogil:
    enum:
        CPS_FRAMES_HEADER_MAX
    enum cps_frames_fault:
        CPS_FRAMES_FINE
    ctypedef struct cps_frames:
        uint32_t idle_frames
        uint8_t fault
        uint8_t control_bytes
        uint8_t *control
        uint8_t ping_bytes
        uint8_t *ping
        c_bool has_ping
        c_bool is_closed
    size_t cps_frames_make(uint8_t *out, uint8_t opcode, const uint8_t *data, size_t n, const uint8_t *key) noexcept
    size_t cps_frames_take(cps_frames *frames, uint8_t *bytes, size_t n) noexcept
