"""glibc's settings for freed memory, which affect measured memory and CPU times."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
GIVE_BACK = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 131072, M_TRIM_THRESHOLD: 131072}  # blocks, bytes, bytes
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}


def give_back():
    """Give large blocks back to the system when they are freed, so that the resident set is the memory in use. By default
    glibc keeps more of them the longer it runs.

    Raises:
        RuntimeError: there is no glibc.
    """
    if not _set(GIVE_BACK):
        raise RuntimeError("there is no mallopt: memory can only be measured with glibc")


def keep():
    """Keep freed memory for the next block, as torch's allocator on CUDA does. By default every page of a large block is
    faulted in again, which takes up to a third of eager's time. Without glibc nothing changes."""
    _set(KEEP)


def trim():
    """Give free memory back to the system now."""
    ctypes.CDLL(None).malloc_trim(0)


def _set(values: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(parameter, value) for parameter, value in values.items()])
