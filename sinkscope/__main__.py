"""`python -m sinkscope` is the command `sinkscope`."""

from sinkscope.cli import main

main()
