"""Ctrl-C works in every test and in every process that a test starts."""

import signal

# `nohup make test &` in a script ignores it, and what ignores it passes that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
