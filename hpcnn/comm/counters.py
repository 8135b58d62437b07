"""What a rank has sent: messages and bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Messages and bytes sent by one rank, since its engine was made or between two such readings (`later - before`).

    A message is one transfer of a schedule, in however many segments it travels. A collective of the MPI library's
    own, which does not tell, counts as one message of the array's size.
    """

    num_messages: int = 0
    num_bytes: int = 0

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(self.num_messages - before.num_messages, self.num_bytes - before.num_bytes)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.num_messages + other.num_messages, self.num_bytes + other.num_bytes)
