"""What can be typed, one module for each command.

A command builds its options, calls its run (imported inside the body, so that `bitgen --help` loads no torch)
and shows the result. Results go to stdout, everything else to stderr.
"""
