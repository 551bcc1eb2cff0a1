import mssr.extras  # noqa: F401  it says in one line which library is missing
