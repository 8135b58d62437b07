"""What a rank has sent, and the time that it took."""

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


@dataclass(frozen=True)
class Communication:
    """Traffic of one rank, and how its time passed, since its engine was made or between two such readings.

    Attributes
    ----------
    traffic : Traffic
        What was sent.
    exposed_s : float
        Seconds in which the rank waited for it.
    hidden_s : float
        Seconds in which something was in flight while the rank did other things.
    """

    traffic: Traffic = Traffic()
    exposed_s: float = 0.0
    hidden_s: float = 0.0

    def __add__(self, other: Communication) -> Communication:
        return Communication(
            self.traffic + other.traffic, self.exposed_s + other.exposed_s, self.hidden_s + other.hidden_s
        )

    def __sub__(self, before: Communication) -> Communication:
        return Communication(
            self.traffic - before.traffic, self.exposed_s - before.exposed_s, self.hidden_s - before.hidden_s
        )
