"""Generated problem sets, written in the format of the real ones."""
