"""The limits beyond which a finished Stage II warns; the live page turns its lights red or amber at the same ones."""

COLLAPSED_SPREAD = 0.1
"""Of the spread that the candidates' scores had at the start: below it they hardly differ any more."""
UNMOVED_KL = 1e-3
"""In nats per answer: a policy nearer to p_sft answers like it."""
MOST_TRUNCATED = 0.1
"""The share of candidates that may meet the limit on their length."""
