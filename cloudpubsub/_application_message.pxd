cdef class Message:
    cdef readonly object topic
    cdef readonly object payload
    cdef readonly object position
    cdef readonly object userdata
    cdef readonly object retain
    cdef readonly object duplicate
    cdef readonly object qos
    cdef object properties  # as they travel; decoded when somebody asks

    cdef tuple values(self)
