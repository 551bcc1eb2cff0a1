"""Compares two answers with math-verify, in a process of its own: JSON lines in, JSON lines out.

`mssr.rewards.symbolic` starts it as a plain script. It imports nothing of the trainer, so that it starts in half a second
without torch. It can be killed at any moment, and ends by itself when the trainer does: at the end of its input or,
during a comparison that hangs, by the alarm.

    -> {"predicted": "\\frac{1}{2}", "gold": "0.5"}
    <- {"equal": true}
"""

import json
import logging
import os
import resource
import signal
import sys

MEMORY_LIMIT = 4 << 30  # bytes; towers of powers ask for more, and get a MemoryError


def main(alarm_s: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes our input
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside one long C call
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    replies = os.fdopen(os.dup(1), "w")
    from math_verify import parse, verify

    logging.disable()  # math-verify warns that its timeouts are off; the trainer kills this process instead
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # what a parser prints must not get into the replies
    os.dup2(silence, 2)

    def expressions(text: str) -> list:
        return parse("\\boxed{" + text + "}", parsing_timeout=None)

    def equal(predicted: str, gold: str) -> bool:
        try:
            return bool(verify(expressions(gold), expressions(predicted), timeout_seconds=None))
        except Exception:
            return False  # not comparable as mathematics, and the strings are known to differ

    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(alarm_s)
        answer = equal(**json.loads(line))
        signal.alarm(0)
        print(json.dumps({"equal": answer}), file=replies, flush=True)


if __name__ == "__main__":
    main(alarm_s=int(sys.argv[1]))
