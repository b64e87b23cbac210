"""Streams of ids that come window after window."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Carry(NamedTuple):
    """What a stream goes on from: its conditions, the last latents, and where they stand.

    contexts: those of the condition, and of none or of a negative text. ids_BWN: the latents from
    `first` on, `count` of them; the rest is unused. done: latents of the stream that were yielded;
    those after are finished and wait.
    """

    contexts: tuple
    ids_BWN: Any
    first: Any
    count: Any
    done: Any


class Stream(Iterator):
    """Yields ids [B, 1, N], latent after latent, `total` in all; see `Carry`.

    step: Carry -> Carry, with the next window in place. first: given ids to yield before, at once,
    or None. contexts: conditions -> those of a Carry, for `switch`.
    """

    is_whole = True  # what is finished and was not yielded waits in `carry`

    def __init__(self, step, carry: Carry, total: int, first, contexts):
        places = map(int, (carry.first, carry.count, carry.done))
        self.carry = Carry(carry.contexts, carry.ids_BWN, *places)
        self._step, self._total, self._first, self._contexts = step, total, first, contexts

    def switch(self, cond: dict):
        """Go on under other conditions; see `Generator.stream`."""
        count = self.carry.done - self.carry.first
        self.carry = self.carry._replace(contexts=self._contexts(cond), count=count)

    def __next__(self) -> jax.Array:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        carry = self.carry
        if carry.done >= self._total:
            raise StopIteration
        if carry.done == carry.first + carry.count:
            carry = self._step(carry)
        self.carry = carry._replace(done=carry.done + 1)
        place = carry.done - carry.first
        return carry.ids_BWN[:, place : place + 1]
