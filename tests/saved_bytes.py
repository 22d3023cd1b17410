"""Count what autograd keeps for the backward pass."""

import contextlib

import torch


@contextlib.contextmanager
def counting_saved_bytes(*known):
    """Yield a function that returns the bytes kept for the backward pass so far, without the storages of `known`."""
    counted, held = {tensor.untyped_storage().data_ptr(): 0 for tensor in known}, []

    def pack(tensor):
        held.append(tensor)  # its address is not used again
        storage = tensor.untyped_storage()
        counted.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(counted.values())
