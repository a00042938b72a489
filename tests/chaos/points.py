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
#: These two are points of jobs that something follows on, and of no others.
FOLLOW_UP_SENT = "after a follow-up, before it is noted"
CHORD_COMPLETE = "after the last member of a chord, before its body"

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
