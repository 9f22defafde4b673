"""The memory ordering of the C core, model-checked.

`machine` explores small programs, in every order, on a machine whose memory is weaker than ARM's.  `page`, `ring`,
`wake`, `home`, `stamp` and `share` are what the C core does outside of locks, as such programs; `orders` is the list
of its atomic operations.  The tests beside them explore each model, weaken each ordering and demand a counterexample,
and compare all of it with the C files.
"""
