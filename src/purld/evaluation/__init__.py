"""What the models are worth on held-out prompts: answers, verdicts, rates and their intervals."""
