"""`python -m mssr`, what a launcher such as torchrun starts."""

from mssr.cli import main

main()
