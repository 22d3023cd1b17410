"""Prepare a first run: look at the model and the data, write a configuration, and look at the machine.

wishes = Wishes(model="models/my-3b", data="prompts.jsonl", teacher="https://api.openai.com/v1", teacher_model="gpt-4o")
first = prepare_config(wishes, Path("run.yaml"))               # purld.setup.first_config
print(first.text)
"""
