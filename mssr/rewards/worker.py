"""The process that compares two answers with math-verify: JSON lines in, JSON lines out.

Started by `mssr.rewards.symbolic` as a plain script and free of imports from the trainer, so that it starts in half a
second and never imports torch. It can be killed at any moment, and ends by itself when the trainer does: on end of
input, or, in the middle of a comparison that hangs, by the alarm.

    -> {"predicted": "\\frac{1}{2}", "gold": "0.5"}
    <- {"equal": true}
"""

import json
import logging
import os
import resource
import signal
import sys

MEMORY_LIMIT = 4 << 30  # bytes; towers of powers ask for far more, and get a MemoryError instead of the machine


def main(alarm_s: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes our input
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside one long C call
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    replies = os.fdopen(os.dup(1), "w")
    from math_verify import parse, verify

    logging.disable()  # math-verify warns that its own timeouts are off: the trainer's kill replaces them
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # whatever a parser prints must not reach the replies
    os.dup2(silence, 2)

    def expressions(text: str) -> list:
        return parse("\\boxed{" + text + "}", parsing_timeout=None)

    def equal(predicted: str, gold: str) -> bool:
        try:
            return bool(verify(expressions(gold), expressions(predicted), timeout_seconds=None))
        except Exception:
            return False  # not comparable as mathematics, and the strings differed already

    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(alarm_s)
        answer = equal(**json.loads(line))
        signal.alarm(0)
        print(json.dumps({"equal": answer}), file=replies, flush=True)


if __name__ == "__main__":
    main(alarm_s=int(sys.argv[1]))
