"""The method as pure tensor functions: labels, losses, and the table of methods. No models, no I/O."""
