"""The two training stages: fine-tuning on the anchors, then alignment on candidates that p_sft scores.

from purld.training.align import align
from purld.training.sft import fine_tune

fine_tune(context, config.sft, examples)  # Stage I writes p_sft to the run directory
align(context, config.align, examples)  # Stage II starts from it and writes the policy
"""
