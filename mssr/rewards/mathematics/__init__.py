"""Whether two answers are equal as mathematics: normalise (one spelling), compare (what kind of answer it is), symbolic."""
