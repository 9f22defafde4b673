"""Looking into a spool from outside: what is in it, what is wrong with it, and making a damaged copy clean.

Plain Python over docs/format.md.  Nothing here but `repair` ever writes, takes the lock of a spool for longer than a
moment, or needs the spool to be at rest: files may vanish, grow, be sealed or cut while they are read.
"""
