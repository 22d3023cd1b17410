"""The student model: loading, encoding, sampling, log-probs and self-evaluation.

- `load`: models, adapters, and their roles in Stage II; `processor`: tokenizers and processors.
- `encode`: text to token ids; `vision`: images to the model's other inputs.
- `sample`: completions; `samplers`: the engines that draw them, with vLLM (`vllm_sampler`, `vllm_server`) among them.
- `log_probs`: log-probs of a group's completions. Its prompt is computed once (`prefix`, on `cache` and
  `body_and_head`) if the model passes a check (`self_check`).
- `self_evaluation`: scores of candidates against the anchor; `critic`: the value head of PPO.
- `causal_lm`: the type of the models that all of them take.

For example, the log-probs of two drawn candidates and their scores against an anchor:

    encoder = load_encoder(student)                      # student: purld.config.schema.Student
    model = load_model(student, student.model)
    prompt = Prompt.from_text("How many legs has a spider?")
    encoded = encoder.encode_prompt(prompt)
    (candidates,) = GenerateSampler(encoder, Decoding(1.0, 64))(model, [encoded], 2, seeds=[0])
    log_probs, mask = token_log_probs(model, encoded, [c.ids for c in candidates], encoder.pad)
    texts = [encoder.decode_text(c.ids) for c in candidates]
    scores = SelfEvaluator(encoder, "expected", batch_size=16).score(model, prompt, "Eight.", texts)
"""
