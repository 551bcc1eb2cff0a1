"""What the process does with memory that was freed: it decides what a size is, and on a CPU a time, too."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
GIVE_BACK = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 131072, M_TRIM_THRESHOLD: 131072}  # blocks, and twice bytes
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}


def give_back():
    """Large blocks come from the system and go back to it when they are freed: the resident set tells what is held. By
    default glibc keeps more of them the longer it runs.

    Raises:
        RuntimeError: without glibc.
    """
    if not _set(GIVE_BACK):
        raise RuntimeError("mallopt refuses: memory can only be measured with glibc")


def keep():
    """What was freed stays for the next, as with torch's allocator on CUDA. By default every page of a large block is faulted
    in anew: up to a third of eager's time, more or less of it by what had run before. Without glibc nothing changes."""
    _set(KEEP)


def trim():
    """What is free goes back to the system now."""
    ctypes.CDLL(None).malloc_trim(0)


def _set(values: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(parameter, value) for parameter, value in values.items()])
