"""What `hpcnn doctor` concludes from facts, room by room: each module's `judge` is a function of plain values.

Facts are collected apart (`environment`, `gpus`, `storage.facts`, `limits.facts`, `ranks.collect`), so that every
judgement can be tried on facts that this machine does not have.
"""
