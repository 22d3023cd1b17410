"""The two stages of training: fine-tuning on anchors, then alignment on self-ranked candidates."""
