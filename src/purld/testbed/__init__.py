"""A small synthetic world with known truth: its problems, its teacher and judge, its tiny student."""
