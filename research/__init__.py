import os
import signal
import sys

if sys.argv[:1] == ["-m"]:  # a command starts: until `command.run`, a stop leaves at once, without a traceback
    for _number, _code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, lambda *_, code=_code: os._exit(code))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # held by `command.tune_process`
