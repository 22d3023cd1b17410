"""Tell a device that has run out of memory from other failures, whichever library noticed it."""

from __future__ import annotations

from purld.failures import says_out_of_memory


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device has too little memory left, so that less at once may work.

    torch's allocator raises `torch.OutOfMemoryError`; cuBLAS, the launch of a kernel and the CPU's allocator end in a
    RuntimeError. That of a collective does not count: the other ranks are in it, and no rank can begin it again alone.
    """
    return isinstance(error, RuntimeError) and says_out_of_memory(error) and "NCCL" not in str(error)
