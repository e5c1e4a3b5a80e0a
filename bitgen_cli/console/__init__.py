"""Everything the terminal shows, and the only room that uses rich.

What is not a terminal gets plain lines, and few of them. Results go to stdout, all else to stderr.
"""
