"""Log-probs of whole completions, for tests."""

from purld.model.log_probs import token_log_probs


def sequence_log_probs(model, prompt, completions, pad):
    """log p(y_k | x) in nats of K completions of one prompt: (K,), float32."""
    return token_log_probs(model, prompt, completions, pad)[0].sum(dim=1)
