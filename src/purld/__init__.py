"""purld: reinforcement-learning alignment for small on-premise models from one teacher answer per prompt."""

__version__ = "0.1.0"
