"""The student model: loading and roles, encoding, sampling, log-likelihoods, self-evaluation."""
