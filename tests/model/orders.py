"""Every atomic operation of the C core that a model does, and its ordering.

The C files name them in comments, `model: NAME`; test_source.py compares both.
"""

ORDERS = {
    # _shared.h: the page of cursors and counters
    "page.own": "relaxed",
    "page.slot.put": "release",
    "page.sequence.put": "release",
    "page.sequence.get": "acquire",
    "page.slot.get": "acquire",
    "page.again": "relaxed",
    # _ring.c
    "ring.published.store": "release",
    "ring.published.load": "acquire",
    "ring.reclaim.store": "release",
    "ring.reclaim.load": "acquire",
    "ring.reclaim.view": "relaxed",
    "ring.reclaim.room": "relaxed",
    # _home.c
    "home.magic.store": "release",
    "home.magic.load": "relaxed",
    "home.generation.load": "relaxed",
    "home.next.load": "relaxed",
    "home.announced.load": "relaxed",
    "home.promote": "relaxed",
    "home.announce": "release",
    "home.commit": "relaxed",
    "home.committed": "release",
    # _log_write.c: the time stamp that producers share
    "stamp.tick.load": "acquire",
    "stamp.load": "relaxed",
    "stamp.seen": "relaxed",
    "stamp.raise": "relaxed",
    "stamp.tick.store": "release",
    # _quarantine.c, _quarantine.h
    "share.give": "relaxed",
    "share.seen": "relaxed",
    "share.take": "relaxed",
}

#: The model that fails when the ordering is weakened.
PROVED_BY = {
    "page.slot.put": "page.watched",
    "page.sequence.put": "page.watched",
    "page.sequence.get": "page.watched",
    "page.slot.get": "page.watched",
    "ring.published.store": "ring.both_readers",
    "ring.published.load": "ring.both_readers",
    "ring.reclaim.store": "ring.both_readers",
    "ring.reclaim.load": "ring.both_readers",
    "home.magic.store": "home.opens",
    "home.announce": "home.opens",
    "home.committed": "home.opens",
    "stamp.tick.load": "stamp.shared",
    "stamp.tick.store": "stamp.shared",
}
