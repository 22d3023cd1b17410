"""Install the network guard in every Python process that a test starts."""

from network_guard import forbid_network

forbid_network()
