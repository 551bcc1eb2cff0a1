"""`python -m mssr`, what a launcher such as `mssr.launch` or torchrun starts."""

from mssr.cli import main

main()
