"""Pure tensor functions of Stage II, and the table of methods. Nothing here loads a model or does I/O.

from purld.methods.labels import pu_labels
from purld.methods.losses import ldl_loss

labels = pu_labels(scores, anchor_score, gamma=5.0, tau=1.2)  # Eq. 2
loss = ldl_loss(tokens, labels.log_distribution, form="ratio", beta=0.01)  # Eq. 4
"""
