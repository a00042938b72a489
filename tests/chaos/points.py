"""The named points of an upload at which things are killed, in the order in which a job passes them."""

from __future__ import annotations

BEFORE_FETCH = "before fetch"
MID_FETCH = "mid fetch"
AFTER_IDENTIFY = "after identify"
AFTER_CHECK = "after check"
AFTER_CLAIM = "after the study's claim"
MID_PUSH = "mid push"
ANSWER_UNREAD = "stored, answer unread"
BEFORE_RECEIPT = "after answer, before receipt"
AFTER_RECEIPT = "after receipt, before result"
DESCRIBE = "during describe"
BEFORE_RESULT = "after outcome, before result"
BEFORE_ACK = "after result, before ack"
IDLE = "idle"

#: Where a job can be stopped.
STOPS = (
    BEFORE_FETCH,
    MID_FETCH,
    AFTER_IDENTIFY,
    AFTER_CHECK,
    AFTER_CLAIM,
    MID_PUSH,
    ANSWER_UNREAD,
    BEFORE_RECEIPT,
    AFTER_RECEIPT,
    DESCRIBE,
    BEFORE_RESULT,
    BEFORE_ACK,
)
#: ``IDLE`` is no point of a job: the worker dies while it has none.
POINTS = (*STOPS, IDLE)
