"""The first import of each command: from here on Ctrl-C ends it in one line, `qat.cli.entry` takes over. Imports nothing heavy."""

import signal
import threading

from qat.launch import signals

# Not where somebody has Ctrl-C ignored (a job in the background of a script), or takes it himself.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signals.end_at_once)
