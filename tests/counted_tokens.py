"""How many tokens, padding included, really go through a model."""

import contextlib


@contextlib.contextmanager
def counted_tokens(model):
    """Yield a list to which every forward pass appends the number of token ids that it embeds."""
    counts = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: counts.append(ids[0].numel()))
    try:
        yield counts
    finally:
        handle.remove()
