"""Entry point of `python -m sinkscope`, the same as the command `sinkscope`."""

from sinkscope.cli import main

main()
