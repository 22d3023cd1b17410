"""Prompts from files, as the records that the other rooms work on."""
